# SPDX-License-Identifier: Apache-2.0
"""One configuration of ``bench_engine.py`` in a process of its own: ``engine_worker.py job.json out.jsonl``.

Decoding is timed over whole engine steps of a constant batch: every request has its prompt behind it and none ends. The
prompts are computed beforehand, into the prefix cache, so that all requests start decoding together.
Each finished shape is written at once, so that a later one which hangs loses nothing.
"""

import json
import random
import sys
import time
import zlib
from collections import defaultdict
from functools import wraps
from pathlib import Path
from typing import Any

import torch

WARMUP_STEPS = 5
STANDARD_DEVIATION = 0.02


def randomise(worker) -> None:
    """Normal weights of the usual size, the same ones in every run, for target and head; norms become 1."""
    runner = worker.model_runner
    speculator = getattr(runner, "speculator", None)
    done = set()
    for model in (runner.model, getattr(speculator, "model", None)):
        for name, parameter in model.named_parameters() if model is not None else ():
            # Heads share the target's embedding and LM head.
            if parameter.data_ptr() in done or not parameter.is_floating_point():
                continue
            done.add(parameter.data_ptr())
            if parameter.dim() == 1:
                parameter.data.fill_(1.0)
            else:
                generator = torch.Generator(parameter.device).manual_seed(zlib.crc32(name.encode()))
                parameter.data.normal_(0.0, STANDARD_DEVIATION, generator=generator)


class PhaseClock:
    """Time spent in the runner's phases: CUDA events on the main stream, the wall clock on CPU."""

    def __init__(self, runner, device: torch.device):
        self.on_gpu = device.type == "cuda"
        self.spans: dict[str, list] = defaultdict(list)
        self._wrap(runner, "execute_model", "forward")
        # The second is Model Runner V1's.
        self._wrap(runner, "sample" if hasattr(runner, "sample") else "sample_tokens", "sample")
        if getattr(runner, "speculator", None) is not None:
            self._wrap(runner.speculator, "propose", "draft")

    def _wrap(self, owner, method: str, phase: str) -> None:
        original = getattr(owner, method)

        @wraps(original)
        def timed(*args, **kwargs):
            start = self._now()
            result = original(*args, **kwargs)
            self.spans[phase].append((start, self._now()))
            return result

        setattr(owner, method, timed)

    def _now(self):
        if not self.on_gpu:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def restart(self) -> None:
        self.synchronize()
        self.spans.clear()

    def synchronize(self) -> None:
        if self.on_gpu:
            torch.cuda.synchronize()

    def total_ms(self, phase: str) -> float:
        if self.on_gpu:
            return sum(start.elapsed_time(end) for start, end in self.spans[phase])
        return 1e3 * sum(end - start for start, end in self.spans[phase])


def kv_tokens(llm) -> int:
    """Tokens that the KV cache holds."""
    config = llm.llm_engine.vllm_config.cache_config
    return config.num_gpu_blocks * config.block_size


def prompts(batch: int, context: int, vocab_size: int) -> list[list[int]]:
    generator = random.Random(0)
    return [[generator.randrange(vocab_size) for _ in range(context)] for _ in range(batch)]


def measure(llm, clock: PhaseClock, job: dict[str, Any], batch: int, context: int) -> dict[str, Any]:
    """Decode ``batch`` requests after ``context`` tokens for ``job["steps"]`` steps. Raises ValueError: no room."""
    from vllm import SamplingParams

    steps, engine = job["steps"], llm.llm_engine
    # Asynchronous scheduling runs a few steps ahead of what is counted.
    max_tokens = (WARMUP_STEPS + steps + 8) * job["tokens_per_step"]
    if batch * (context + max_tokens) > kv_tokens(llm):
        raise ValueError(f"{batch} requests of {context + max_tokens} tokens, KV room for {kv_tokens(llm)}")
    tokens = prompts(batch, context, job["vocab_size"])
    prefill = SamplingParams(temperature=0.0, max_tokens=1, detokenize=False)
    llm.generate([{"prompt_token_ids": prompt} for prompt in tokens], prefill, use_tqdm=False)
    keywords = dict(temperature=0.0, max_tokens=max_tokens, ignore_eos=True, detokenize=False)
    produced = {}
    for i, prompt in enumerate(tokens):
        produced[f"{batch}-{context}-{i}"] = 0
        engine.add_request(f"{batch}-{context}-{i}", {"prompt_token_ids": prompt}, SamplingParams(seed=i, **keywords))

    def step() -> None:
        for output in engine.step():
            produced[output.request_id] = len(output.outputs[0].token_ids)

    while min(produced.values()) == 0:
        step()
    for _ in range(WARMUP_STEPS):
        step()
    clock.restart()
    before, start = sum(produced.values()), time.perf_counter()
    while len(clock.spans["forward"]) < steps:
        step()
    clock.synchronize()
    seconds = time.perf_counter() - start
    decoded = sum(produced.values()) - before
    verify, draft = clock.total_ms("forward") + clock.total_ms("sample"), clock.total_ms("draft")
    engine.abort_request(list(produced))
    while engine.has_unfinished_requests():
        engine.step()
    per_step = 1e3 * seconds / steps
    return {
        "ms per step": per_step,
        "verify ms": verify / steps,
        "draft ms": draft / steps,
        "rest ms": per_step - (verify + draft) / steps,
        "tokens/s": decoded / seconds,
        "tau": decoded / (batch * steps),
        "KV tokens": kv_tokens(llm),
    }


def greedy_tokens(llm, job: dict[str, Any]) -> list[dict[str, Any]]:
    """Prompt, token ids and top-20 log-probabilities per position of a few greedy requests.

    With random weights more than two tokens are often within rounding of the best.
    """
    from vllm import SamplingParams

    check = job["parity"]
    params = SamplingParams(temperature=0.0, max_tokens=check["tokens"], ignore_eos=True, detokenize=False, logprobs=20)
    outputs = llm.generate(
        [{"prompt_token_ids": p} for p in prompts(check["requests"], check["context"], job["vocab_size"])],
        params,
        use_tqdm=False,
    )
    return [
        {
            "prompt": output.prompt_token_ids,
            "token_ids": list(output.outputs[0].token_ids),
            "logprobs": [{str(t): e.logprob for t, e in step.items()} for step in output.outputs[0].logprobs],
        }
        for output in outputs
    ]


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    if job["worker_cls"]:
        job["engine"]["worker_cls"] = job["worker_cls"]
    from vllm import LLM

    llm = LLM(**job["engine"])
    llm.collective_rpc(randomise)
    runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
    with Path(sys.argv[2]).open("w") as out:

        def record(row: dict[str, Any]) -> None:
            print(json.dumps(row), file=out, flush=True)

        if job["parity"]:
            record({"parity": greedy_tokens(llm, job)})
        clock = PhaseClock(runner, runner.device)
        for batch, context in job["shapes"]:
            try:
                record({"batch": batch, "context": context, **measure(llm, clock, job, batch, context)})
            except ValueError as error:
                record({"batch": batch, "context": context, "not run": str(error)})


if __name__ == "__main__":
    main()
