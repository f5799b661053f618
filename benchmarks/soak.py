# SPDX-License-Identifier: Apache-2.0
"""Random traffic for minutes or hours: every token is compared with plain decoding's.

    make soak MINUTES=30                           # goes on with the record in benchmarks/results
    python benchmarks/soak.py --minutes 2 --seed 7 --output soak
    python benchmarks/soak.py --round 12           # this round of the seed once more, nothing recorded

A pool of requests is drawn from the seed, with every sampling parameter that meets speculation (``soak_requests.py``),
and answered once by plain decoding: Model Runner V2 without speculation, in a process of its own. What plain decoding
does not say twice is not compared. Then rounds, each a configuration drawn from the seed and the round's number, ask
for the same requests in other company: offline, in an engine that is stepped here (``soak_worker.py``: bursts, aborts,
the same step by step for a seed), and over HTTP (``soak_http.py``: streams, clients that leave, an engine killed in
mid-stream and its server started again). A difference is reported with its request, configuration, position and how
close plain decoding was to the other token. The record is written after every round, and a later call goes on with it.
"""

import argparse
import hashlib
import importlib.metadata
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import report
import soak_http
import torch
from demo import PLAIN_CPU_WORKER, serve_command
from soak_requests import MAX_MODEL_LEN, WARM_REQUESTS

HERE = Path(__file__).parent
TINY = report.ROOT / "examples" / "tiny"
WORKER = [sys.executable, str(HERE / "soak_worker.py")]
TEXTS = ("examples/prompts.jsonl", "kernels/reference.py")
ON_CPU = not torch.cuda.is_available()
# The least that holds one request of the full context with its tree: requests push each other out.
TINY_POOL_TOKENS = 352
# Beyond this a difference is a fault; closer, plain decoding on other kernels could have said either.
NEAR_TIE = 1e-4
# What an engine may grow between the first third of its time and the end.
MAX_GROWTH_MIB = 48
# A process may take as long again and this: for its start, whose first one on a CPU compiles, and what is under way.
EXTRA_S = 600
FIXED_ENGINE = {
    "dtype": "float32",
    "max_model_len": MAX_MODEL_LEN,
    "enforce_eager": True,
    "kv_cache_memory_bytes": 64 << 20,
    "disable_log_stats": False,
}
STEP_COSTS = {
    "steps": {n: [[1, 0.004 + 0.0001 * n], [8, 0.005 + 0.0006 * n], [16, 0.006 + 0.0015 * n]] for n in range(17)},
    "context": dict.fromkeys(range(17), 0.0),
}


@dataclass(frozen=True)
class Round:
    """A configuration: what ``number`` and the seed stand for."""

    number: int
    http: bool
    drafter: str
    speculative: dict[str, Any]
    engine: dict[str, Any]
    seed: int

    def options(self) -> str:
        drawn = {**self.speculative, **self.engine}
        fixed = {*FIXED_ENGINE, "method", "model"}
        return ", ".join(f"{key}={value}" for key, value in drawn.items() if key not in fixed)


def draw_round(arguments: argparse.Namespace, number: int) -> Round:
    """Drafters in turn, every third round over HTTP, the rest at random."""
    rng = random.Random(f"round {arguments.seed} {number}")
    head = {"model": str(arguments.head)}
    drafters = {
        "head": head,
        "no head": {"recycle_scope": rng.choice(("salt", "request"))},
        "chain": {**head, "tree": "chain"},
        "graft": {**head, "graft": True},
        "fixed tree": {**head, "tree": [3, 1, 1]},
    }
    name = list(drafters)[number % len(drafters)]
    nodes = {"chain": 6, "fixed tree": 9}.get(name) or rng.choice((4, 8, 16))
    speculative = {"method": "kvspec", "num_speculative_tokens": nodes, **drafters[name]}
    speculative["budget"] = rng.choice(("auto", "fixed"))
    speculative["draft_noise"] = rng.choice(("coupled", "coupled", "none"))
    block = rng.choice((16, 32))
    engine = {**FIXED_ENGINE, "model": str(arguments.target), "block_size": block}
    engine["max_num_seqs"] = rng.choice((3, 8, 16))
    engine["enable_prefix_caching"] = rng.random() < 0.75
    if rng.random() < 0.5:
        engine["num_gpu_blocks_override"] = TINY_POOL_TOKENS // block
    if rng.random() < 0.3:
        engine["max_num_batched_tokens"] = 48
    engine["async_scheduling"] = rng.random() < 0.5
    return Round(number, number % 3 == 2, name, speculative, engine, rng.randrange(2**31))


