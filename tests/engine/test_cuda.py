# SPDX-License-Identifier: Apache-2.0
"""On a GPU: the text is plain decoding's without CUDA graphs, with them, and compiled, on both attention backends."""

import pytest
from engine_runner import HEAD
from requests_mix import BATCHES, CORE

pytestmark = pytest.mark.gpu

MODES = {
    "eager": {"enforce_eager": True},
    "graphs": {"enforce_eager": False, "compilation_config": {"mode": 0}},
    "compiled": {"enforce_eager": False},
}
# Two batch shapes round differently in bfloat16; a difference of log-probabilities below this is a near-tie.
NEAR_TIE = 0.25
SPEC = {"method": "kvspec", "model": HEAD, "num_speculative_tokens": 16, "budget": "fixed"}


def answers(script, engine: dict, batches: list, environment: dict | None = None):
    """(plain outputs, kvspec outputs, kvspec's counters) of the same batches on the same engine."""
    plain = script({"engine": engine, "batches": batches}, environment=environment)
    found = script({"engine": engine | {"speculative_config": SPEC}, "batches": batches}, environment=environment)
    assert found["kernels"] == "triton"
    assert found["counters"]["accepted_tokens"] > found["counters"]["drafts"]
    return plain["outputs"], found["outputs"]


@pytest.mark.parametrize("mode", MODES)
def test_float32(script, same, mode):
    """Every batch, token by token, where nothing is rounded to a near-tie: float32 products in vLLM's kernel too."""
    engine = {"dtype": "float32", "attention_config": {"backend": "TRITON_ATTN"}, **MODES[mode]}
    batches = [BATCHES[name]() for name in (*CORE, "mixed", "logprobs")]
    plain, found = answers(script, engine, batches, {"TRITON_F32_DEFAULT": "ieee"})
    same(found, plain)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("backend", ["TRITON_ATTN", "FLASH_ATTN"])
def test_bfloat16(script, backend, mode):
    """Greedy text up to a near-tie of plain decoding's own log-probabilities."""
    engine = {"dtype": "bfloat16", "attention_config": {"backend": backend}, **MODES[mode]}
    requests = BATCHES["greedy"]()
    for request in requests:
        request["params"]["logprobs"] = 2
    (plain,), (found,) = answers(script, engine, [requests])
    agreed = 0
    for r, ((want,), (have,)) in enumerate(zip(plain, found, strict=True)):
        first = next(
            (i for i, pair in enumerate(zip(want["token_ids"], have["token_ids"], strict=True)) if len(set(pair)) > 1),
            None,
        )
        agreed += len(want["token_ids"]) if first is None else first
        if first is not None:
            step, other = want["logprobs"][first], str(have["token_ids"][first])
            assert other in step and step[str(want["token_ids"][first])] - step[other] < NEAR_TIE, (
                f"request {r} token {first}"
            )
    # A wrong tree would differ at once, near-tie or not.
    assert agreed > 0.5 * sum(len(want["token_ids"]) for (want,) in plain)
