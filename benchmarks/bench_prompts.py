# SPDX-License-Identifier: Apache-2.0
"""Every method on the same prompts, with a real target and a real head: texts, accepted tokens, tokens per second.

    python benchmarks/bench_prompts.py --target TARGET --head HEAD --prompts prompts.jsonl

Engines run in processes of their own, on the prompts one at a time and several together: one after another, or with
``--interleave`` all in memory at once and in turn on every part of the prompts, so that whatever slows the machine down
slows all of them. Each text must be that of Model Runner V2 without speculation; how many are is in the table. Prompts:
Spec-Bench's form ({"category": ..., "turns": [...]}), of which the first turn is asked, the same number of each
category. Drafts from earlier answers find an empty table at every temperature, batch and round.
"""

import argparse
import contextlib
import itertools
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import report
import torch
from bench_engine import last_words, worker_environment

from vllm_kvspec.eval.statistics import ratio_and_error
from vllm_kvspec.eval.texts import Text, repeated_share

# On a CPU "native" is what vLLM serves with there, Model Runner V1 ("ngram" and "eagle3" as well); "none" is Model
# Runner V2, on which kvspec runs.
V1_ON_CPU = ("native", "ngram", "eagle3")
METHODS = (
    "native", "none", "ngram", "recycle", "recycle-auto", "chain", "8", "16", "32", "uncoupled", "auto", "graft",
    "graft-auto", "fly", "fly-4", "fly-2",
)  # fmt: skip
EXACT = tuple(method for method in METHODS if not method.startswith("fly"))
METHOD = (
    "ngram, eagle3: vLLM's, 5 tokens. recycle: kvspec without a head, 16 nodes, one table for all prompts. chain, 8, "
    "16, 32: the head alone. uncoupled: 16 nodes without the target's noise. graft: 16 nodes of head and recycle. "
    "auto, -auto: at most 16 nodes, as many as pay; graft-auto is what a server does by default. fly: graft with the "
    "lossy acceptance of docs/lossy.md, its window 6 nodes or the number named.\n\n"
    "tau: tokens per engine step of a request that is alone, after its prompt's; mean over prompts and its standard "
    "error. identical: texts equal to those without speculation (a difference can be a near-tie of logits that two "
    "batch shapes round differently). first difference: tokens before it, mean over the texts that differ. log-prob: "
    "of a token under the target, mean over texts and its standard error; high also where a text repeats itself, so "
    "repeated: the share of a text's tokens that end 4 which it had before. tokens/s: prompts and prefill included; "
    "the categories one after another, in each of them a new request for each that is done."
)


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", required=True)
    parser.add_argument("--head", required=True)
    parser.add_argument(
        "--eagle3", metavar="CHECKPOINT", help="also vLLM's own method, with what vllm-kvspec export wrote"
    )
    parser.add_argument("--prompts", type=Path, required=True)
    parser.add_argument("--methods", nargs="+", default=EXACT, choices=METHODS)
    parser.add_argument("--num-prompts", type=int, default=40)
    parser.add_argument("--max-tokens", type=int, default=128)
    parser.add_argument("--temperatures", nargs="+", type=float, default=[0.0, 0.7, 1.0])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8], help="requests at a time; 1 is needed for tau")
    parser.add_argument(
        "--log-probs", action="store_true", help="also each text's, under the target, and its repetition"
    )
    parser.add_argument("--rounds", type=int, default=1, help="of all prompts; the fastest counts")
    parser.add_argument("--interleave", action="store_true", help="all engines in memory, each part by all in turn")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--engine", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    parser.add_argument("--timeout", type=float, default=1800, help="seconds for an engine to start, and for a part")
    parser.add_argument("--output", type=Path, help="without suffix; default benchmarks/results/prompts-<device>")
    arguments = parser.parse_args(argv)
    arguments.device = "cuda" if torch.cuda.is_available() else "cpu"
    if arguments.device != "cpu" and "native" in arguments.methods:
        arguments.methods = [method for method in arguments.methods if method != "native"]
    if arguments.eagle3:
        arguments.methods = [*arguments.methods, "eagle3"]
    if "none" not in arguments.methods:
        parser.error('--methods must have "none": what every text is compared with')
    return arguments


def chosen_prompts(path: Path, count: int) -> list[dict[str, Any]]:
    """``count`` rows, taken in turn from every category."""
    groups: dict[str, list[dict]] = defaultdict(list)
    for line in path.read_text().splitlines():
        row = json.loads(line)
        groups[row["category"]].append({"category": row["category"], "text": row["turns"][0]})
    together = itertools.zip_longest(*groups.values())
    return [row for rows in together for row in rows if row][:count]


