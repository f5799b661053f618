# SPDX-License-Identifier: Apache-2.0
"""Serve a target with and without speculation, send the servers the same requests, and compare.

    make demo           # the bundled pair
    make demo-chat      # SmolLM2-135M-Instruct and the questions of examples/smollm2
    python examples/demo.py --num-speculative-tokens 32 --max-tokens 96

Every text (and every token id) must be identical, at temperature 0 and at 0.8 with seeds; the exit status is 1 when
one is not. What speculation saved is read from vLLM's own /metrics. Then the requests of temperature 0 are sent again
for their times. Prints tables and writes ``demo.json``.

Steps are counted with ``budget`` "fixed", which verifies a whole tree in every step, so that counts repeat. A server
does "auto" by default, and gets times of its own ("kvspec auto").

Without a GPU vLLM's own engine ("native") is the older V1 runner, whose sampling draws other noise: there texts must
equal those of Model Runner V2 without speculation ("plain"), and native's at temperature 0. On a GPU plain is vLLM's
own. The first start on a CPU compiles kernels for some 15 seconds; they are cached.
"""

import argparse
import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

EXAMPLES = Path(__file__).resolve().parent
# An engine step of the tiny target takes milliseconds, one of a large target on a CPU a second.
REQUEST_TIMEOUT_S = 300
STOP_TIMEOUT_S = 20
# What Model Runner V2 without speculation is on a CPU.
PLAIN_CPU_WORKER = "vllm_kvspec.engine.cpu.worker.PlainV2CPUWorker"
CPU_KV_BYTES = 1 << 28
CONCURRENCIES = (1, 4)
DRAFTS = "vllm:spec_decode_num_drafts_total"
DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
ACCEPTED_AT_DEPTH = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
GENERATED = "vllm:generation_tokens_total"
# A histogram with one observation per engine step.
ENGINE_STEPS = "vllm:iteration_tokens_total_count"


@dataclass(frozen=True)
class Request:
    """One line of the prompts (see ``load_requests``) with its sampling settings."""

    source: str
    prompt: str | None
    messages: list[dict] | None
    stream: bool
    temperature: float
    seed: int

    @property
    def kind(self) -> str:
        return "chat" if self.messages else "completion"


@dataclass
class Reply:
    text: str
    token_ids: list[int]
    seconds: float
    # Metric name -> how much it grew; per-depth counts under (ACCEPTED_AT_DEPTH, depth).
    metrics: Counter = field(default_factory=Counter)


def has_gpu() -> bool:
    """Whether ``nvidia-smi`` lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    return subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True).stdout.startswith("GPU")


def server_environment(*models: str) -> dict[str, str]:
    """This process's environment for a server of ``models``."""
    environment = {"VLLM_NO_USAGE_STATS": "1", **os.environ}
    if all(Path(model).is_dir() for model in models):
        environment.setdefault("HF_HUB_OFFLINE", "1")
    return environment


def serve_command(target: str, *flags: str) -> list[str]:
    """Small and exact: float32 makes the servers' logits agree far below any gap between tokens."""
    command = [str(Path(sys.executable).with_name("vllm")), "serve", target, "--served-model-name", "target"]
    command += ["--host", "127.0.0.1", "--dtype", "float32", "--max-model-len", "512", "--max-num-seqs", "8"]
    if not has_gpu():
        # Without it vLLM claims KV room for most of the machine's memory, for each server.
        command += ["--enforce-eager", "--kv-cache-memory-bytes", str(CPU_KV_BYTES)]
    return [*command, *flags]


