# SPDX-License-Identifier: Apache-2.0
"""``soak.py`` over HTTP: ``vllm serve``, the ``openai`` client, clients that leave, and an engine that is killed."""

import asyncio
import contextlib
import random
import sys
import time
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import psutil
from prometheus_client.parser import text_string_to_metric_families
from soak_requests import WARM_REQUESTS, Tally, join

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
from demo import Server  # noqa: E402

CLIENTS = 12
LEAVE, STREAM, AGAIN = 0.08, 0.7, 0.8
# Seconds in which every client must be told of an engine's death, and its server must have ended.
PATIENCE_S = 60
# The second where a connection breaks.
ERRORS = (openai.APIError, httpx.HTTPError)


class Clients:
    """Clients that ask for requests of the pool, one after another; some leave before the end."""

    def __init__(self, server: Server, pool: list[dict[str, Any]], seed: int):
        self.server, self.pool, self.rng = server, pool, random.Random(seed)
        self.client = openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="unused", timeout=120, max_retries=0)
        self.tally = Tally(pool)
        self.counts = self.tally.counts
        self.problems: list[str] = []
        self.firsts = self._firsts()
        self.closing = self.killed = False
        self.in_mid_stream = 0

    def _firsts(self) -> Iterator[int]:
        numbers = [number for number, one in enumerate(self.pool) if one["first"] and "offline" not in one["request"]]
        while True:
            yield from self.rng.sample(numbers, len(numbers))

    async def ask_on(self) -> None:
        """One client's life."""
        number = None
        while not self.closing:
            if number is None or "offline" in self.pool[number]["request"]:
                number = next(self.firsts)
            try:
                whole = await self.ask(number)
            except ERRORS as error:
                # What the death of the engine must come as.
                self.counts["told"] += self.killed
                if not self.killed:
                    self.problems.append(f"request {number}: {type(error).__name__}: {error}")
                return
            number = self.pool[number]["next"] if whole and self.rng.random() < AGAIN else None
            if self.rng.random() < 0.2:
                await asyncio.sleep(self.rng.expovariate(5))

    async def ask(self, number: int) -> bool:
        """Ask for one request and compare; whether the whole answer came."""
        one, samples = self.pool[number], {}
        request = one["request"]
        # vLLM's server gives those in one piece only.
        stream = self.rng.random() < STREAM and "prompt_logprobs" not in request["params"]
        leaves = self.rng.random() < LEAVE
        after = self.rng.randrange(1, 30)
        body = {**request["params"], "return_token_ids": True}
        if request["salt"]:
            body["cache_salt"] = request["salt"]
        self.counts["requests"] += 1
        asked = self.client.completions.create(model="target", prompt=request["prompt"], stream=stream, extra_body=body)
        try:
            if stream:
                whole = await self._read(await asked, samples, after if leaves else None)
            else:
                whole = await self._wait(asked, samples, after / 100 if leaves else None)
        except ERRORS:
            self.tally.compare(number, samples, whole=False)
            raise
        self.counts["disconnected"] += not whole
        if whole and not (samples and all(sample["finish_reason"] for sample in samples.values())):
            self.problems.append(f"request {number}: the answer ended without an error and without a finish_reason")
            whole = False
        self.tally.compare(number, samples, whole)
        return whole

    async def _read(self, answer: openai.AsyncStream, samples: dict, leave_after: int | None) -> bool:
        """Whether the whole stream came; with ``leave_after`` the connection is closed after so many tokens."""
        try:
            async for piece in answer:
                self.in_mid_stream += not samples
                take(samples, piece)
                if leave_after and sum(len(sample["token_ids"]) for sample in samples.values()) >= leave_after:
                    return False
            return True
        finally:
            self.in_mid_stream -= bool(samples)
            await answer.close()

    async def _wait(self, asked, samples: dict, leave_after: float | None) -> bool:
        """The same for an answer in one piece, in seconds."""
        try:
            take(samples, await asyncio.wait_for(asked, leave_after))
            return True
        except TimeoutError:
            return False

    async def run(self, seconds: float, requests: int, kill: bool) -> dict[str, Any]:
        """Traffic for so many seconds or requests, whichever is over first; then the engine is killed in mid-stream, or
        all answers are waited for."""
        engine, begin, warm = engine_process(self.server), time.monotonic(), 0
        tasks = [asyncio.create_task(self.ask_on()) for _ in range(CLIENTS)]
        while (done := max((time.monotonic() - begin) / seconds, self.counts["requests"] / requests)) < 1:
            if done > 1 / 3 and self.counts["requests"] > WARM_REQUESTS and not warm:
                warm = self._resident(engine)
            await asyncio.sleep(0.1)
        result = {"rss": [warm, self._resident(engine)], "metrics": metrics(self.server)}
        if kill:
            await self._kill(engine)
        self.closing = True
        _, hanging = await asyncio.wait(tasks, timeout=PATIENCE_S)
        if hanging:
            self.problems.append(f"{len(hanging)} clients still waited {PATIENCE_S} s later")
        for task in hanging:
            task.cancel()
        self.problems += [f"{error!r}" for task in tasks if not task.cancelled() and (error := task.exception())]
        await self.client.close()
        if kill:
            if not self.counts["told"]:
                self.problems.append("no client got an error when the engine was killed")
            await asyncio.to_thread(self._wait_for_end)
        else:
            await asyncio.to_thread(self._wait_for_rest)
        return {**result, **self.counts, "differences": self.tally.differences, "problems": self.problems}

    def _resident(self, engine: psutil.Process) -> int:
        """Of the engine with its workers."""
        try:
            return sum(process.memory_info().rss for process in (engine, *engine.children(recursive=True)))
        except psutil.NoSuchProcess:
            self.problems.append("the engine's process has ended by itself")
            return 0

    async def _kill(self, engine: psutil.Process) -> None:
        """As soon as somebody is reading a stream."""
        deadline = time.monotonic() + PATIENCE_S
        while not self.in_mid_stream and time.monotonic() < deadline:
            await asyncio.sleep(0.01)
        self.killed = True
        self.counts["kills"] += 1
        with contextlib.suppress(psutil.NoSuchProcess):
            engine.kill()

    def _wait_for_end(self) -> None:
        deadline = time.monotonic() + PATIENCE_S
        while self.server.process.poll() is None:
            if time.monotonic() > deadline:
                self.problems.append(f"the server still ran {PATIENCE_S} s after its engine was killed")
                return
            time.sleep(0.1)

    def _wait_for_rest(self) -> None:
        """Nothing runs, waits or holds KV blocks when all clients are gone."""
        names = ("vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:kv_cache_usage_perc")
        deadline = time.monotonic() + PATIENCE_S
        while True:
            # They are counted in steps, and without requests there are none.
            self.server.client.completions.create(model="target", prompt=[1], max_tokens=1)
            found = metrics(self.server)
            if not any(found[name] for name in names):
                return
            if time.monotonic() > deadline:
                self.problems.append(f"{PATIENCE_S} s after the last client left: { {n: found[n] for n in names} }")
                return
            time.sleep(0.5)