def speculative_config(method: str, head: str, eagle3: str | None = None) -> dict[str, Any] | None:
    """vLLM's speculative config of a method."""
    if method in ("native", "none"):
        return None
    if method == "ngram":
        return {"method": "ngram", "num_speculative_tokens": 5, "prompt_lookup_min": 2, "prompt_lookup_max": 5}
    if method == "eagle3":
        return {"method": "eagle3", "model": eagle3, "num_speculative_tokens": 5}
    kvspec = {"method": "kvspec", "num_speculative_tokens": 16, "budget": "auto" if "auto" in method else "fixed"}
    if not method.startswith("recycle"):
        # The head alone, unless the method says otherwise.
        kvspec |= {"model": head, "graft": method.startswith("graft")}
    if method == "chain":
        del kvspec["num_speculative_tokens"]
        return kvspec | {"tree": "chain"}
    if method == "uncoupled":
        return kvspec | {"draft_noise": "none"}
    if method.startswith("fly"):
        window = int(method.partition("-")[2] or 6)
        return kvspec | {"graft": True, "rejection_sample_method": "fly", "fly_window_size": window}
    return kvspec | ({"num_speculative_tokens": int(method)} if method.isdigit() else {})


def job(arguments: argparse.Namespace, method: str, prompts: list[dict]) -> dict[str, Any]:
    """What a worker process does (``prompt_worker.py``)."""
    engine = {
        "model": arguments.target,
        "dtype": arguments.dtype,
        "max_model_len": arguments.max_model_len,
        "max_num_seqs": max(arguments.batch),
        "disable_log_stats": False,
        "enable_prefix_caching": False,
        "speculative_config": speculative_config(method, arguments.head, arguments.eagle3),
    }
    if arguments.device == "cpu":
        engine |= {"enforce_eager": True, "kv_cache_memory_bytes": 1 << 30, "block_size": 32}
        if method == "none":
            engine["worker_cls"] = "vllm_kvspec.engine.cpu.worker.PlainV2CPUWorker"
    return {
        "engine": engine | arguments.engine,
        "prompts": [prompt["text"] for prompt in prompts],
        "max_tokens": arguments.max_tokens,
        "log_probs": arguments.log_probs,
    }


class Worker:
    """A method's engine in a process of its own. Raises RuntimeError when it ends or takes too long."""

    def __init__(self, settings: dict[str, Any], directory: Path, device: str, timeout: float):
        directory.mkdir()
        (directory / "job.json").write_text(json.dumps(settings))
        self.out, self.timeout, self.answers = directory / "out.jsonl", timeout, 0
        self.out.touch()
        self.log = (directory / "log").open("w+")
        script = Path(__file__).with_name("prompt_worker.py")
        self.process = subprocess.Popen(
            [sys.executable, str(script), str(directory / "job.json"), str(self.out)],
            env=worker_environment(device), stdin=subprocess.PIPE, stdout=self.log, stderr=self.log, text=True,
        )  # fmt: skip
        self._answer()

    def run(self, part: dict[str, Any]) -> dict[str, Any]:
        """What ``prompt_worker.measure`` says of ``part``."""
        print(json.dumps(part), file=self.process.stdin, flush=True)
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        self.answers += 1
        end = time.monotonic() + self.timeout
        # Whole lines only.
        while len(lines := self.out.read_text().split("\n")[:-1]) < self.answers:
            if self.process.poll() is not None:
                raise RuntimeError(last_words(self.log, self.process.returncode))
            if time.monotonic() > end:
                self.process.kill()
                raise RuntimeError(f"no answer in {self.timeout:.0f} s")
            time.sleep(0.01)
        return json.loads(lines[-1])

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(self.timeout)
        except subprocess.TimeoutExpired:
            self.process.kill()
        self.log.close()


def parts_of(prompts: list[dict], arguments: argparse.Namespace) -> list[dict[str, Any]]:
    """What is run, in order: for every temperature, batch and round the prompts one by one, or by category.

    With a prefix cache the rounds have one salt, so that the later ones find their prompts in it.
    """
    categories = [prompt["category"] for prompt in prompts]
    parts = []
    for temperature, batch, number in itertools.product(
        arguments.temperatures, arguments.batch, range(arguments.rounds)
    ):
        names = categories if batch > 1 else range(len(prompts))
        again = "" if arguments.engine.get("enable_prefix_caching") else f" round {number}"
        for name in dict.fromkeys(names):
            chosen = [i for i, of in enumerate(names) if of == name]
            part = {"temperature": temperature, "batch": batch, "round": number}
            parts.append(part | {"prompts": chosen, "salt": f"{temperature} {batch}{again}"})
    return parts