class Server:
    """A ``vllm serve`` command in its own process group on a free loopback port, for a ``with`` block."""

    def __init__(self, command: list[str], models: Sequence[str] = (), timeout_s: float = 600):
        """``--port`` is appended to ``command``; ``models`` are the directories or repositories it loads.

        ``timeout_s``: seconds until /health must answer, else RuntimeError with the end of the server's log.
        """
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"
        self.timeout_s = timeout_s
        self.models = models
        self.command = [*command, "--port", str(port)]

    def __enter__(self) -> "Server":
        self.log = tempfile.NamedTemporaryFile(mode="w+", prefix="vllm-serve-", suffix=".log")  # noqa: SIM115
        self.process = subprocess.Popen(
            self.command,
            stdin=subprocess.DEVNULL,
            stdout=self.log,
            stderr=subprocess.STDOUT,
            env=server_environment(*self.models),
            start_new_session=True,
        )
        try:
            self._wait_until_healthy()
        except BaseException:
            self.stop()
            raise
        self.client = OpenAI(base_url=f"{self.url}/v1", api_key="unused", timeout=REQUEST_TIMEOUT_S, max_retries=0)
        return self

    def __exit__(self, *exception) -> None:
        self.client.close()
        self.stop()

    def _wait_until_healthy(self) -> None:
        deadline = time.monotonic() + self.timeout_s
        while time.monotonic() < deadline:
            if self.process.poll() is not None:
                raise RuntimeError(f"the server stopped with status {self.process.returncode}:\n{self.log_tail()}")
            try:
                with urllib.request.urlopen(f"{self.url}/health", timeout=5):
                    return
            except (urllib.error.URLError, OSError):
                time.sleep(0.25)
        raise RuntimeError(f"the server did not answer /health within {self.timeout_s:.0f} s:\n{self.log_tail()}")

    def log_tail(self, lines: int = 40) -> str:
        return "\n".join(Path(self.log.name).read_text(errors="replace").splitlines()[-lines:])

    def alive(self) -> bool:
        """Whether any process of the server's group is left."""
        # Reaps the server itself, which would otherwise count as left.
        self.process.poll()
        try:
            os.killpg(self.process.pid, 0)
        except ProcessLookupError:
            return False
        return True

    def stop(self) -> None:
        """End the server and its engine processes, politely and then by force."""
        for kind in (signal.SIGTERM, signal.SIGKILL):
            if self.alive():
                os.killpg(self.process.pid, kind)
            deadline = time.monotonic() + STOP_TIMEOUT_S
            while self.alive() and time.monotonic() < deadline:
                time.sleep(0.1)
        self.log.close()

    def metrics(self) -> Counter:
        """The counters named above; per-depth ones under the key (name, depth), depth from 1."""
        with urllib.request.urlopen(f"{self.url}/metrics", timeout=30) as response:
            return parse_metrics(response.read().decode())

    def ask(self, request: Request, max_tokens: int) -> Reply:
        """Send one request alone; its metrics are complete when /metrics has counted all its tokens."""
        before, start = self.metrics(), time.perf_counter()
        text, token_ids = send(self.client, request, max_tokens)
        seconds = time.perf_counter() - start
        deadline = time.monotonic() + 10
        while True:
            delta = self.metrics()
            delta.subtract(before)
            if delta[GENERATED] >= len(token_ids) or time.monotonic() > deadline:
                return Reply(text, token_ids, seconds, delta)
            time.sleep(0.05)

    def tokens_per_second(self, requests: list[Request], max_tokens: int, concurrency: int, salt: str) -> float:
        """Of answers in one piece, ``concurrency`` at a time, with nothing kept from requests of another ``salt``."""
        whole = [replace(request, stream=False) for request in requests]
        start = time.perf_counter()
        with ThreadPoolExecutor(concurrency) as pool:
            answers = list(pool.map(lambda request: send(self.client, request, max_tokens, salt), whole))
        return sum(len(token_ids) for _, token_ids in answers) / (time.perf_counter() - start)


def parse_metrics(page: str) -> Counter:
    """Prometheus text -> counts, summed over engines."""
    totals: Counter = Counter()
    for name, labels, value in re.findall(r"^(vllm:\w+)(?:\{(.*?)\})? ([-+.\w]+)$", page, re.MULTILINE):
        if name == ACCEPTED_AT_DEPTH:
            position = re.search(r'position="(\d+)"', labels)
            totals[name, int(position[1]) + 1] += int(float(value))
        elif name in (DRAFTS, DRAFT_TOKENS, ACCEPTED, GENERATED, ENGINE_STEPS):
            totals[name] += int(float(value))
    return totals


