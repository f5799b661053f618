# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the engine tests: one plain reference for all of them, and kvspec engines in this process."""

import contextlib
import json
import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():
    # Replaces torch.cuda streams and events; must come before anything below vllm.v1.worker.gpu.
    import vllm.v1.worker.cpu.shm  # noqa: F401

    # As our workers do: tests call vLLM's samplers outside of them too.
    from vllm_kvspec.engine.cpu.kernels import install

    install.install()

from vllm.model_executor.models import registry  # noqa: E402

# In a process of its own it would take seconds for every class of models that the machine's cache does not have.
registry._run_in_subprocess = lambda function: function()

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE))
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"

import engine_runner  # noqa: E402
import requests_mix  # noqa: E402

# Plain decoding up to any batch in 1 ms; 4 nodes for up to 5 requests, 8 for up to 2, beyond that ten times the time.
COSTS = {
    "steps": {
        "0": [[1, 0.001], [8, 0.001]],
        "4": [[1, 0.0011], [5, 0.0011], [6, 0.01], [8, 0.01]],
        "8": [[1, 0.0012], [2, 0.0012], [3, 0.01], [8, 0.01]],
    },
    "context": {"0": 0, "4": 0, "8": 0},
}


@pytest.fixture(scope="session")
def reference(tmp_path_factory) -> dict[str, list]:
    """What plain vLLM answers to each batch of ``requests_mix.BATCHES``."""
    job = {"engine": engine_runner.PLAIN_ENGINE, "batches": [make() for make in requests_mix.BATCHES.values()]}
    outputs = engine_runner.run_script(job, tmp_path_factory.mktemp("plain"))["outputs"]
    return dict(zip(requests_mix.BATCHES, outputs, strict=True))


@pytest.fixture(scope="session")
def oracle_file(reference, tmp_path_factory) -> str:
    """Every prompt with its reference continuations, for the oracle drafter."""
    sequences = [
        request["prompt"] + sample["token_ids"]
        for name, make in requests_mix.BATCHES.items()
        for request, samples in zip(make(), reference[name], strict=True)
        for sample in samples
    ]
    path = tmp_path_factory.mktemp("oracle") / "sequences.json"
    path.write_text(json.dumps(sequences))
    return str(path)


@contextlib.contextmanager
def engine(speculative_config: dict | None, **arguments):
    """An in-process engine, torn down afterwards so that the next one starts clean."""
    from vllm.model_executor.models.transformers.base import Base

    with engine_runner.quick_engines():
        with pytest.MonkeyPatch.context() as patch:
            # It would change the classes of transformers for the whole process; these engines do not compile anyway.
            patch.setattr(Base, "_decorate_for_torch_compile", lambda self: None)
            llm = engine_runner.make_llm({"speculative_config": speculative_config, **arguments})
        try:
            yield llm
        finally:
            engine_runner.close(llm)
            del llm


@pytest.fixture
def make_engine():
    return engine


@pytest.fixture(scope="module")
def selected(request):
    """``selected(name)``: the values of that parameter in the tests of this module that will run."""

    def values(name: str) -> list:
        items = [item for item in request.session.items if item.module is request.module and hasattr(item, "callspec")]
        found = [item.callspec.params[name] for item in items if name in item.callspec.params]
        return [value for i, value in enumerate(found) if value not in found[:i]]

    return values


def kvspec(num_speculative_tokens: int = 16, **keys) -> dict:
    """Always as many nodes as asked for, unless ``keys`` say otherwise: what is tested must not depend on the load."""
    return {
        "method": "kvspec",
        "model": engine_runner.HEAD,
        "num_speculative_tokens": num_speculative_tokens,
        **({} if "budget_costs" in keys or "num_speculative_tokens_per_batch_size" in keys else {"budget": "fixed"}),
        **keys,
    }


@pytest.fixture
def spec():
    return kvspec


def assert_same(found: list, expected: list, label: str = "") -> None:
    """Token ids and texts equal; log-probabilities of the same tokens within fp32 noise of another attention kernel."""
    for b, (batch, want_batch) in enumerate(zip(found, expected, strict=True)):
        for r, (samples, want_samples) in enumerate(zip(batch, want_batch, strict=True)):
            for s, (sample, want) in enumerate(zip(samples, want_samples, strict=True)):
                where = f"{label} batch {b} request {r} sample {s}"
                assert sample["token_ids"] == want["token_ids"], where
                assert sample["text"] == want["text"], where
                assert_same_logprobs(sample["logprobs"], want["logprobs"], where)
                assert sample["cumulative_logprob"] == pytest.approx(want["cumulative_logprob"], abs=2e-2), where


def assert_same_logprobs(found: list | None, expected: list | None, where: str) -> None:
    assert (found is None) == (expected is None), where
    for step, (have, want) in enumerate(zip(found or [], expected or [], strict=True)):
        shared = have.keys() & want.keys()
        # The last of the top k may tie; the sampled token and the rest must be listed by both.
        assert len(shared) >= len(want) - 1, f"{where} step {step}"
        for token in shared:
            assert abs(have[token] - want[token]) < 2e-3, f"{where} step {step} token {token}"


@pytest.fixture
def same():
    return assert_same


@pytest.fixture
def check(reference):
    """Send batches by name to an engine and compare with the plain reference."""

    def run(llm, names: tuple[str, ...]) -> None:
        batches = [requests_mix.BATCHES[name]() for name in names]
        assert_same(engine_runner.generate(llm, batches), [reference[name] for name in names])

    return run


@pytest.fixture
def costs_file(tmp_path) -> str:
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(COSTS))
    return str(path)


@pytest.fixture
def asynchronous(monkeypatch) -> dict:
    """Engine arguments of a scheduler that runs a step ahead of the outputs."""
    engine_runner.force_async_scheduling(monkeypatch.setattr)
    return {"async_scheduling": True}


@pytest.fixture
def script(tmp_path):
    return lambda job, **kwargs: engine_runner.run_script(job, tmp_path, **kwargs)


@pytest.fixture
def with_graphs(monkeypatch) -> dict:
    """Engine arguments that ask for CUDA graphs; without a GPU these are recorded ones."""
    if torch.cuda.is_available():
        return {"enforce_eager": False, "dtype": "bfloat16"}
    import cpu_graphs

    return cpu_graphs.install(monkeypatch)


@pytest.fixture
def replays(monkeypatch):
    """What the engines of a test replay of their graphs."""
    import replays

    return replays.watch(monkeypatch)
