# SPDX-License-Identifier: Apache-2.0
"""The engines of ``soak.py`` that live in a process of their own: ``soak_worker.py job.json out.json``.

Tasks of a job: ``pool`` (the requests, and what plain decoding says to each), ``traffic`` (a configuration under random
traffic), ``gaps`` (how close plain decoding was to another token). ``soak_worker.py serve ...`` is ``vllm serve`` with
asynchronous scheduling, which vLLM turns off on a CPU.
"""

import contextlib
import json
import random
import sys
import time
from collections import Counter, deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch
from soak_requests import (
    WARM_REQUESTS,
    Tally,
    draw_requests,
    first_difference,
    is_repeatable,
    join,
    key_of,
    sample_of,
    second_turns,
)
from tqdm import tqdm

CHUNK = 256
# Requests at once, drawn anew every so many steps; above the engine's own limit they wait.
LEVELS, STEPS_PER_LEVEL = (1, 2, 4, 8, 16, 24), 40
ABORTED, AGAIN = 0.06, 0.8
STUCK_STEPS = 3000


def sampling_params(params: dict[str, Any], **others):
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    params = {**params, **others}
    # JSON makes strings of the token ids.
    if bias := params.get("logit_bias"):
        params["logit_bias"] = {int(token): value for token, value in bias.items()}
    for key, kind in (
        ("structured_outputs", StructuredOutputsParams),
        ("repetition_detection", RepetitionDetectionParams),
    ):
        if key in params:
            params[key] = kind(**params[key])
    return SamplingParams(**params)


def engine_prompt(request: dict[str, Any]) -> dict[str, Any]:
    salt = {"cache_salt": request["salt"]} if request["salt"] else {}
    return {"prompt_token_ids": request["prompt"], **salt}


def make_llm(job: dict[str, Any]):
    if job["engine"].get("async_scheduling") and not torch.cuda.is_available():
        force_async_scheduling()
    from vllm import LLM

    return LLM(**job["engine"])


def force_async_scheduling() -> None:
    """vLLM turns it off on a CPU, where it works all the same. Before the engine is configured."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    original = platform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config):
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    platform.check_and_update_config = classmethod(check_and_update_config)


class Plain:
    """Plain decoding's answers, from a file or else from an engine, which is built when it is needed."""

    def __init__(self, job: dict[str, Any]):
        self.job, self.path, self.llm = job, Path(job["answers"]), None
        self.known: dict[str, dict] = {}
        for line in self.path.read_text().splitlines() if self.path.exists() else ():
            # An interruption may have cut a line.
            with contextlib.suppress(json.JSONDecodeError):
                row = json.loads(line)
                self.known[row["key"]] = row

    def answers(self, requests: list[dict]) -> list[dict]:
        """``{"answer", "repeats"}`` of each: what plain decoding says, and whether it says the same in other company,
        with the prompt cached."""
        missing = [request for request in requests if key_of(request) not in self.known]
        chunks = [missing[i : i + CHUNK] for i in range(0, len(missing), CHUNK)]
        for chunk in tqdm(chunks, desc="plain decoding", unit=f" x {CHUNK} requests", disable=not chunks):
            rows = self._ask_twice(chunk)
            with self.path.open("a") as out:
                # Begins on a line of its own, whatever an interruption left.
                out.write("".join(f"\n{json.dumps(row)}" for row in rows))
            self.known |= {row["key"]: row for row in rows}
        return [self.known[key_of(request)] for request in requests]

    def _ask_twice(self, chunk: list[dict]) -> list[dict]:
        order = random.Random(0).sample(range(len(chunk)), len(chunk))
        first = self._ask(chunk, len(chunk))
        again = dict(zip(order, self._ask([chunk[i] for i in order], 5), strict=True))
        rows = []
        for i, (request, answer) in enumerate(zip(chunk, first, strict=True)):
            differences = [first_difference(b, a, True) for a, b in zip(answer, again[i], strict=True)]
            repeats = is_repeatable(request) and not any(differences)
            rows.append({"key": key_of(request), "answer": answer, "repeats": repeats})
        return rows

    def _ask(self, requests: list[dict], at_once: int) -> list[list[dict]]:
        self.llm = self.llm or make_llm(self.job)
        parts = (requests[i : i + at_once] for i in range(0, len(requests), at_once))
        return [
            [sample_of(sample) for sample in output.outputs]
            for part in parts
            for output in self.llm.generate(
                [engine_prompt(request) for request in part],
                [sampling_params(request["params"]) for request in part],
                use_tqdm=False,
            )
        ]


