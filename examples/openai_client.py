# SPDX-License-Identifier: Apache-2.0
"""Ask a running server (``examples/serve.sh``) through the OpenAI client: a chat and a streamed completion.

    python examples/openai_client.py
    python examples/openai_client.py --base-url http://127.0.0.1:9000/v1 --temperature 0.8 --seed 7

Nothing here knows about speculation: the API and the answers are those of the plain server.
"""

import argparse

from openai import OpenAI


def chat(client: OpenAI, model: str, question: str, **sampling) -> None:
    """Print the answer to one question, then the token counts."""
    answer = client.chat.completions.create(model=model, messages=[{"role": "user", "content": question}], **sampling)
    print(answer.choices[0].message.content)
    print(f"[{answer.usage.prompt_tokens} prompt tokens, {answer.usage.completion_tokens} generated]")


def stream_completion(client: OpenAI, model: str, prompt: str, **sampling) -> None:
    """Print a completion as it arrives, then the token counts of the last piece."""
    print(prompt, end="")
    pieces = client.completions.create(
        model=model, prompt=prompt, stream=True, stream_options={"include_usage": True}, **sampling
    )
    for piece in pieces:
        for choice in piece.choices:
            print(choice.text, end="", flush=True)
        if piece.usage:
            print(f"\n[{piece.usage.prompt_tokens} prompt tokens, {piece.usage.completion_tokens} generated]")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base-url", default="http://127.0.0.1:8000/v1")
    parser.add_argument("--api-key", default="unused")
    parser.add_argument("--question", default="What does shutil.copytree(src, dst) do?")
    parser.add_argument("--prompt", default="def removeduppaths():\n")
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    sampling = {"max_tokens": args.max_tokens, "temperature": args.temperature, "seed": args.seed}
    with OpenAI(base_url=args.base_url, api_key=args.api_key) as client:
        model = client.models.list().data[0].id
        chat(client, model, args.question, **sampling)
        stream_completion(client, model, args.prompt, **sampling)


if __name__ == "__main__":
    main()
