# SPDX-License-Identifier: Apache-2.0
"""The identity tests can fail: with the mask, the depth positions or the compaction switched off, they do."""

import pytest
import requests_mix
from engine_runner import generate

from vllm_kvspec.engine import ops


def without_mask(tree_inputs):
    def broken(*args, batch_mask, **kwargs):
        tree_inputs(*args, batch_mask=batch_mask, **kwargs)
        # Every row sees all rows before it, as on a chain.
        rows = batch_mask.shape[1]
        for t in range(rows):
            batch_mask[:, t] = (1 << (t + 1)) - 1

    return broken


def without_positions(tree_inputs):
    def broken(positions, *args, **kwargs):
        flat = positions.clone()
        tree_inputs(positions, *args, **kwargs)
        positions.copy_(flat)

    return broken


@pytest.mark.once
@pytest.mark.parametrize(
    ("name", "broken"),
    [
        pytest.param("tree_inputs", without_mask, id="mask"),
        pytest.param("tree_inputs", without_positions, id="positions"),
        pytest.param("kv_compact", lambda original: lambda *args: None, id="compaction"),
    ],
)
def test_switched_off(reference, oracle_file, make_engine, spec, monkeypatch, name, broken):
    monkeypatch.setattr(ops, name, broken(getattr(ops, name)))
    keys = {"drafter": "oracle", "oracle_file": oracle_file}
    with make_engine(spec(14, **keys)) as llm:
        found = generate(llm, [requests_mix.greedy_batch()])
    different = [
        r
        for r, (have, want) in enumerate(zip(found[0], reference["greedy"], strict=True))
        if have[0]["token_ids"] != want[0]["token_ids"]
    ]
    assert different, f"nothing changed without {name}: the identity tests would not notice"
