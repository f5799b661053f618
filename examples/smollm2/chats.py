# SPDX-License-Identifier: Apache-2.0
"""Write chats to train a head on: ``python examples/smollm2/chats.py chats.jsonl --count 6000``.

The questions are put together from the lists in ``chat_lists.toml``, the same ones for the same seed; all are
different. The answers are left empty: the target writes them (``vllm-kvspec prepare``). None of it comes from the
prompts that heads are measured on (``prompts.py``).
"""

import argparse
import json
import random
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path

LISTS = tomllib.loads(Path(__file__).with_name("chat_lists.toml").read_text())


def pick(rng: random.Random, text: str) -> str:
    """One entry of a list written with semicolons."""
    return " ".join(rng.choice(text.split(";")).split())


def explain(rng: random.Random) -> str:
    field = rng.choice(sorted(LISTS["topics"]))
    return rng.choice(LISTS["explain"]).format(t=pick(rng, LISTS["topics"][field]))


def compare(rng: random.Random) -> str:
    return rng.choice(LISTS["compare"]).format(p=pick(rng, LISTS["pairs"]))


def how_to(rng: random.Random) -> str:
    return rng.choice(LISTS["how_to"]).format(t=pick(rng, LISTS["tasks"]))


def write(rng: random.Random) -> str:
    form, subject, tone = pick(rng, LISTS["forms"]), pick(rng, LISTS["subjects"]), pick(rng, LISTS["tones"])
    request = rng.choice(("Write {} about {}{}.", "Please write {} about {}{}.", "I need {} about {}{}. Can you help?"))
    return request.format(form, subject, f", {tone}" if tone else "")


def code(rng: random.Random) -> str:
    if rng.random() < 0.25:
        signature, docstring = rng.choice(LISTS["functions"])
        function = f'def {signature}:\n    """{docstring}"""'
        return rng.choice(LISTS["complete"]).format(f=function)
    return rng.choice(LISTS["code"]).format(l=pick(rng, LISTS["languages"]), t=pick(rng, LISTS["code_tasks"]))


def maths(rng: random.Random) -> str:
    numbers = {"a": rng.randint(20, 400), "b": rng.randint(20, 400), "c": rng.randint(3, 20), "d": rng.randint(2, 12)}
    numbers |= {"e": rng.randint(4, 60), "p": rng.choice((5, 10, 20, 25, 40, 75))}
    return rng.choice(LISTS["maths"]).format(n=pick(rng, LISTS["names"]), **numbers)


def paragraph(rng: random.Random) -> str:
    text, request = rng.choice(LISTS["paragraphs"]), rng.choice(LISTS["on_paragraph"])
    return f"{request}\n\n{text}" if rng.random() < 0.7 else f"{text}\n\n{request}"


def list_of(rng: random.Random) -> str:
    return rng.choice(LISTS["lists"]).format(k=rng.choice((3, 5, 7, 10)), i=pick(rng, LISTS["ideas"]))


def role_play(rng: random.Random) -> str:
    role, situation = pick(rng, LISTS["roles"]), rng.choice(LISTS["situations"])
    return rng.choice(("You are {}. {}", "Answer as {} would. {}", "Let us play a game: you are {}. {}")).format(
        role, situation
    )


def question(rng: random.Random) -> str:
    ending = rng.choice(("", "", " Answer in one sentence.", " Please explain.", " Give me a long answer."))
    return pick(rng, LISTS["questions"]) + ending


def review(rng: random.Random) -> str:
    return rng.choice(LISTS["on_review"]).format(r=rng.choice(LISTS["reviews"]))


def tool_call(rng: random.Random) -> str:
    chosen = rng.sample(LISTS["tools"], rng.randint(1, 4))
    names = {
        "name": pick(rng, LISTS["names"]),
        "num": rng.randint(2, 90),
        "place": pick(rng, LISTS["topics"]["places"]),
    }
    names["day"] = f"2026-{rng.randint(1, 12):02}-{rng.randint(1, 28):02}"
    request = rng.choice(rng.choice(chosen)["requests"]).format(**names)
    tools = "\n".join(json.dumps(_described(tool)) for tool in chosen)
    return rng.choice(LISTS["tool_prompt"]).replace("{tools}", tools).replace("{q}", request)


def _described(tool: dict) -> dict:
    """A tool as OpenAI's function schema."""
    properties = {key: {"type": kind, "description": meaning} for key, kind, meaning in tool["parameters"]}
    schema = {"type": "object", "properties": properties, "required": list(properties)}
    return {"name": tool["name"], "description": tool["description"], "parameters": schema}


# Kinds of questions and their share.
KINDS: dict[Callable[[random.Random], str], int] = {
    explain: 20, compare: 8, how_to: 14, write: 18, code: 14, maths: 8, paragraph: 8, list_of: 4, role_play: 4,
    question: 3, review: 2, tool_call: 7,
}  # fmt: skip
MULTI_TURN_SHARE = 0.12


def chats(count: int, seed: int = 0) -> Iterator[list[str]]:
    """``count`` different chats, each a list of what the user says turn by turn.

    Raises ValueError when the lists do not give that many.
    """
    rng = random.Random(seed)
    seen: set[str] = set()
    for _ in range(50 * count):
        if len(seen) == count:
            return
        first = rng.choices(list(KINDS), KINDS.values())[0](rng)
        follow_ups = rng.sample(LISTS["follow_ups"], rng.randint(1, 2)) if rng.random() < MULTI_TURN_SHARE else []
        if first not in seen:
            seen.add(first)
            yield [first, *follow_ups]
    if len(seen) < count:
        raise ValueError(f"The lists must give {count} different chats, found {len(seen)}; ask for fewer.")


def as_row(turns: list[str]) -> dict:
    """A chat in the form that ``vllm-kvspec prepare`` reads; the empty answers mark where the target speaks."""
    messages = []
    for turn in turns:
        messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": ""}]
    return {"messages": messages}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="jsonl to write")
    parser.add_argument("--count", type=int, default=6000, help="chats")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = [json.dumps(as_row(turns)) for turns in chats(args.count, args.seed)]
    args.output.write_text("".join(row + "\n" for row in rows))
    print(f"{args.output}: {len(rows)} chats.")


if __name__ == "__main__":
    main()
