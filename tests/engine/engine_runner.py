# SPDX-License-Identifier: Apache-2.0
"""Run requests on a real vLLM engine and return what came out, as plain data. Importable, and a script:

    python tests/engine/engine_runner.py job.json out.json

A job is ``{"engine": {LLM arguments}, "batches": [[request, ...], ...], "async_scheduling": bool}``, or
``{"jobs": [job, ...]}``: plain engines, one after another. A request is
``{"prompt": [token ids], "params": {SamplingParams}}``, with LoRA also ``"adapter": [name, number, directory]``, with a
target that hears ``"audio"``. The plain reference always runs as a script: in a process of its own nothing of kvspec's
worker can have touched it.
"""

import contextlib
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

# One thread and no core binding: the model is tiny, and spinning threads on a busy machine cost more than they give.
os.environ.update(
    VLLM_NO_USAGE_STATS="1",
    VLLM_CPU_OMP_THREADS_BIND="nobind",
    HF_HUB_OFFLINE="1",
    OMP_NUM_THREADS="1",
    VLLM_LOGGING_LEVEL=os.environ.get("VLLM_LOGGING_LEVEL", "WARNING"),
)

ROOT = Path(__file__).parents[2]
TARGET = str(ROOT / "examples/tiny/target")
HEAD = os.environ.get("KVSPEC_TEST_HEAD", str(ROOT / "examples/tiny/draft"))
# vLLM's CPU attention takes blocks of 32; ours takes 16, which gives more block boundaries.
ON_CPU = {"worker_cls": "vllm_kvspec.engine.cpu.worker.PlainV2CPUWorker", "block_size": 32}
PLAIN_ENGINE = {} if torch.cuda.is_available() else ON_CPU
ENGINE_DEFAULTS = {
    "model": TARGET,
    "dtype": "float32",
    "enforce_eager": True,
    "max_model_len": 256,
    "max_num_seqs": 8,
    "kv_cache_memory_bytes": 64 << 20,
    "block_size": 16,
    "disable_log_stats": False,
    "enable_prefix_caching": True,
    "async_scheduling": False,
    # Several engines share a GPU; without one this is a share of the machine's memory, which is not asked for.
    **({"gpu_memory_utilization": 0.1} if torch.cuda.is_available() else {}),
}


def make_llm(engine: dict[str, Any]):
    from vllm import LLM
    from vllm.config import ReasoningConfig

    arguments = {**ENGINE_DEFAULTS, **engine}
    if reasoning := arguments.get("reasoning_config"):
        # As the command line makes it; beside a reasoning_parser vLLM takes no dictionary.
        arguments["reasoning_config"] = ReasoningConfig(**reasoning)
    return LLM(**arguments)


def sampling_params(params: dict[str, Any]):
    from vllm import SamplingParams
    from vllm.sampling_params import RepetitionDetectionParams, StructuredOutputsParams

    params = dict(params)
    if bias := params.get("logit_bias"):
        # JSON makes strings of the token ids.
        params["logit_bias"] = {int(token): value for token, value in bias.items()}
    if regex := params.pop("regex", None):
        params["structured_outputs"] = StructuredOutputsParams(regex=regex)
    if repetition := params.get("repetition_detection"):
        params["repetition_detection"] = RepetitionDetectionParams(**repetition)
    return SamplingParams(**params)


def generate(llm, batches: list[list[dict]]) -> list[list[list[dict]]]:
    """Outputs by batch, request and sample: token ids, text, and log-probabilities of the listed tokens."""
    return [
        [
            [_sample(sample) for sample in output.outputs]
            for output in llm.generate(
                [engine_prompt(request) for request in batch],
                [sampling_params(request["params"]) for request in batch],
                use_tqdm=False,
                lora_request=adapters(batch),
            )
        ]
        for batch in batches
    ]


def engine_prompt(request: dict) -> dict[str, Any]:
    """vLLM's. ``"audio"``: samples at 16 kHz, or embeddings [tokens, hidden size], for the prompt's one audio token."""
    prompt = {"prompt_token_ids": request["prompt"]}
    if audio := request.get("audio"):
        data = torch.tensor(audio)
        prompt["multi_modal_data"] = {"audio": data[None] if data.ndim == 2 else (data.numpy(), 16000)}
    return prompt


def adapters(batch: list[dict]) -> list | None:
    """vLLM's request for each one's LoRA adapter, or None where there is none."""
    if not any(request.get("adapter") for request in batch):
        return None
    from vllm.lora.request import LoRARequest

    return [LoRARequest(*request["adapter"]) if request.get("adapter") else None for request in batch]