def measure(
    methods: list[str], parts: list[dict], prompts: list[dict], scratch: Path, arguments: argparse.Namespace
) -> dict[str, list[dict]]:
    """What each of ``methods`` answered to each of ``parts``, their engines in turn; nothing of one that failed."""
    answers: dict[str, list[dict]] = {method: [] for method in methods}
    with contextlib.ExitStack() as stack:
        workers: dict[str, Worker] = {}

        def attempt(method: str, work: Callable, *given: Any) -> Any:
            try:
                return work(*given)
            except RuntimeError as problem:
                print(f"error: {method}: {problem}", file=sys.stderr)
                workers.pop(method, None)
                answers[method] = []

        for method in methods:
            settings = job(arguments, method, prompts)
            if worker := attempt(method, Worker, settings, scratch / method, arguments.device, arguments.timeout):
                workers[method] = worker
                stack.callback(worker.close)
        for part in parts:
            for method, worker in list(workers.items()):
                if answer := attempt(method, worker.run, part):
                    answers[method].append(part | answer)
    return answers


def gathered(answers: list[dict], prompts: list[dict], rounds: int) -> list[dict[str, Any]]:
    """A method's answers by temperature and batch: token ids, tokens per step, the fastest seconds of each part."""
    groups: dict[tuple, list[dict]] = defaultdict(list)
    for answer in answers:
        groups[answer["temperature"], answer["batch"]].append(answer)
    found = []
    for (temperature, batch), group in groups.items():
        by_round = [[answer for answer in group if answer["round"] == number] for number in range(rounds)]
        token_ids: list[list[int]] = [[]] * len(prompts)
        log_probs: dict[int, float] = {}
        for answer in group:
            for i, ids in zip(answer["prompts"], answer["token_ids"], strict=True):
                token_ids[i] = ids
            log_probs |= zip(answer["prompts"], answer.get("log_probs", ()), strict=False)
        # The prompt's step gives one token.
        taus = [[(len(one["token_ids"][0]) - 1) / max(1, one["steps"] - 1) for one in round_] for round_ in by_round]
        seconds = zip(*([one["seconds"] for one in round_] for round_ in by_round), strict=True)
        found.append(
            {
                "temperature": temperature,
                "batch": batch,
                "token_ids": token_ids,
                "log_probs": list(log_probs.values()),
                "taus": taus[0] if batch == 1 else None,
                "taus_again": taus[-1] if batch == 1 and rounds > 1 else None,
                "cached_again": sum(one["cached"] for one in by_round[-1]) if rounds > 1 else None,
                "parts": [one["prompts"] for one in by_round[0]],
                "seconds": [min(times) for times in seconds],
            }
        )
    return found


def rows_of(method: str, found: list[dict], plain: list[dict]) -> list[dict[str, Any]]:
    """A table's rows of a method, one for each temperature and batch; ``plain``: what "none" found."""
    texts = {(one["temperature"], one["batch"]): one["token_ids"] for one in plain}
    rows = []
    for one in found:
        row = {"method": method, "T": one["temperature"], "batch": one["batch"], "tau": None, "standard error": None}
        if taus := one["taus"]:
            row |= {"tau": statistics.mean(taus), "standard error": statistics.stdev(taus) / len(taus) ** 0.5}
        if again := one["taus_again"]:
            row |= {"tau, last round": statistics.mean(again), "cached tokens, last round": one["cached_again"]}
        expected = texts.get((one["temperature"], one["batch"]))
        # Model Runner V1 draws other noise.
        comparable = one["temperature"] == 0 or torch.cuda.is_available() or method not in V1_ON_CPU
        if expected and method != "none" and comparable:
            pairs = list(zip(one["token_ids"], expected, strict=True))
            row["identical"] = f"{sum(have == want for have, want in pairs)} of {len(expected)}"
            if alike := [common_tokens(have, want) for have, want in pairs if have != want]:
                row["first difference"] = statistics.mean(alike)
        if means := one.get("log_probs"):
            row["log-prob"] = statistics.mean(means)
            row["its standard error"] = statistics.stdev(means) / len(means) ** 0.5
            row["repeated"] = statistics.mean(repeated_share(Text(ids, 0, 0), order=4) for ids in one["token_ids"])
        rows.append(row | {"tokens/s": sum(map(len, one["token_ids"])) / sum(one["seconds"])})
    return rows