def run_worker(job: dict[str, Any], work: Path, timeout: float) -> dict[str, Any]:
    """``soak_worker.py`` on a job. Raises RuntimeError with the end of its log."""
    (work / "job.json").write_text(json.dumps(job))
    out = work / "out.json"
    out.unlink(missing_ok=True)
    with (work / "log").open("w+") as log:
        environment = {**os.environ, "VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
        command = [*WORKER, str(work / "job.json"), str(out)]
        try:
            status = subprocess.run(command, env=environment, stdout=log, stderr=log, timeout=timeout).returncode
        except subprocess.TimeoutExpired:
            status = f"stopped after {timeout:.0f} s"
        log.seek(0)
        if status != 0:
            raise RuntimeError(f"{job['task']}: {status}\n" + "\n".join(log.read().splitlines()[-30:]))
    return json.loads(out.read_text())


def plain_engine(arguments: argparse.Namespace, **others: Any) -> dict[str, Any]:
    worker = {"worker_cls": PLAIN_CPU_WORKER, "block_size": 32} if ON_CPU else {}
    return {**FIXED_ENGINE, "model": str(arguments.target), "max_num_seqs": 16, **worker, **others}


def answers_file(arguments: argparse.Namespace) -> Path:
    """Of this target on this vLLM: what plain decoding has said so far."""
    digest = hashlib.sha256(json.dumps([*map(importlib.metadata.version, ("vllm", "torch")), ON_CPU]).encode())
    for path in sorted(arguments.target.glob("*.safetensors")):
        with path.open("rb") as weights:
            digest.update(hashlib.file_digest(weights, "sha256").digest())
    return arguments.work / f"plain-{digest.hexdigest()[:12]}.jsonl"


def make_pool(arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """The requests with plain decoding's answers, which are kept; also in ``pool.json`` for the workers."""
    text = "\n".join((report.ROOT / name).read_text() for name in TEXTS)
    job = {"task": "pool", "engine": plain_engine(arguments), "answers": str(answers_file(arguments)), "text": text}
    job |= {"seed": arguments.seed, "requests": arguments.requests}
    pool = run_worker(job, arguments.work, EXTRA_S + 2 * arguments.requests)
    (arguments.work / "pool.json").write_text(json.dumps(pool))
    return pool


def run_round(arguments: argparse.Namespace, one: Round, pool: list[dict]) -> list[dict[str, Any]]:
    """What each life of an engine found: one offline, two over HTTP."""
    seconds, requests = arguments.round_seconds, arguments.round_requests
    if one.http:
        return soak_http.http_lives(http_command(one), pool, one.seed, seconds, requests)
    speculative = dict(one.speculative)
    if speculative["budget"] == "auto":
        # Not timed: the same choices again for the same seed.
        costs = arguments.work / "costs.json"
        costs.write_text(json.dumps(STEP_COSTS))
        speculative["budget_costs"] = str(costs)
    job = {"task": "traffic", "engine": {**one.engine, "speculative_config": speculative}, "seed": one.seed}
    job |= {"pool": str(arguments.work / "pool.json"), "seconds": seconds, "round_requests": requests}
    return [run_worker(job, arguments.work, 2 * seconds + EXTRA_S)]


def http_command(one: Round) -> list[str]:
    """``vllm serve`` with the round's flags."""
    flags = ["--speculative-config", json.dumps(one.speculative)]
    for key, value in one.engine.items():
        if key in ("model", "disable_log_stats"):
            continue
        name = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags += [f"--{name}", str(value)]
    command = serve_command(one.engine["model"], *flags)
    return [*WORKER, *command[1:]] if one.engine["async_scheduling"] and ON_CPU else command


def look_closer(arguments: argparse.Namespace, one: Round, differences: list[dict]) -> None:
    """Add to each difference its round, and to another token how close plain decoding was to it."""
    tokens = [difference for difference in differences if difference["what"] == "token"]
    job = {"task": "gaps", "engine": plain_engine(arguments, logprobs_mode="processed_logprobs"), "cases": tokens}
    for difference, gap in zip(tokens, run_worker(job, arguments.work, EXTRA_S)["gaps"] if tokens else (), strict=True):
        difference |= gap
    for difference in differences:
        difference |= {"round": one.number, "drafter": one.drafter, "options": one.options()}


def is_near_tie(difference: dict[str, Any]) -> bool:
    return abs(difference.get("gap", float("inf"))) < NEAR_TIE


def row_of(one: Round, lives: list[dict], seconds: float) -> dict[str, Any]:
    """A round's line of the record."""
    counts: Counter[str] = Counter()
    for life in lives:
        counts.update({key: value for key, value in life.items() if isinstance(value, int)})
        counts.update(life["metrics"])
    differences = [difference for life in lives for difference in life["differences"]]
    near_ties = sum(map(is_near_tie, differences))
    problems = [problem for life in lives for problem in life.get("problems", ())]
    if counts["blocks_lost"]:
        problems.append(f"{counts['blocks_lost']} KV blocks were lost")
    # Of lives that were long enough to be warm.
    grown = max((end - warm for warm, end in (life["rss"] for life in lives) if warm), default=0) / 2**20
    if grown > MAX_GROWTH_MIB:
        problems.append(f"the engine grew by {grown:.0f} MiB")
    drafts = counts["vllm:spec_decode_num_drafts"]
    return {
        "round": one.number,
        "served": "HTTP" if one.http else "offline",
        "drafter": one.drafter,
        "requests": counts["requests"],
        "tokens": counts["tokens"],
        "not compared": counts["not_compared"],
        "differences": counts["differing"] - near_ties,
        "near-ties": near_ties,
        "aborts": counts["aborted"],
        "disconnects": counts["disconnected"],
        "preemptions": int(counts["vllm:num_preemptions"]),
        "cached tokens": int(counts["vllm:prefix_cache_hits"]),
        "tau": 1 + counts["vllm:spec_decode_num_accepted_tokens"] / drafts if drafts else None,
        "kills": counts["kills"],
        "clients told": counts["told"],
        "restarts": len(lives) - 1,
        "MiB": max(life["rss"][1] for life in lives) / 2**20,
        "MiB grown": grown if any(life["rss"][0] for life in lives) else None,
        "seconds": seconds,
        "problem": "; ".join(problems) or None,
        "options": one.options(),
        "commit": report.commit(),
    }


SUMMED = ("requests", "tokens", "not compared", "differences", "near-ties", "aborts", "disconnects", "preemptions")
SUMMED += ("cached tokens", "kills", "clients told", "restarts")
HOW_TO_READ = (
    "tokens: compared, one by one, with plain decoding of the same request; not compared: of requests without a seed, "
    "and of those that plain decoding itself answers in two ways. Aborted and disconnected requests count as far as "
    f"they came. near-ties: other tokens that plain decoding preferred by less than {NEAR_TIE} in log-probability and "
    "noise. tau: tokens per step with a draft. kills: of the engine's process, under clients in mid-stream; clients "
    "told: requests that ended in an error then, as they must; restarts: of its server. MiB: resident memory of the "
    f"engine's processes at the end of its traffic. MiB grown, at most {MAX_GROWTH_MIB}: since the first third of it, "
    f"where that was {WARM_REQUESTS} requests or more."
)


class Record:
    """``output``.json and .md, which a later call goes on with, and where something differed
    ``output``-differences.json."""

    def __init__(self, output: Path, settings: dict[str, Any]):
        """Raises ValueError where the record is of other settings."""
        self.output, self.settings = output, settings
        self.details = output.with_name(f"{output.name}-differences.json")
        self.rows: list[dict[str, Any]] = []
        if (path := output.with_name(f"{output.name}.json")).exists():
            record = json.loads(path.read_text())
            self.rows = record["rows"]
            found = {key: record["conditions"].get(key) for key in settings}
            if found != settings:
                raise ValueError(
                    f"{path} must be of {settings} to be gone on with, found {found}; name another --output."
                )

    @property
    def next_round(self) -> int:
        return 1 + max((row["round"] for row in self.rows), default=-1)

    def add(self, row: dict[str, Any], differences: list[dict]) -> None:
        self.rows.append(row)
        if differences:
            known = json.loads(self.details.read_text()) if self.details.exists() else []
            self.details.write_text(json.dumps(known + differences, indent=1) + "\n")
        total = {key: sum(row[key] for row in self.rows) for key in SUMMED}
        failed = sum(bool(row["problem"]) for row in self.rows)
        notes = [f"All {len(self.rows)} rounds: " + ", ".join(f"{total[key]} {key}" for key in SUMMED) + "."]
        notes += [f"Rounds with a problem: {failed}.", "", HOW_TO_READ]
        conditions = report.conditions(torch.device("cpu" if ON_CPU else "cuda"), **self.settings)
        report.write(self.output, "Soak", conditions, self.rows, notes)
        print(notes[0], flush=True)


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=10, help="after which no new round begins")
    parser.add_argument("--rounds", type=int, default=10**6, help="at most so many in this call")
    parser.add_argument("--round", type=int, help="only this one, not recorded")
    parser.add_argument("--seed", type=int, default=0, help="of requests and rounds")
    parser.add_argument("--requests", type=int, default=1500, help="of the pool, second turns not counted")
    parser.add_argument("--round-seconds", type=float, default=90, help="of traffic")
    parser.add_argument("--round-requests", type=int, default=10**6, help="after which a round's traffic ends, too")
    parser.add_argument("--target", type=Path, default=TINY / "target")
    parser.add_argument("--head", type=Path, default=TINY / "draft")
    parser.add_argument("--output", type=Path, help="without suffix; default benchmarks/results/soak-<device>")
    parser.add_argument("--work", type=Path, default=report.ROOT / ".soak", help="plain answers and logs")
    arguments = parser.parse_args(argv)
    arguments.output = arguments.output or report.RESULTS / f"soak-{'cpu' if ON_CPU else 'cuda'}"
    return arguments


def set_environment() -> None:
    """For every process that is started here."""
    os.environ.update(VLLM_NO_USAGE_STATS="1", HF_HUB_OFFLINE="1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    # oneDNN keeps code for a thousand shapes, one for each number of rows: an engine, plain decoding's too, grows by
    # 300 MiB over its first two thousand requests. Without that, what grows is a leak.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "0")
    if ON_CPU:
        # The models are tiny: threads cost more than they give.
        os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", OMP_NUM_THREADS="1")


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    set_environment()
    arguments.work.mkdir(parents=True, exist_ok=True)
    if single := arguments.round is not None:
        record, rounds = None, [arguments.round]
    else:
        settings = {"seed": arguments.seed, "requests": arguments.requests, "target": arguments.target.name}
        try:
            record = Record(arguments.output, settings)
        except ValueError as error:
            sys.exit(str(error))
        rounds = range(record.next_round, record.next_round + arguments.rounds)
        print(f"seed {arguments.seed}, {len(record.rows)} rounds so far", flush=True)
    print(f"plain decoding first, where it is not known yet: {arguments.work / 'log'}", flush=True)
    pool = make_pool(arguments)
    deadline, failed = time.monotonic() + 60 * arguments.minutes, False
    for number in rounds:
        if time.monotonic() > deadline:
            break
        one, start = draw_round(arguments, number), time.monotonic()
        print(f"round {number}: {'HTTP' if one.http else 'offline'}, {one.drafter}, {one.options()}", flush=True)
        try:
            lives = run_round(arguments, one, pool)
        except RuntimeError as error:
            print(error, file=sys.stderr)
            lives = [{"differences": [], "metrics": {}, "rss": [0, 0], "problems": [str(error).splitlines()[0]]}]
        differences = [difference for life in lives for difference in life["differences"]]
        look_closer(arguments, one, differences)
        row = row_of(one, lives, time.monotonic() - start)
        failed |= bool(row["differences"] or row["problem"])
        for difference in differences:
            # The request itself is in the file.
            print(f"DIFFERENCE { ({key: difference[key] for key in difference if key not in ('request', 'options')}) }")
        if row["problem"]:
            print(f"PROBLEM {row['problem']}")
        if single:
            print(json.dumps({**row, "details": differences}, indent=1))
        else:
            record.add(row, differences)
    return int(failed)


if __name__ == "__main__":
    # So that what this process has started ends with it.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped; the rounds before this one are in the record"))
    sys.exit(main())
