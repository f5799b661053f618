# SPDX-License-Identifier: Apache-2.0
"""One method's engine for ``bench_prompts.py``, in a process of its own: ``prompt_worker.py job.json out.jsonl``.

Each line on stdin is a part to run, each line of ``out.jsonl`` what came of it; the first says that the engine is up.
"""

import json
import sys
import time
from pathlib import Path
from typing import Any

# A histogram with one observation per engine step.
STEPS = "vllm:iteration_tokens_total"


def engine_steps(llm) -> int:
    """Since the engine's start."""
    return sum(metric.count for metric in llm.get_metrics() if metric.name == STEPS)


def measure(llm, prompts: list[dict], part: dict[str, Any], max_tokens: int) -> dict[str, Any]:
    """The prompts ``part["prompts"]`` (their numbers) together: token ids, seconds, engine steps."""
    from vllm import SamplingParams

    # A salt of its own: a table that drafts from earlier answers must not have these.
    inputs = [prompts[i] | {"cache_salt": part["salt"]} for i in part["prompts"]]
    params = [SamplingParams(temperature=part["temperature"], max_tokens=max_tokens, seed=i) for i in part["prompts"]]
    before, start = engine_steps(llm), time.perf_counter()
    outputs = llm.generate(inputs, params, use_tqdm=False)
    seconds = time.perf_counter() - start
    token_ids = [list(output.outputs[0].token_ids) for output in outputs]
    return {"token_ids": token_ids, "seconds": seconds, "steps": engine_steps(llm) - before}


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    llm = LLM(**job["engine"])
    tokenizer = llm.get_tokenizer()
    chats = ([{"role": "user", "content": text}] for text in job["prompts"])
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    prompts = [{"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts]
    # What is compiled or packed at first use is not timed.
    warm_up = [prompt | {"cache_salt": "warm up"} for prompt in prompts[:2]]
    llm.generate(warm_up, SamplingParams(temperature=1.0, max_tokens=8, seed=0), use_tqdm=False)
    with Path(sys.argv[2]).open("w") as out:
        print(json.dumps({}), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(measure(llm, prompts, json.loads(line), job["max_tokens"])), file=out, flush=True)


if __name__ == "__main__":
    main()