def pool(job: dict[str, Any]) -> list[dict[str, Any]]:
    """First turns, then second ones, as ``soak_requests.Tally`` has them."""
    from transformers import AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(job["engine"]["model"])(job["text"], verbose=False)["input_ids"]
    plain, seed = Plain(job), job["seed"]
    firsts = draw_requests(seed, job["requests"], tokens)
    answers = plain.answers(firsts)
    turns = second_turns(seed, firsts, [one["answer"] for one in answers], tokens)
    answers += plain.answers([turn for _, turn in turns])
    following = {first: len(firsts) + i for i, (first, _) in enumerate(turns)}
    requests = firsts + [turn for _, turn in turns]
    return [
        {
            "request": request,
            "answer": one["answer"],
            "repeats": one["repeats"],
            "first": number < len(firsts),
            "next": following.get(number),
        }
        for number, (request, one) in enumerate(zip(requests, answers, strict=True))
    ]


@dataclass
class Live:
    """A request on its way: its place in the pool, the tokens after which it is aborted, and what came so far."""

    number: int
    abort_after: int | None
    samples: dict[int, dict[str, Any]] = field(default_factory=dict)

    def take(self, output) -> None:
        """Pieces of a stream, or the whole answer at once."""
        for piece in output.outputs:
            join(self.samples, piece.index, sample_of(piece))

    def tokens(self) -> int:
        return sum(len(sample["token_ids"]) for sample in self.samples.values())


class Traffic:
    """Requests of the pool in random order and changing number, some of them aborted: the same ones, step by step, for
    the same seed."""

    def __init__(self, llm, pool: list[dict[str, Any]], seed: int):
        self.llm, self.engine, self.pool = llm, llm.llm_engine, pool
        self.tally = Tally(pool)
        self.counts = self.tally.counts
        self.rng = random.Random(seed)
        self.queue: deque[int] = deque()
        self.live: dict[str, Live] = {}
        self.level, self.steps, self.last_output = 1, 0, 0

    def run(self, seconds: float, requests: int) -> dict[str, Any]:
        """For so many seconds or requests, whichever is over first."""
        begin, warm = time.monotonic(), 0
        while (done := max((time.monotonic() - begin) / seconds, self.counts["requests"] / requests)) < 1 or self.live:
            if done < 1:
                self.arrive()
            if done > 1 / 3 and self.counts["requests"] > WARM_REQUESTS and not warm:
                warm = psutil.Process().memory_info().rss
            for output in self.engine.step():
                self.receive(output)
            self.steps += 1
            if self.live and self.steps - self.last_output > STUCK_STEPS:
                raise RuntimeError(f"no output in {STUCK_STEPS} steps for requests {list(self.live)}")
        return {
            **self.counts,
            "differences": self.tally.differences,
            "rss": [warm, psutil.Process().memory_info().rss],
            "metrics": counters(self.llm),
            "blocks_lost": self.blocks_lost(),
        }

    def arrive(self) -> None:
        if self.steps % STEPS_PER_LEVEL == 0:
            self.level = self.rng.choice(LEVELS)
        while len(self.live) < self.level:
            if not self.queue:
                first = [number for number, one in enumerate(self.pool) if one["first"]]
                self.queue.extend(self.rng.sample(first, len(first)))
            self.add(self.queue.popleft())

    def add(self, number: int) -> None:
        from vllm.sampling_params import RequestOutputKind

        abort_after = self.rng.randrange(30) if self.rng.random() < ABORTED else None
        stream = abort_after is not None or self.rng.random() < 0.5
        kind = RequestOutputKind.DELTA if stream else RequestOutputKind.FINAL_ONLY
        name, request = str(self.counts["requests"]), self.pool[number]["request"]
        self.engine.add_request(name, engine_prompt(request), sampling_params(request["params"], output_kind=kind))
        self.counts["requests"] += 1
        self.live[name] = Live(number, abort_after)
        if abort_after == 0:
            self.abort(name)

    def abort(self, name: str) -> None:
        self.engine.abort_request([name])
        self.counts["aborted"] += 1
        live = self.live.pop(name)
        self.tally.compare(live.number, live.samples, whole=False)

    def receive(self, output) -> None:
        self.last_output = self.steps
        live = self.live.get(output.request_id)
        if live is None:
            # The last words of an aborted request.
            return
        live.take(output)
        if output.finished:
            del self.live[output.request_id]
            self.tally.compare(live.number, live.samples, whole=True)
            follower = self.pool[live.number]["next"]
            if follower is not None and self.rng.random() < AGAIN:
                self.queue.appendleft(follower)
        elif live.abort_after is not None and live.tokens() >= live.abort_after:
            self.abort(output.request_id)

    def blocks_lost(self) -> int:
        """KV blocks that nobody has and that are not free either."""
        # What asynchronous scheduling has sent ahead comes back.
        for _ in range(3):
            self.engine.step()
        pool = self.engine.engine_core.engine_core.scheduler.kv_cache_manager.block_pool
        # One block is never given out.
        return pool.num_gpu_blocks - 1 - pool.get_num_free_blocks()