def send(client: OpenAI, request: Request, max_tokens: int, salt: str = "answers") -> tuple[str, list[int]]:
    """(text, token ids) of the answer through the OpenAI client; streamed pieces are joined."""
    arguments = {
        "model": "target",
        "max_tokens": max_tokens,
        "temperature": request.temperature,
        "seed": request.seed,
        "stream": request.stream,
        # vLLM's extensions: the ids that the text was decoded from; who shares a prefix cache, and earlier answers.
        "extra_body": {"return_token_ids": True, "cache_salt": salt},
    }
    if request.messages:
        answer = client.chat.completions.create(messages=request.messages, **arguments)
    else:
        answer = client.completions.create(prompt=request.prompt, **arguments)
    text, token_ids = "", []
    for piece in answer if request.stream else [answer]:
        for choice in piece.choices:
            if request.messages:
                text += (choice.delta if request.stream else choice.message).content or ""
            else:
                text += choice.text
            token_ids += getattr(choice, "token_ids", None) or []
    return text, token_ids


def load_requests(path: Path, count: int) -> list[Request]:
    """``count`` requests; streaming and temperature 0.8 on different rhythms.

    Lines with ``prompt`` (a completion), ``messages`` (a chat) or, as in Spec-Bench, ``turns`` (a chat of the first),
    taken in turn from every kind and category.
    """
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    groups: dict[tuple, list[dict]] = {}
    for row in rows:
        groups.setdefault(("prompt" in row, row.get("category")), []).append(row)
    # Completions first, where there are any.
    groups = dict(sorted(groups.items(), key=lambda group: not group[0][0]))
    ordered = [row for together in zip_longest(*groups.values()) for row in together if row]
    return [
        Request(
            source=row.get("source") or row["category"],
            prompt=row.get("prompt"),
            messages=row.get("messages") or ("turns" in row and [{"role": "user", "content": row["turns"][0]}]) or None,
            stream=i // 2 % 2 == 1,
            temperature=0.8 if i // 4 % 2 == 1 else 0.0,
            seed=1000 + i,
        )
        for i, row in enumerate(ordered[:count])
    ]


def engines(args) -> dict[str, list[str]]:
    """Name -> flags of each server: the method, what its texts must equal, and others that are timed beside them."""

    def speculative(**keys) -> list[str]:
        return ["--speculative-config", json.dumps(speculative_config(args) | keys)]

    if args.method != "kvspec":
        return {args.method: speculative(), "plain": []}
    found = {"kvspec": speculative(), "plain": [], "kvspec auto": speculative(budget="auto")}
    if not has_gpu():
        found |= {"plain": ["--worker-cls", PLAIN_CPU_WORKER], "native": []}
    return found


@dataclass
class Outcome:
    """What one server answered to each request (nothing where it was not asked), and its tokens/s in every round."""

    replies: list[Reply | None] = field(default_factory=list)
    speeds: dict[int, list[float]] = field(default_factory=lambda: {n: [] for n in CONCURRENCIES})

    def speed(self, concurrency: int) -> float:
        """The fastest round's: other work on the machine only slows."""
        return max(self.speeds[concurrency])


def run(flags: dict[str, list[str]], requests: list[Request], args) -> dict[str, Outcome]:
    """All outcomes. On a CPU the servers run together, which lets their times be taken in turn; a GPU holds one."""
    outcomes = {name: Outcome() for name in flags}
    for group in [[name] for name in flags] if has_gpu() else [list(flags)]:
        with contextlib.ExitStack() as stack:
            servers = {}
            # One after another: "auto" times its steps at start.
            for name in group:
                server = Server(serve_command(args.target, *flags[name]), (args.target, args.draft), args.timeout)
                with Console().status(f"starting {name} ..."):
                    servers[name] = stack.enter_context(server)
            for name, server in servers.items():
                outcomes[name].replies = ask_all(name, server, requests, args)
            measure(servers, outcomes, requests, args)
    return outcomes


def ask_all(name: str, server: Server, requests: list[Request], args) -> list[Reply | None]:
    """Replies of one server, asked one request at a time; of servers that are only timed, at temperature 0 alone."""
    # The first request pays for lazy set-up.
    server.ask(requests[0], 2)
    replies: list[Reply | None] = []
    for i, request in enumerate(requests):
        if request.temperature > 0 and name not in (args.method, "plain"):
            replies.append(None)
            continue
        Console().log(f"{name}: request {i + 1} of {len(requests)}")
        replies.append(server.ask(request, args.max_tokens))
    return replies


