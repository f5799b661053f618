# SPDX-License-Identifier: Apache-2.0
"""Time whole engine steps of vLLM with kvspec, without speculation, and with vLLM's own EAGLE-3 and DFlash.

    python benchmarks/bench_engine.py                        # Qwen3-8B's geometry in bf16 on a GPU, random weights
    python benchmarks/bench_engine.py --device cpu           # SmolLM2-135M's geometry in fp32
    python benchmarks/bench_engine.py --device cpu --small   # a tiny geometry in fp32; says nothing about speed

Heads are untrained, so acceptance is forced: every method accepts depth by depth with the same rates. What differs is
what a step costs and how many KV tokens fit. First, with real acceptance of an oracle's drafts, kvspec's greedy tokens
must equal those without speculation (in bf16: up to a near-tie); otherwise nothing is reported.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import IO, Any

import report
import torch
from dummy_models import TARGETS, write_models

HERE = Path(__file__).parent
# "native" is what vLLM serves with on CPU, Model Runner V1; "none" is Model Runner V2, on which kvspec runs.
METHODS = ("native", "none", "kvspec-tree", "kvspec-chain", "kvspec-auto", "eagle3", "dflash")
ON_GPU, ON_CPU = METHODS[1:], ("native", "none", "kvspec-tree", "kvspec-auto")
# A difference in log-probability below this is a near-tie; two batch shapes round differently.
NEAR_TIE = {"float32": 0.0, "bfloat16": 0.25, "float16": 0.05}
METHOD = (
    "(A real tree reaches a depth more often than a chain does.) verify: inputs, target forward and sampling; draft: "
    "the head; rest: scheduling and what runs beside them. Before, with real acceptance of an oracle's "
    "drafts, kvspec's greedy tokens were those of plain decoding."
)
PARITY = {"requests": 8, "context": 48, "tokens": 32}


def parse_arguments(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--methods", nargs="+", default=ON_GPU, choices=METHODS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="a tiny geometry, few steps; other flags still count")
    parser.add_argument("--target", default="qwen3-8b", choices=TARGETS)
    parser.add_argument("--dtype", default="bfloat16", choices=NEAR_TIE)
    parser.add_argument("--concurrency", nargs="+", type=int, default=[1, 2, 4, 8, 16, 32, 64, 128])
    parser.add_argument("--context", nargs="+", type=int, default=[1024, 8192, 32768])
    parser.add_argument("--nodes", type=int, default=16, help="num_speculative_tokens of kvspec-tree")
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=[0.8, 0.66, 0.54, 0.44, 0.36, 0.3, 0.24, 0.2],
        help="unconditional acceptance by depth; as many as chains and blocks are long",
    )
    parser.add_argument("--head-layers", type=int, default=1, help="layers of kvspec's head")
    parser.add_argument("--draft-vocab", type=int, help="tokens that kvspec's head scores; default all")
    parser.add_argument("--steps", type=int, default=50, help="decode steps to time per shape")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds per method")
    parser.add_argument("--engine", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--output", type=Path, help="without suffix; default benchmarks/results/engine-<device>")
    given = sys.argv if arguments is None else arguments
    if "cpu" in given:
        parser.set_defaults(target="smollm2-135m", dtype="float32", concurrency=[1, 4, 8], context=[256], nodes=8)
        parser.set_defaults(head_layers=2, draft_vocab=16384, methods=ON_CPU)
    if "--small" in given:
        parser.set_defaults(target="tiny", dtype="float32", concurrency=[2], context=[40], nodes=6, steps=10)
        parser.set_defaults(rates=[0.9, 0.6, 0.3], draft_vocab=None)
        parser.set_defaults(methods=("none", "kvspec-tree"))
    parsed = parser.parse_args(arguments)
    if parsed.device != "cpu" and "native" in parsed.methods:
        parser.error('--methods native is for --device cpu; on a GPU "none" is what vLLM serves with')
    return parsed


def speculative_config(method: str, arguments: argparse.Namespace, models: dict[str, str]) -> dict[str, Any] | None:
    """vLLM's speculative config of a method, with real acceptance."""
    if method in ("native", "none"):
        return None
    depth = len(arguments.rates)
    if method.startswith("kvspec"):
        shape = {"num_speculative_tokens": arguments.nodes}
        if method == "kvspec-chain":
            shape = {"num_speculative_tokens": depth, "tree": "chain"}
        budget = "auto" if method == "kvspec-auto" else "fixed"
        # Forced acceptance says nothing about grafts, so the head drafts alone.
        return {"method": "kvspec", "model": models["kvspec"], "budget": budget, "graft": False, **shape}
    return {"method": method, "model": models[method], "num_speculative_tokens": depth}