def take(samples: dict[int, dict], answer) -> None:
    """Add a completion, or a piece of one. Log-probabilities have another form here and are not compared."""
    for choice in answer.choices:
        piece = {"token_ids": list(getattr(choice, "token_ids", None) or []), "text": choice.text, "logprobs": None}
        join(samples, choice.index, {**piece, "finish_reason": choice.finish_reason})


def engine_process(server: Server) -> psutil.Process:
    """Of a server with one engine."""
    processes = psutil.Process(server.process.pid).children(recursive=True)
    (engine,) = (process for process in processes if "EngineCore" in " ".join(process.cmdline()))
    return engine


def metrics(server: Server) -> Counter:
    """Values of /metrics by name, summed over their labels."""
    with urllib.request.urlopen(f"{server.url}/metrics", timeout=30) as response:
        page = response.read().decode()
    found: Counter[str] = Counter()
    for family in text_string_to_metric_families(page):
        for sample in family.samples:
            found[sample.name.removesuffix("_total")] += sample.value
    return found


def http_lives(command: list[str], pool: list[dict], seed: int, seconds: float, requests: int) -> list[dict[str, Any]]:
    """Two lives of a server: the first ends by the death of its engine, the second when all clients are gone. Raises
    RuntimeError with the end of its log where one could not be begun or spoken to."""
    lives = []
    for number, kill in enumerate((True, False)):
        with Server(command) as server:
            try:
                clients = Clients(server, pool, seed + number)
                lives.append(asyncio.run(clients.run(seconds / 2, requests // 2, kill)))
            except OSError as error:
                raise RuntimeError(f"the server is gone: {error}\n{server.log_tail()}") from error
            if lives[-1]["problems"]:
                print(server.log_tail(), file=sys.stderr)
    return lives