def measure(servers: dict[str, Server], outcomes: dict[str, Outcome], requests: list[Request], args) -> None:
    """Times at temperature 0, in rounds of all servers in turn, so that a busy moment does not hit the same one.

    Every round has a salt of its own: what was drafted from the same questions' answers of the round before would be
    accepted whole.
    """
    greedy = [request for request in requests if request.temperature == 0]
    for concurrency in CONCURRENCIES:
        # A batch's first round compiles kernels; one at a time every request has been answered before.
        warm_up = int(concurrency > 1)
        for number in range(warm_up + args.repeats):
            for name, server in servers.items():
                salt = f"{concurrency} at a time, round {number}"
                speed = server.tokens_per_second(greedy, args.max_tokens, concurrency, salt)
                if number >= warm_up:
                    outcomes[name].speeds[concurrency].append(speed)


def tau(metrics: Counter) -> float | None:
    """Mean tokens per verification step, the bonus token included; None when nothing was drafted."""
    return 1 + metrics[ACCEPTED] / metrics[DRAFTS] if metrics[DRAFTS] else None


def summarise(replies: list[Reply]) -> dict:
    total = sum((reply.metrics for reply in replies), Counter())
    depths = sorted(key[1] for key in total if isinstance(key, tuple))
    return {
        "requests": len(replies),
        "tokens": sum(len(reply.token_ids) for reply in replies),
        "engine_steps": total[ENGINE_STEPS],
        "seconds": round(sum(reply.seconds for reply in replies), 3),
        "drafts": total[DRAFTS],
        "draft_tokens": total[DRAFT_TOKENS],
        "accepted_tokens": total[ACCEPTED],
        "tau": tau(total),
        "acceptance_per_depth": [round(total[ACCEPTED_AT_DEPTH, d] / max(total[DRAFTS], 1), 4) for d in depths],
    }


def request_table(
    requests: list[Request], plain: list[Reply], kvspec: list[Reply], same: list[bool], method: str
) -> Table:
    table = Table(title="the same requests, without and with speculation")
    for column in ("#", "request", "source", "T", "tokens", "steps plain", f"steps {method}", "tau", "identical"):
        table.add_column(column, justify="left" if column in ("request", "source") else "right")
    for i, (request, a, b, equal) in enumerate(zip(requests, plain, kvspec, same, strict=True)):
        length = tau(b.metrics)
        table.add_row(
            str(i),
            request.kind + (", stream" if request.stream else ""),
            request.source,
            f"{request.temperature:g}",
            str(len(b.token_ids)),
            str(a.metrics[ENGINE_STEPS]),
            str(b.metrics[ENGINE_STEPS]),
            "-" if length is None else f"{length:.2f}",
            "[green]yes[/]" if equal else "[bold red]NO[/]",
        )
    return table


def summary_table(summaries: dict[str, dict], outcomes: dict[str, Outcome], by_temperature: dict[str, dict]) -> Table:
    """``summaries``: of the method, by its name, and of plain. Of the other servers only times are shown."""
    method = next(name for name in summaries if name != "plain")
    columns = sorted(outcomes, key=["native", "plain", method, f"{method} auto"].index)
    table = Table(title="summary")
    for column in ("", *columns):
        table.add_column(column, justify="right" if column else "left")

    def add(label: str, of_plain: str, of_method: str) -> None:
        table.add_row(label, *({"plain": of_plain, method: of_method}.get(name, "") for name in columns))

    kvspec, plain = summaries[method], summaries["plain"]
    for label, key in (("tokens", "tokens"), ("engine steps", "engine_steps")):
        add(label, str(plain[key]), str(kvspec[key]))
    for name, summary in {"all": kvspec, **by_temperature}.items():
        add(f"tau = 1 + accepted / drafts, {name}", "1", f"{summary['tau'] or 1:.2f}")
    depths = [rate for rate in kvspec["acceptance_per_depth"] if rate > 0]
    add("drafts accepted to depth 1, 2, ...", "-", " ".join(f"{rate:.2f}" for rate in depths) or "-")
    for n in CONCURRENCIES:
        table.add_row(f"tokens/s at T=0, {n} at a time", *(f"{outcomes[name].speed(n):.0f}" for name in columns))
    return table


def identical(a: Reply, b: Reply) -> bool:
    return bool(a.token_ids) and a.text == b.text and a.token_ids == b.token_ids


