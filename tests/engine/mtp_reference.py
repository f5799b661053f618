# SPDX-License-Identifier: Apache-2.0
"""vLLM's own ``mtp`` with a Gemma 4 assistant, or ``eagle3``, on Model Runner V2 without a GPU: a script like
``engine_runner.py``.

    python tests/engine/mtp_reference.py job.json out.json

The file holds ``{"jobs": [job, ...]}``, one engine each: ``{"engine": {LLM arguments}, "batches": [...]}``. A result is
``{"outputs", "drafts", "counters"}``, with the tokens that were drafted after every step, None where none were asked
for: from 0.33 on after a step that ends every request in it. The target and the assistant run vLLM's code on our
attention for the CPU; the kernels that prepare drafts and verify them are vLLM's, interpreted.
"""

import importlib
import json
import os
import sys
from functools import cache
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
sys.path.append(str(Path(__file__).parents[1]))

# Replaces torch.cuda streams and events; must come before anything below vllm.v1.worker.gpu.
# isort: off
import vllm.v1.worker.cpu.shm  # noqa: F401

# isort: on
import engine_runner
import interpreted_vllm
import torch
from vllm.v1.worker.gpu.spec_decode.eagle.speculator import EagleSpeculator
from vllm.v1.worker.gpu.spec_decode.gemma4.speculator import Gemma4Speculator

from vllm_kvspec.engine.cpu.worker import PlainV2CPUWorker
from vllm_kvspec.engine.verify.attention import HasTreeState
from vllm_kvspec.engine.verify.attention_registry import cpu_backend
from vllm_kvspec.engine.verify.tree_state import TreeState

INTERPRETED = ("spec_decode.target_dependent_ar.speculator", "spec_decode.rejection_sampler_utils")
DRAFTS: list[list[list[int]] | None] = []


@cache
def interpret_kernels() -> None:
    interpreted_vllm.MODULES += INTERPRETED
    for name in INTERPRETED:
        module = importlib.import_module(f"vllm.v1.worker.gpu.{name}")
        for kernel, value in vars(interpreted_vllm.vllm_module(name)).items():
            if kernel.endswith("_kernel"):
                setattr(module, kernel, value)


def load_model(self, *args, **kwargs) -> None:
    # No request has tree rows.
    HasTreeState.tree_state = TreeState(self.scheduler_config.max_num_seqs, 1, torch.device("cpu"))
    interpret_kernels()
    with cpu_backend():
        super(PlainV2CPUWorker, self).load_model(*args, **kwargs)


def recorded(propose):
    def call(self, *args, dummy_run: bool = False, **kwargs):
        tokens = propose(self, *args, dummy_run=dummy_run, **kwargs)
        if not dummy_run:
            DRAFTS.append(tokens.tolist() if kwargs["num_speculative_tokens"] else None)
        return tokens

    return call


def run(job: dict) -> dict:
    llm = engine_runner.make_llm(job["engine"] | engine_runner.ON_CPU)
    # Not those of the passes that warm the engine up.
    DRAFTS.clear()
    outputs = engine_runner.generate(llm, job["batches"])
    counters = engine_runner.spec_counters(llm)
    engine_runner.close(llm)
    return {"outputs": outputs, "drafts": list(DRAFTS), "counters": counters}


def main() -> None:
    jobs = json.loads(Path(sys.argv[1]).read_text())["jobs"]
    for speculator in (Gemma4Speculator, EagleSpeculator):
        speculator.propose = recorded(speculator.propose)
    PlainV2CPUWorker.load_model = load_model
    with engine_runner.quick_engines():
        results = [run(job) for job in jobs]
    Path(sys.argv[2]).write_text(json.dumps({"results": results}))


if __name__ == "__main__":
    main()