def counters(llm) -> dict[str, float]:
    """vLLM's counters by name, summed over their labels."""
    found: Counter[str] = Counter()
    for metric in llm.get_metrics():
        found[metric.name] += getattr(metric, "value", 0)
    return found


def traffic(job: dict[str, Any]) -> dict:
    llm = make_llm(job)
    return Traffic(llm, json.loads(Path(job["pool"]).read_text()), job["seed"]).run(
        job["seconds"], job["round_requests"]
    )


def gaps(job: dict[str, Any]) -> dict:
    """For each ``{"request", "sample", "position", "found", "expected"}`` (two tokens): by how much plain decoding
    prefers the second, in processed log-probability plus the noise it draws with; infinite where it excludes the first.
    """
    from vllm_kvspec.kernels.reference import gumbel_noise_at

    llm, result = make_llm(job), []
    for case in job["cases"]:
        request, position = case["request"], case["position"]
        params = {key: value for key, value in request["params"].items() if key != "n"}
        tokens = [case["found"], case["expected"]]
        params |= {"max_tokens": position + 1, "logprob_token_ids": tokens, "logprobs": 2}
        params["min_tokens"] = min(params["min_tokens"], position + 1)
        if "seed" in params:
            # A request of several samples gives each its own.
            params["seed"] += case["sample"]
        (output,) = llm.generate([engine_prompt(request)], [sampling_params(params)], use_tqdm=False)
        logprobs = [output.outputs[0].logprobs[position][token].logprob for token in tokens]
        noise = torch.zeros(2)
        if params["temperature"] > 0:
            place = torch.tensor([[len(request["prompt"]) + position - 1]])
            keys = torch.tensor([params["seed"]]), torch.ones(1), place, torch.zeros(1, dtype=torch.int64)
            noise = gumbel_noise_at(*keys, torch.tensor(tokens))[0, 0]
        gap = logprobs[1] - logprobs[0] + float(noise[1] - noise[0])
        result.append({"logprobs": logprobs, "noise": noise.tolist(), "gap": gap})
    return {"gaps": result}


def main() -> None:
    if sys.argv[1] == "serve":
        force_async_scheduling()
        from vllm.entrypoints.cli.main import main as vllm_main

        vllm_main()
        return
    job = json.loads(Path(sys.argv[1]).read_text())
    task = {"pool": pool, "traffic": traffic, "gaps": gaps}[job["task"]]
    Path(sys.argv[2]).write_text(json.dumps(task(job)))


if __name__ == "__main__":
    main()
