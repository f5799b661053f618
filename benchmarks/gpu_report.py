# SPDX-License-Identifier: Apache-2.0
"""Everything there is to know about a GPU, in one command and one page: tests first, then numbers.

    python benchmarks/gpu_report.py                          # on a machine with a GPU
    python benchmarks/gpu_report.py --device cpu --small     # that the command works; says nothing about a GPU

Each step runs in a process of its own under a time limit, the cheapest and most telling first; a step that fails does
not stop the others. What passed is not run again for the same commit, so an interrupted report goes on. Steps that need
vLLM are left out where it is missing.
"""

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import report
import torch

PASSED = "passed"
TAIL = 15
# What needs no GPU, or more of one than a report is worth.
NOT_ON_A_GPU = (
    "test_compile",
    "test_planted_defects",
    "test_interpreter_bf16",
    "test_far_addresses",
    "test_num_splits",
)


@dataclass(frozen=True)
class Step:
    """A command, what it shows when it passes, and the package it cannot do without."""

    name: str
    shows: str
    command: list[str]
    needs: str = "triton"


def pytest_command(*arguments: str) -> list[str]:
    """One process: every engine claims its GPU memory."""
    return [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", *arguments]


def benchmark(name: str, *arguments: str) -> list[str]:
    return [sys.executable, str(Path(__file__).with_name(name)), *arguments]


def gpu_steps(output: Path) -> list[Step]:
    ignored = [f"--ignore=tests/kernels/{name}.py" for name in NOT_ON_A_GPU]
    device = torch.cuda.get_device_name().replace(" ", "-")
    kernels, engine = (f"{output / kind}-{device}" for kind in ("kernels", "engine"))
    modes = ("eager", "graphs", "compiled")
    identity = [
        Step(
            f"identity, {mode}",
            "text of plain decoding",
            pytest_command("tests/engine/test_cuda.py", "-k", mode),
            "vllm",
        )
        for mode in modes
    ]
    shapes = ("--batch", "1", "8", "32", "--context", "1024", "8192", "--rows", "1", "17", "33")
    loads = ("--concurrency", "1", "8", "32", "--context", "1024")
    return [
        Step("kernels", "each kernel equals its torch twin", pytest_command("tests/kernels", *ignored)),
        Step("kernel times", "ms and bandwidth", benchmark("bench_kernels.py", *shapes, "--output", kernels)),
        *identity[:2],
        Step("drafter's graph", "no host sync", pytest_command("tests/engine/test_cuda_graphs.py"), "vllm"),
        Step("engine times", "ms a step", benchmark("bench_engine.py", *loads, "--output", engine), "vllm"),
        identity[2],
        Step("request mix", "every feature", pytest_command("tests/engine/test_identity.py"), "vllm"),
    ]


def small_steps(output: Path) -> list[Step]:
    """The same kinds of step in seconds, without a GPU."""
    small = ("--device", "cpu", "--small", "--output")
    times = benchmark("bench_kernels.py", "--kernels", "tree_walk", *small, str(output / "kernels-cpu-small"))
    engine = benchmark("bench_engine.py", *small, str(output / "engine-cpu-small"))
    return [
        Step("kernels", "each kernel equals its torch twin", pytest_command("tests/kernels/test_tree_walk.py")),
        Step("kernel times", "parity; no times", times),
        Step("engine times", "ms a step", engine, "vllm"),
    ]


def run(step: Step, log: Path, limit: float) -> dict:
    """Run a step: its result, seconds, and the last lines of its log."""
    if importlib.util.find_spec(step.needs) is None:
        return {"result": f"not run: {step.needs} is not installed", "seconds": None, "tail": []}
    start = time.monotonic()
    path = os.pathsep.join(filter(None, (str(report.ROOT), os.environ.get("PYTHONPATH"))))
    with log.open("w+") as out:
        command = {"cwd": report.ROOT, "env": os.environ | {"PYTHONPATH": path}, "stdout": out, "stderr": out}
        try:
            status = subprocess.run(step.command, timeout=limit, **command).returncode
            result = PASSED if status == 0 else f"failed, exit status {status}"
        except subprocess.TimeoutExpired:
            result = f"stopped after {limit:.0f} s"
        out.seek(0)
        lines = [line for line in out.read().splitlines() if line.strip()]
    return {"result": result, "seconds": round(time.monotonic() - start, 1), "tail": lines[-TAIL:]}


def write(output: Path, conditions: dict, steps: list[Step], done: dict[str, dict]) -> None:
    """The page and the JSON of what is done so far."""
    rows, notes = [], []
    for step in steps:
        found = done.get(step.name, {"result": "not run yet", "seconds": None, "tail": []})
        last = found["tail"][-1] if found["tail"] else None
        rows.append({"step": step.name, "shows": step.shows, "result": found["result"], "seconds": found["seconds"]})
        rows[-1]["last line"] = last and last.strip("= ").replace("|", "/")
        if found["result"] != PASSED and found["tail"]:
            notes.append("\n".join([f"{step.name}: {found['result']}", "", "```", *found["tail"], "```"]))
    report.write(output / "gpu_report", "GPU report", conditions, rows, notes)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="needed for --device cpu")
    parser.add_argument("--only", nargs="+", help="names of steps")
    parser.add_argument("--again", action="store_true", help="also what passed at this commit")
    parser.add_argument("--limit", type=float, default=480, help="seconds a step")
    parser.add_argument("--output", type=Path, default=report.RESULTS, help="directory")
    arguments = parser.parse_args(argv)
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no GPU that torch can use; --device cpu --small tries the command without one")
    if arguments.device == "cpu" and not arguments.small:
        parser.error("--device cpu needs --small: a report of a CPU would say nothing about a GPU")
    steps = small_steps(arguments.output) if arguments.small else gpu_steps(arguments.output)
    if unknown := set(arguments.only or []) - {step.name for step in steps}:
        parser.error(f"--only must name steps ({', '.join(step.name for step in steps)}), found {sorted(unknown)}")
    logs = arguments.output / "gpu_report_logs"
    logs.mkdir(parents=True, exist_ok=True)
    conditions = report.conditions(torch.device(arguments.device))
    state = logs / "done.json"
    done = json.loads(state.read_text()) if state.exists() else {}
    # Another commit or device: what was found is of something else.
    if done.get("of") != [conditions["commit"], conditions["device"]]:
        done = {"of": [conditions["commit"], conditions["device"]], "steps": {}}
    for step in steps:
        wanted = step.name in (arguments.only or [step.name])
        if not wanted or (done["steps"].get(step.name, {}).get("result") == PASSED and not arguments.again):
            continue
        found = run(step, logs / f"{step.name.replace(', ', '-').replace(' ', '-')}.log", arguments.limit)
        print(f"{step.name}: {found['result']}", flush=True)
        done["steps"][step.name] = found
        state.write_text(json.dumps(done, indent=1) + "\n")
        write(arguments.output, conditions, steps, done["steps"])
    print(f"wrote {arguments.output / 'gpu_report.md'}")
    return 0 if all(found["result"] == PASSED for found in done["steps"].values()) else 1


if __name__ == "__main__":
    sys.exit(main())