def times_as_fast(outcomes: dict[str, Outcome]) -> dict[str, dict[int, float]]:
    """How many times as fast as vLLM's own engine each other server was, by concurrency."""
    own = outcomes.get("native", outcomes["plain"])
    return {
        name: {n: round(outcome.speed(n) / own.speed(n), 3) for n in CONCURRENCIES}
        for name, outcome in outcomes.items()
        if outcome is not own
    }


def report(requests: list[Request], outcomes: dict[str, Outcome], args) -> bool:
    """Print the tables, write the file; whether every answer was identical and something was drafted."""
    plain, kvspec = outcomes["plain"].replies, outcomes[args.method].replies
    others = {name: outcome.replies for name, outcome in outcomes.items() if name not in (args.method, "plain")}
    by_temperature = {
        f"T={t:g}": summarise(
            [reply for request, reply in zip(requests, kvspec, strict=True) if request.temperature == t]
        )
        for t in sorted({request.temperature for request in requests})
    }
    answers = list(zip(kvspec, *(outcome.replies for outcome in outcomes.values()), strict=True))
    same = [all(identical(b, reply) for reply in of_all if reply) for b, *of_all in answers]
    rows = [
        {**asdict(request), "identical": equal, "text": b.text, "plain_text": a.text, "tau": tau(b.metrics)}
        | {f"{name} text": replies[i].text for name, replies in others.items() if replies[i]}
        for i, (request, equal, a, b) in enumerate(zip(requests, same, plain, kvspec, strict=True))
    ]
    summaries = {args.method: summarise(kvspec), "plain": summarise(plain)}
    ratios = times_as_fast(outcomes)
    result = {
        "target": args.target,
        "speculative_config": speculative_config(args),
        "device": "gpu" if has_gpu() else "cpu",
        "plain": summaries["plain"],
        "kvspec": summaries[args.method],
        "kvspec_by_temperature": by_temperature,
        "tokens_per_second": {name: outcome.speeds for name, outcome in outcomes.items()},
        "times_as_fast_as_vllm": ratios,
        "requests": rows,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    console = Console(width=max(Console().width, 120))
    console.print(request_table(requests, plain, kvspec, same, args.method))
    console.print(summary_table(summaries, outcomes, by_temperature))
    print_ratios(console, ratios, args.method)
    console.print(f"{sum(same)} of {len(rows)} answers identical; details in {args.output}")
    if summaries[args.method]["drafts"] == 0:
        console.print("[bold red]nothing was drafted: speculation did not run[/]")
    return all(same) and summaries[args.method]["drafts"] > 0


def print_ratios(console: Console, ratios: dict[str, dict[int, float]], method: str) -> None:
    """A number below 1 means that speculation costs time here."""
    for name, by_concurrency in ratios.items():
        if name.startswith(method):
            numbers = ", ".join(f"{ratio:.2f} with {n} at a time" for n, ratio in by_concurrency.items())
            console.print(f"{name}: tokens/s as a multiple of vLLM's own engine, T=0: {numbers}")


def speculative_config(args) -> dict:
    config = {"method": args.method, "num_speculative_tokens": args.num_speculative_tokens}
    if args.method != "ngram":
        config["model"] = args.draft
    if args.method == "kvspec":
        config["budget"] = "fixed"
    return config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=str(EXAMPLES / "tiny/target"))
    parser.add_argument("--draft", default=str(EXAMPLES / "tiny/draft"))
    parser.add_argument("--method", default="kvspec", help="any method that vLLM knows, for comparison")
    parser.add_argument("--num-speculative-tokens", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=5, help="of all timed requests on every server")
    parser.add_argument("--prompts", type=Path, default=EXAMPLES / "prompts.jsonl")
    parser.add_argument("--requests", type=int, default=12)
    parser.add_argument("--max-tokens", type=int, default=64)
    parser.add_argument("--timeout", type=float, default=600, help="seconds for a server to start")
    parser.add_argument("--output", type=Path, default=Path("demo.json"))
    return parser.parse_args()


def main() -> int:
    args = parse_args()
    # A polite kill of this script must reach the servers, which live in their own process groups.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    for model in (args.target, args.draft):
        if EXAMPLES in Path(model).parents and not Path(model, "config.json").exists():
            raise RuntimeError(f"{model} must hold a checkpoint; found none. Run `make tiny` to train the tiny pair.")
    requests = load_requests(args.prompts, args.requests)
    return 0 if report(requests, run(engines(args), requests, args), args) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        sys.exit(f"demo: {error}")
