# SPDX-License-Identifier: Apache-2.0
"""Serve the tiny target with and without speculation, send the servers the same requests, and compare.

    make demo
    python examples/demo.py --num-speculative-tokens 32 --max-tokens 96

Every text (and every token id) must be identical, at temperature 0 and at 0.8 with seeds; the exit status is 1 when
one is not. What speculation saved is read from vLLM's own /metrics. Prints tables and writes ``demo.json``.

Without a GPU there are two engines without speculation. vLLM serves natively on its older V1 runner: the one to beat in
tokens per second, and at temperature 0 in its text. It draws other random numbers than Model Runner V2, which vLLM uses
on a GPU and kvspec everywhere; so what sampled text must equal is plain V2, on our compiled kernels.
"""

import argparse
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
from dataclasses import asdict, dataclass, field
from pathlib import Path

from openai import OpenAI
from rich.console import Console
from rich.table import Table

EXAMPLES = Path(__file__).resolve().parent
# A server that is silent for longer is stuck.
REQUEST_TIMEOUT_S = 120
PLAIN_V2_ON_CPU = "vllm_kvspec.engine.cpu.worker.PlainV2CPUWorker"
STOP_TIMEOUT_S = 20
DRAFTS = "vllm:spec_decode_num_drafts_total"
DRAFT_TOKENS = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_total"
ACCEPTED_AT_DEPTH = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
GENERATED = "vllm:generation_tokens_total"
# A histogram with one observation per engine step.
ENGINE_STEPS = "vllm:iteration_tokens_total_count"


@dataclass(frozen=True)
class Request:
    """One line of ``prompts.jsonl`` (``prompt`` or ``messages``) with its sampling settings."""

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
        command += ["--enforce-eager", "--kv-cache-memory-bytes", "268435456"]
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