def engine_arguments(arguments: argparse.Namespace, models: dict[str, str], spec: dict | None) -> dict[str, Any]:
    """Arguments of ``vllm.LLM``: the same for every method."""
    rows = 1 + max(arguments.nodes, len(arguments.rates))
    most_tokens = (arguments.steps + 16) * (1 + len(arguments.rates))
    engine = {
        "model": models["target"],
        "load_format": "dummy",
        "skip_tokenizer_init": True,
        "dtype": arguments.dtype,
        "max_model_len": max(max(arguments.context), PARITY["context"] + PARITY["tokens"]) + most_tokens + 64,
        "max_num_seqs": max(*arguments.concurrency, PARITY["requests"]),
        # Every request's tree must fit into one step.
        "max_num_batched_tokens": max(8192, max(arguments.concurrency) * rows),
        "enable_prefix_caching": True,
        "disable_log_stats": True,
        "speculative_config": spec,
    }
    if arguments.device == "cpu":
        engine |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30, "block_size": 32}
    else:
        # Every batch of every method in a CUDA graph; vLLM's own list ends at 512 rows.
        lengths = (1, 1 + len(arguments.rates), 1 + arguments.nodes)
        sizes = sorted({batch * length for batch in arguments.concurrency for length in lengths})
        engine["compilation_config"] = {"cudagraph_capture_sizes": sizes}
    return engine | arguments.engine


def run(job: dict[str, Any], directory: Path, arguments: argparse.Namespace) -> tuple[list[dict], str | None]:
    """Rows of one worker process, and how it failed."""
    (directory / "job.json").write_text(json.dumps(job))
    out = directory / "out.jsonl"
    out.unlink(missing_ok=True)
    environment = worker_environment(arguments.device)
    problem = None
    with (directory / "log").open("w+") as log:
        command = [sys.executable, str(HERE / "engine_worker.py"), str(directory / "job.json"), str(out)]
        try:
            done = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=arguments.timeout)
            if done.returncode:
                problem = last_words(log, done.returncode)
        except subprocess.TimeoutExpired:
            problem = f"stopped after {arguments.timeout:.0f} s"
    rows = [json.loads(line) for line in out.read_text().splitlines()] if out.exists() else []
    return rows, problem


def last_words(log: IO[str], status: int) -> str:
    """How a worker process failed; what it said last goes to standard error."""
    log.seek(0)
    lines = [line for line in log.read().splitlines() if line.strip()]
    print("\n".join(lines[-30:]), file=sys.stderr)
    return f"exit status {status}: {lines[-1] if lines else ''}"


def worker_environment(device: str) -> dict[str, str]:
    """Of a worker process: its engine in the process itself, and on a CPU free to use its threads."""
    environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_NO_USAGE_STATS": "1"}
    environment |= {"HF_HUB_OFFLINE": "1", "VLLM_LOGGING_LEVEL": os.environ.get("VLLM_LOGGING_LEVEL", "WARNING")}
    return environment | ({"VLLM_CPU_OMP_THREADS_BIND": "nobind"} if device == "cpu" else {})


def equal_tokens(found: dict, expected: dict) -> int:
    """How many tokens two answers begin with in common."""
    pairs = zip(found["token_ids"], expected["token_ids"], strict=True)
    return next((i for i, (have, want) in enumerate(pairs) if have != want), len(expected["token_ids"]))


def parity_problem(found: list[dict], expected: list[dict], near_tie: float) -> str | None:
    """How kvspec's greedy tokens differ from plain decoding's, or None when they do not (near-ties aside)."""
    for number, (have, want) in enumerate(zip(found, expected, strict=True)):
        step = equal_tokens(have, want)
        if step == len(want["token_ids"]):
            continue
        token, wanted = have["token_ids"][step], want["token_ids"][step]
        logprobs = want["logprobs"][step]
        gap = logprobs[str(wanted)] - logprobs.get(str(token), float("-inf"))
        if not gap <= near_tie or near_tie == 0.0:
            return (
                f"request {number} differs first at token {step}: {token} instead of {wanted}, which is more likely by "
                f"{gap:.3f} in log-probability (near-ties: up to {near_tie})"
            )
    return None


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        (directory / "models").mkdir()
        models = write_models(
            directory / "models",
            arguments.target,
            arguments.dtype,
            len(arguments.rates),
            arguments.head_layers,
            arguments.draft_vocab,
        )
        rows = check_and_measure(arguments, models, directory)
    if rows is None:
        return 1
    add_speedup(rows)
    device = torch.device(arguments.device)
    tau = 1 + sum(arguments.rates)
    notes = [f"Forced acceptance by depth: {arguments.rates}, so tau {tau:.2f} is asked of every method. {METHOD}"]
    found = report.conditions(device, target=f"{arguments.target}, random weights", dtype=arguments.dtype)
    found |= {"nodes": arguments.nodes, "head_layers": arguments.head_layers, "draft_vocab": arguments.draft_vocab}
    found |= {"engine": arguments.engine or None}
    output = arguments.output or report.RESULTS / f"engine-{found['device'].replace(' ', '-')}"
    report.write(output, "Engine steps", found, rows, notes)
    print(f"wrote {output}.json and {output}.md")
    return 0


