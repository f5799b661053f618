# SPDX-License-Identifier: Apache-2.0
"""Train and measure the heads of ``recipes.yaml``, seed by seed, each in a process of its own; what is done is skipped.

    python examples/study/run.py --target_model TARGET --data_path rows.jsonl --held_out held_out.jsonl \
        --output_dir study --seeds 0 1

Each head goes to OUTPUT_DIR/NAME/seed-S with its ``training.json`` and its report, which ``vllm-kvspec compare`` reads.
Several of these may run side by side with ``--part I/N``.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import yaml

HERE = Path(__file__).parent


def flags(settings: dict) -> list[str]:
    """Settings as command line flags of ``vllm-kvspec train``."""
    return [
        word
        for key, value in settings.items()
        for word in (f"--{key}", json.dumps(value) if isinstance(value, dict) else str(value))
    ]


def kvspec(command: str, *words: str) -> None:
    """Run ``vllm-kvspec COMMAND``; raises CalledProcessError when it fails."""
    print("vllm-kvspec", command, *words, flush=True)
    subprocess.run([sys.executable, "-m", "vllm_kvspec.cli", command, *words], check=True)


def train(args: argparse.Namespace, settings: dict, seed: int, directory: Path) -> None:
    """Train one head unless its directory has one."""
    if (directory / "training.json").exists():
        return
    where = ["--target_model", args.target_model, "--data_path", *args.data_path, "--output_dir", str(directory)]
    kvspec("train", *where, "--seed", str(seed), *flags(settings))


def evaluate(args: argparse.Namespace, name: str, directory: Path) -> None:
    """Measure one head unless it has been."""
    report = directory / args.report
    if report.exists():
        return
    where = ["--target_model", args.target_model, "--draft_model", str(directory), "--data_path", *args.held_out]
    kvspec("eval", *where, "--no_graft", "--name", name, "--output", str(report), *args.eval_flags)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target_model", required=True)
    parser.add_argument("--data_path", nargs="+", required=True, help="training rows, from `vllm-kvspec prepare`")
    parser.add_argument("--held_out", nargs="+", required=True, help="texts to cut the prompts of the evaluation from")
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--recipes", type=Path, default=HERE / "recipes.yaml")
    parser.add_argument("--only", nargs="+", help="names of recipes; default: all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--part", default="0/1", help="I/N: every N-th run from the I-th, to share the work")
    parser.add_argument("--steps", nargs="+", choices=["train", "eval"], default=["train", "eval"])
    parser.add_argument("--report", default="eval.json", help="name of each head's report")
    parser.add_argument("--eval_flags", nargs=argparse.REMAINDER, default=[], help="the rest goes to `eval`")
    args = parser.parse_args()
    recipes = yaml.safe_load(args.recipes.read_text())
    if unknown := set(args.only or []) - set(recipes["recipes"]):
        parser.error(f"--only must name recipes of {args.recipes}; unknown: {', '.join(sorted(unknown))}")
    runs = [(seed, name) for seed in args.seeds for name in args.only or recipes["recipes"]]
    index, count = map(int, args.part.split("/"))
    for seed, name in runs[index::count]:
        directory = args.output_dir / name / f"seed-{seed}"
        if "train" in args.steps:
            train(args, recipes["common"] | recipes["recipes"][name], seed, directory)
        if "eval" in args.steps:
            evaluate(args, name, directory)


if __name__ == "__main__":
    main()