def common_tokens(one: list[int], other: list[int]) -> int:
    """Tokens before the first difference."""
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))


def by_category(prompts: list[dict], values: list[float]) -> dict[str, list[float]]:
    """``values`` [prompts] of each category."""
    groups = defaultdict(list)
    for prompt, value in zip(prompts, values, strict=True):
        groups[prompt["category"]].append(value)
    return groups


def tau_by_category(found: dict[str, list[dict]], prompts: list[dict]) -> list[dict[str, Any]]:
    """One row per method and temperature: mean tau of each category's prompts."""
    return [
        {"method": method, "T": one["temperature"]}
        | {name: statistics.mean(values) for name, values in by_category(prompts, one["taus"]).items()}
        for method, results in found.items()
        for one in results
        if one["taus"]
    ]


def seconds_per_token(one: dict, prompts: list[dict]) -> dict[str, float]:
    """Of each category."""
    seconds, tokens = defaultdict(float), defaultdict(int)
    for part, spent in zip(one["parts"], one["seconds"], strict=True):
        category = prompts[part[0]]["category"]
        seconds[category] += spent
        tokens[category] += sum(len(one["token_ids"][i]) for i in part)
    return {category: seconds[category] / tokens[category] for category in seconds}


def speed_up(one: dict, base: dict) -> tuple[float, float]:
    """Tokens per second of ``one`` as a multiple of ``base``'s, and its standard error with the parts as the units."""

    def per_part(values: dict) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = [sum(len(values["token_ids"][i]) for i in part) for part in values["parts"]]
        return torch.tensor(tokens, dtype=torch.float64), torch.tensor(values["seconds"], dtype=torch.float64)

    (tokens, seconds), (base_tokens, base_seconds) = per_part(one), per_part(base)
    # The base's time for as many tokens.
    return ratio_and_error(base_seconds * tokens / base_tokens, seconds)


def speed_up_by_category(found: dict[str, list[dict]], prompts: list[dict], baseline: str) -> list[dict[str, Any]]:
    """One row per method, temperature and batch: tokens per second as a multiple of the ``baseline`` method's."""
    own = {(one["temperature"], one["batch"]): seconds_per_token(one, prompts) for one in found[baseline]}
    rows = []
    for method, results in found.items():
        for one in results:
            base = own.get((one["temperature"], one["batch"]))
            if method != baseline and base:
                spent = seconds_per_token(one, prompts)
                row = {"method": method, "T": one["temperature"], "batch": one["batch"]}
                rows.append(row | {name: base[name] / spent[name] for name in base})
    return rows


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    prompts = chosen_prompts(arguments.prompts, arguments.num_prompts)
    # First what the others are compared with.
    methods = sorted(arguments.methods, key=lambda method: method != "none")
    parts = parts_of(prompts, arguments)
    found: dict[str, list[dict]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for together in [methods] if arguments.interleave else [[method] for method in methods]:
            for method, answers in measure(together, parts, prompts, Path(scratch), arguments).items():
                found[method] = gathered(answers, prompts, arguments.rounds)
                for row in rows_of(method, found[method], found["none"]):
                    print(json.dumps(row), flush=True)
    baseline = "native" if found.get("native") else "none"
    base = {(one["temperature"], one["batch"]): one for one in found[baseline]}
    rows = []
    for method in arguments.methods:
        for one, row in zip(found[method], rows_of(method, found[method], found["none"]), strict=True):
            row["speed-up"], error = speed_up(one, base[one["temperature"], one["batch"]])
            rows.append(row | ({"its error": error} if arguments.interleave and method != baseline else {}))
    device = torch.device(arguments.device)
    conditions = report.conditions(device, dtype=arguments.dtype, prompts=len(prompts), max_tokens=arguments.max_tokens)
    notes = [METHOD]
    for title, found_rows in (
        ("Tau by category", tau_by_category(found, prompts)),
        (
            f"Tokens per second by category, as a multiple of {baseline}'s",
            speed_up_by_category(found, prompts, baseline),
        ),
    ):
        if found_rows:
            notes.append(f"\n{title}:\n\n{report.table(found_rows)}")
    output = arguments.output or report.RESULTS / f"prompts-{arguments.device}"
    report.write(output, "Every method on the same prompts", conditions, rows, notes)
    print(f"wrote {output}.json and {output}.md")
    return 0 if all(found.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