def _sample(sample) -> dict[str, Any]:
    logprobs = None
    if sample.logprobs is not None:
        logprobs = [{str(token): entry.logprob for token, entry in step.items()} for step in sample.logprobs]
    return {
        "token_ids": list(sample.token_ids),
        "text": sample.text,
        "logprobs": logprobs,
        "cumulative_logprob": sample.cumulative_logprob,
    }


def spec_counters(llm) -> dict[str, float]:
    """vLLM's own speculative decoding counters, summed over engines."""
    found = {}
    for metric in llm.get_metrics():
        if metric.name.startswith("vllm:spec_decode_num_") and hasattr(metric, "value"):
            found[metric.name.removeprefix("vllm:spec_decode_num_")] = metric.value
    return found


def force_async_scheduling(replace: Callable = setattr) -> None:
    """vLLM turns it off on CPU; the scheduler itself works there. Must be called before the engine is configured."""
    from vllm.platforms import current_platform

    platform = type(current_platform)
    original = platform.check_and_update_config.__func__

    def check_and_update_config(cls, vllm_config):
        original(cls, vllm_config)
        vllm_config.scheduler_config.async_scheduling = True

    replace(platform, "check_and_update_config", classmethod(check_and_update_config))


def python_path(*more: Path | None) -> str:
    """Where a process of its own finds this directory, ``more``, and what this process was told."""
    places = (Path(__file__).parent, *more, os.environ.get("PYTHONPATH"))
    return os.pathsep.join(str(place) for place in places if place)


def run_script(
    job: dict,
    directory: Path,
    *,
    multiprocessing: bool = False,
    path: Path | None = None,
    environment: dict[str, str] | None = None,
    script: str = __file__,
) -> dict:
    """This file, or another ``script`` of its kind, in a process of its own; fails with the end of its output.
    ``path``: where it finds more."""
    (directory / "job.json").write_text(json.dumps(job))
    done = subprocess.run(
        [sys.executable, script, "job.json", "out.json"],
        cwd=directory,
        env={
            **os.environ,
            "PYTHONPATH": python_path(path),
            **(environment or {}),
            "VLLM_ENABLE_V1_MULTIPROCESSING": "1" if multiprocessing else "0",
        },
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return json.loads((directory / "out.json").read_text())


def _kernels_in_use() -> str | None:
    """Which kernels this process's engine called; None when the engine runs in another process."""
    ops = sys.modules.get("vllm_kvspec.engine.ops")
    return ops and ("triton" if ops.USE_TRITON else "torch")


def model_runner(llm):
    """The model runner of an in-process engine."""
    return llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker.model_runner


def close(llm) -> None:
    """Tear an in-process engine down, so that the next one starts clean. The caller drops its own references."""
    from vllm.distributed import cleanup_dist_env_and_memory

    llm.llm_engine.engine_core.shutdown()
    cleanup_dist_env_and_memory()


def run_plain(jobs: list[dict]) -> list[list]:
    """The outputs of several engines, one after another."""
    outputs = []
    with quick_engines():
        for job in jobs:
            llm = make_llm(job["engine"])
            outputs.append(generate(llm, job["batches"]))
            close(llm)
            # Before the next one: its end would take the new one's process groups along.
            del llm
    return outputs


@contextlib.contextmanager
def quick_engines():
    """Without most of the time that a small engine takes to start and stop.

    vLLM collects all garbage half a dozen times per engine (what lies in cycles is still collected as Python does it by
    itself), and looks at every class of models in a process of its own, unless a cache of the machine has it.
    """
    from vllm.model_executor.models import registry

    replaced = [(gc, "collect", lambda *args: 0), (registry, "_run_in_subprocess", lambda function: function())]
    originals = [(owner, name, getattr(owner, name)) for owner, name, _ in replaced]
    for owner, name, value in replaced:
        setattr(owner, name, value)
    try:
        yield
    finally:
        for owner, name, value in originals:
            setattr(owner, name, value)
        gc.collect()


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    if "jobs" in job:
        Path(sys.argv[2]).write_text(json.dumps({"outputs": run_plain(job["jobs"])}))
        return
    os.environ["VLLM_KVSPEC_KERNELS"] = job.get("kernels", "auto")
    if job.get("async_scheduling"):
        force_async_scheduling()
        job["engine"]["async_scheduling"] = True
    with quick_engines():
        llm = make_llm(job["engine"])
    result = {"outputs": generate(llm, job["batches"])}
    if job["engine"].get("speculative_config"):
        result["counters"] = spec_counters(llm)
        config = llm.llm_engine.vllm_config
        result["async_scheduling"] = config.scheduler_config.async_scheduling
        result["kernels"] = _kernels_in_use()
    Path(sys.argv[2]).write_text(json.dumps(result))


if __name__ == "__main__":
    main()