def check_and_measure(arguments: argparse.Namespace, models: dict[str, str], directory: Path) -> list[dict] | None:
    """The rows of every method, or None when one that must decode as plain vLLM does not."""
    shapes = [[batch, context] for context in arguments.context for batch in arguments.concurrency]
    plain, problem = run(job(arguments, models, "none", {}, parity=PARITY, shapes=shapes), directory, arguments)
    if not plain:
        return refuse("none", problem)
    answers = plain.pop(0)["parity"]
    # Drafts from the known answers on random trees: long paths are accepted, with other branches beside them.
    (directory / "answers.json").write_text(json.dumps([one["prompt"] + one["token_ids"] for one in answers]))
    oracle = {"drafter": "oracle", "oracle_file": str(directory / "answers.json")}
    for method in (method for method in arguments.methods if method.startswith("kvspec")):
        found, wrong = run(job(arguments, models, method, oracle, parity=PARITY, shapes=[]), directory, arguments)
        wrong = wrong or parity_problem(found[0]["parity"], answers, NEAR_TIE[arguments.dtype])
        if wrong:
            return refuse(method, wrong)
        same = sum(equal_tokens(have, want) for have, want in zip(found[0]["parity"], answers, strict=True))
        print(f"parity: {method} ok, {same} tokens before the first near-ties", flush=True)
    rows = results("none", plain, problem)
    if "native" in arguments.methods:
        rows += results("native", *run(job(arguments, models, "native", {}, shapes=shapes), directory, arguments))
    for method in arguments.methods:
        if method not in ("native", "none"):
            forced = forced_acceptance(arguments, method)
            rows += results(method, *run(job(arguments, models, method, forced, shapes=shapes), directory, arguments))
    return rows


def job(arguments: argparse.Namespace, models: dict[str, str], method: str, more: dict[str, Any], **keys) -> dict:
    """What a worker process does; ``more`` are further keys of its speculative config."""
    spec = speculative_config(method, arguments, models)
    v2_on_cpu = arguments.device == "cpu" and method == "none"
    return {
        "engine": engine_arguments(arguments, models, spec and spec | more),
        "worker_cls": "vllm_kvspec.engine.cpu.worker.PlainV2CPUWorker" if v2_on_cpu else None,
        "vocab_size": TARGETS[arguments.target]["vocab_size"],
        "steps": arguments.steps,
        "tokens_per_step": 1 + (len(arguments.rates) if spec else 0),
        "parity": None,
        **keys,
    }


def forced_acceptance(arguments: argparse.Namespace, method: str) -> dict[str, Any]:
    """vLLM's keys; it wants one rate per draft token, kvspec takes them by depth."""
    missing = arguments.nodes - len(arguments.rates) if method in ("kvspec-tree", "kvspec-auto") else 0
    return {
        "rejection_sample_method": "synthetic",
        "synthetic_acceptance_rates": [*arguments.rates, *[0.0] * missing],
    }


def refuse(method: str, problem: str | None) -> None:
    print(f"error: {method} must decode as plain vLLM does before it is timed: {problem}", file=sys.stderr)


def results(method: str, found: list[dict], problem: str | None) -> list[dict[str, Any]]:
    """The rows of a method, printed as well; how it failed comes last."""
    rows = [{"method": method, **row} for row in (*found, *([{"not run": problem}] if problem else []))]
    for row in rows:
        print(json.dumps(row), flush=True)
    return rows


def add_speedup(rows: list[dict[str, Any]]) -> None:
    """Tokens per second relative to what vLLM serves with, at the same shape of the same run."""
    baseline = "native" if any(row["method"] == "native" for row in rows) else "none"
    plain = {(row.get("batch"), row.get("context")): row.get("tokens/s") for row in rows if row["method"] == baseline}
    for row in rows:
        base = plain.get((row.get("batch"), row.get("context")))
        if base and "tokens/s" in row:
            row["speed-up"] = row["tokens/s"] / base


if __name__ == "__main__":
    sys.exit(main())