def send(client: OpenAI, request: Request, max_tokens: int) -> tuple[str, list[int]]:
    """(text, token ids) of the answer through the OpenAI client; streamed pieces are joined."""
    arguments = {
        "model": "target",
        "max_tokens": max_tokens,
        "temperature": request.temperature,
        "seed": request.seed,
        "stream": request.stream,
        # A vLLM extension: the ids that the text was decoded from.
        "extra_body": {"return_token_ids": True},
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
    """``count`` requests, alternately completion and chat; streaming and temperature 0.8 on different rhythms."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    kinds = [[r for r in rows if "prompt" in r], [r for r in rows if "messages" in r]]
    ordered = [row for pair in zip(*kinds, strict=False) for row in pair]
    return [
        Request(
            source=row["source"],
            prompt=row.get("prompt"),
            messages=row.get("messages"),
            stream=i // 2 % 2 == 1,
            temperature=0.8 if i // 4 % 2 == 1 else 0.0,
            seed=1000 + i,
        )
        for i, row in enumerate(ordered[:count])
    ]


def run(name: str, requests: list[Request], args, *flags: str) -> tuple[list[Reply], float]:
    """All replies of one server, asked one request at a time, and its tokens per second at temperature 0."""
    console = Console()
    command = serve_command(args.target, *flags)
    models = (args.target, args.draft)
    with console.status(f"starting {name} ..."), Server(command, models, args.timeout) as server:
        # The first request pays for lazy set-up.
        server.ask(requests[0], 2)
        replies = []
        for i, request in enumerate(requests):
            console.log(f"{name}: request {i + 1} of {len(requests)}")
            replies.append(server.ask(request, args.max_tokens))
        return replies, greedy_rate(server, requests, args)


def greedy_rate(server: Server, requests: list[Request], args) -> float:
    """Tokens per second over the requests at temperature 0, one at a time; of each request the fastest repetition."""
    tokens = seconds = 0.0
    for request in (request for request in requests if request.temperature == 0):
        times = []
        for _ in range(args.repeats):
            start = time.perf_counter()
            _, token_ids = send(server.client, request, args.max_tokens)
            times.append(time.perf_counter() - start)
        tokens, seconds = tokens + len(token_ids), seconds + min(times)
    return tokens / seconds if seconds else 0.0


def tau(metrics: Counter) -> float | None:
    """Mean tokens per verification step, the bonus token included; None when nothing was drafted."""
    return 1 + metrics[ACCEPTED] / metrics[DRAFTS] if metrics[DRAFTS] else None


def summarise(replies: list[Reply], greedy_tokens_per_second: float | None = None) -> dict:
    total = sum((reply.metrics for reply in replies), Counter())
    tokens = sum(len(reply.token_ids) for reply in replies)
    depths = sorted(key[1] for key in total if isinstance(key, tuple))
    return {
        "requests": len(replies),
        "tokens": tokens,
        "engine_steps": total[ENGINE_STEPS],
        "seconds": round(sum(reply.seconds for reply in replies), 3),
        "greedy_tokens_per_second": greedy_tokens_per_second,
        "drafts": total[DRAFTS],
        "draft_tokens": total[DRAFT_TOKENS],
        "accepted_tokens": total[ACCEPTED],
        "tau": tau(total),
        "acceptance_per_depth": [round(total[ACCEPTED_AT_DEPTH, d] / max(total[DRAFTS], 1), 4) for d in depths],
    }


def request_table(
    requests: list[Request], rows: list[dict], plain: list[Reply], kvspec: list[Reply], method: str
) -> Table:
    table = Table(title="the same requests, without and with speculation")
    for column in ("#", "request", "source", "T", "tokens", "steps plain", f"steps {method}", "tau", "identical"):
        table.add_column(column, justify="left" if column in ("request", "source") else "right")
    for i, (request, row, a, b) in enumerate(zip(requests, rows, plain, kvspec, strict=True)):
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
            "[green]yes[/]" if row["identical"] else "[bold red]NO[/]",
        )
    return table


def summary_table(engines: dict[str, dict], by_temperature: dict[str, dict]) -> Table:
    """``engines``: summaries by name; the last one speculates, and the first is what vLLM serves with."""
    *plain, last = engines.values()
    table = Table(title="summary")
    table.add_column("")
    for name in engines:
        table.add_column(name, justify="right")
    for key in ("tokens", "engine_steps"):
        table.add_row(key.replace("_", " "), *(str(summary[key]) for summary in engines.values()))
    for name, summary in {"all": last, **by_temperature}.items():
        table.add_row(f"tau = 1 + accepted / drafts, {name}", *("1" for _ in plain), f"{summary['tau'] or 1:.2f}")
    depths = [rate for rate in last["acceptance_per_depth"] if rate > 0]
    row = " ".join(f"{rate:.2f}" for rate in depths) or "-"
    table.add_row("drafts accepted to depth 1, 2, ...", *("-" for _ in plain), row)
    rates = [summary["greedy_tokens_per_second"] for summary in engines.values()]
    table.add_row("tokens/s here, T=0", *(f"{rate:.0f}" for rate in rates))
    table.add_row("ratio", *(f"{rate / rates[0]:.2f}" for rate in rates))
    return table


def identical(a: Reply, b: Reply) -> bool:
    return bool(a.token_ids) and a.text == b.text and a.token_ids == b.token_ids


def report(requests: list[Request], runs: dict[str, tuple[list[Reply], float]], args) -> bool:
    """Print the tables, write the file; whether every answer was identical and something was drafted.

    ``runs``: replies and greedy tokens per second by engine; the last one speculates, the one before has its noise.
    """
    engines = {name: summarise(*run) for name, run in runs.items()}
    plain, kvspec = (replies for replies, _ in list(runs.values())[-2:])
    temperatures = sorted({request.temperature for request in requests})
    by_temperature = {
        f"T={t:g}": summarise(
            [reply for request, reply in zip(requests, kvspec, strict=True) if request.temperature == t]
        )
        for t in temperatures
    }
    native = runs["native"][0] if "native" in runs else plain
    rows = [
        {
            **asdict(request),
            # The native engine's noise is its own.
            "identical": identical(a, b) and (request.temperature > 0 or identical(c, b)),
            "text": b.text,
            "plain_text": a.text,
            "tau": tau(b.metrics),
        }
        for request, a, b, c in zip(requests, plain, kvspec, native, strict=True)
    ]
    result = {
        "target": args.target,
        "speculative_config": speculative_config(args),
        "device": "gpu" if has_gpu() else "cpu",
        "engines": engines,
        f"{args.method}_by_temperature": by_temperature,
        "requests": rows,
    }
    args.output.write_text(json.dumps(result, indent=2) + "\n")
    console = Console(width=max(Console().width, 110))
    console.print(request_table(requests, rows, plain, kvspec, args.method))
    console.print(summary_table(engines, by_temperature))
    same = sum(row["identical"] for row in rows)
    console.print(f"{same} of {len(rows)} answers identical; details in {args.output}")
    drafts = engines[args.method]["drafts"]
    if drafts == 0:
        console.print("[bold red]nothing was drafted: speculation did not run[/]")
    return same == len(rows) and drafts > 0


def speculative_config(args) -> dict:
    config = {"method": args.method, "num_speculative_tokens": args.num_speculative_tokens}
    if args.method != "ngram":
        config["model"] = args.draft
    if args.method == "kvspec":
        config["budget"] = args.budget
    return config


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default=str(EXAMPLES / "tiny/target"))
    parser.add_argument("--draft", default=str(EXAMPLES / "tiny/draft"))
    parser.add_argument("--method", default="kvspec", help="any method that vLLM knows, for comparison")
    parser.add_argument("--num-speculative-tokens", type=int, default=16)
    parser.add_argument("--budget", default="fixed", choices=("fixed", "auto"), help="auto is what a server does")
    parser.add_argument("--repeats", type=int, default=3, help="of each timed request")
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
    plain = {"plain": ()} if has_gpu() else {"native": (), "plain V2": ("--worker-cls", PLAIN_V2_ON_CPU)}
    engines = {**plain, args.method: ("--speculative-config", json.dumps(speculative_config(args)))}
    runs = {name: run(name, requests, args, *flags) for name, flags in engines.items()}
    return 0 if report(requests, runs, args) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        sys.exit(130)
    except RuntimeError as error:
        sys.exit(f"demo: {error}")
