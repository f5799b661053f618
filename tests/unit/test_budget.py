# SPDX-License-Identifier: Apache-2.0
"""The node budget: the formulae of its costs, what it may and may not choose, and how it learns from acceptance."""

import itertools
import json
import pickle
import random
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvspec.engine.budget.choice import (
    DEFAULT_PROFILE,
    IDLE_HORIZON,
    LEAST_GAIN,
    Acceptance,
    Device,
    MeasuredCosts,
    Pass,
    Roofline,
    budget_sizes,
    choose_nodes,
    decoder_pass,
    read_costs,
    tokens_per_second,
)

QWEN3_8B = SimpleNamespace(
    hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, vocab_size=151936,
)  # fmt: skip
HEAD = SimpleNamespace(**{**vars(QWEN3_8B), "num_hidden_layers": 2, "draft_vocab_size": 32768})
ROOFLINE = Roofline(decoder_pass(QWEN3_8B), decoder_pass(HEAD), block=16)
# The plain measured table used below: one more node costs a tenth of a step per request of the batch.
TABLE = {
    "steps": {str(n): [[b, 1e-3 * (1 + 0.1 * n * b + (0.1 if n else 0))] for b in (1, 4, 16)] for n in (0, 4, 8)},
    "context": {"0": 1e-8, "4": 2e-8, "8": 2e-8},
}

passes = st.builds(
    Pass,
    weight_bytes=st.floats(1e6, 1e12),
    row_flops=st.floats(1e6, 1e12),
    context_bytes=st.floats(0, 1e6),
    row_context_flops=st.floats(0, 1e7),
)
rooflines = st.builds(Roofline, target=passes, head=passes, block=st.integers(1, 16))
batches = st.integers(1, 512)
contexts = st.integers(1, 65536)
rises = st.lists(st.floats(0.01, 2), min_size=6, max_size=6)


def profile(increments: list[float]) -> dict[int, float]:
    """A profile that rises by the given amounts at 2, 4, 8, ... nodes."""
    taus, tau = {}, 1.0
    for nodes, more in zip((2, 4, 8, 16, 32, 63), increments, strict=True):
        tau = taus[nodes] = tau + more
    return taus


def concave(tau: float) -> Acceptance:
    return Acceptance({n: 1 + (tau - 1) * (n / 16) ** 0.4 for n in (1, 2, 4, 8, 16, 32, 63)})


def test_roofline_of_an_8b_target():
    """36 x 192.9M + 622M parameters: 15.13 GB a step, 144 KiB of KV per token, compute-bound beyond 184 rows."""
    target = ROOFLINE.target
    assert target.weight_bytes == pytest.approx(15.13e9, rel=1e-3)
    assert target.context_bytes == 147456
    assert ROOFLINE.verify_seconds(1, 1024, 0) == pytest.approx(3.55e-3, rel=1e-2)
    assert ROOFLINE.verify_seconds(1, 1024, 63) == pytest.approx(ROOFLINE.verify_seconds(1, 1024, 0), rel=0.01)
    assert ROOFLINE.verify_seconds(32, 32 * 1024, 15) == pytest.approx(10.93e-3, rel=0.02)
    assert decoder_pass(QWEN3_8B, shards=4).weight_bytes == target.weight_bytes / 4
    # Two layers of 192.9M parameters and 32768 rows of the LM head, read once.
    assert ROOFLINE.draft_seconds(1, 0) == pytest.approx((2 * 192.9e6 + 134.2e6) * 2 / Device().bandwidth, rel=1e-3)


@settings(max_examples=100, deadline=None)
@given(rooflines, rises, batches, contexts, st.integers(1, 63), st.integers(1, 4096))
def test_never_slower_than_plain_decoding_and_within_its_limits(costs, increments, batch, context, ceiling, max_rows):
    acceptance = Acceptance(profile(increments))
    sizes = budget_sizes(ceiling)
    total = batch * context
    nodes = choose_nodes(costs, acceptance, sizes, batch, total, max_rows)
    rate = tokens_per_second(costs, acceptance.accepted(nodes), batch, total, nodes)
    worth = LEAST_GAIN * tokens_per_second(costs, 0.0, batch, total, 0)
    assert nodes == 0 or rate > worth
    assert nodes in sizes and nodes <= ceiling
    assert nodes == 0 or batch * (nodes + 1) <= max_rows
    # No allowed size would have been faster, or by so little that plain decoding is as good.
    for other in sizes:
        if other and batch * (other + 1) <= max_rows:
            other_rate = tokens_per_second(costs, acceptance.accepted(other), batch, total, other)
            assert other_rate <= (rate if nodes else worth)


@settings(max_examples=100, deadline=None)
@given(rooflines, rises, batches, batches, contexts)
def test_a_larger_batch_never_gets_more_nodes(costs, increments, small, large, context):
    """Among sizes above 0: whether speculation pays at all may also turn for the better, as weights get cheaper per
    request."""
    acceptance = Acceptance(profile(increments))
    small, large = sorted((small, large))
    sizes = [n for n in budget_sizes(63) if n]
    rates = [
        {n: tokens_per_second(costs, acceptance.accepted(n), b, b * context, n) for n in sizes} for b in (small, large)
    ]
    fewest_best = [min(n for n in sizes if rate[n] >= max(rate.values()) * (1 - 1e-9)) for rate in rates]
    most_best = max(n for n in sizes if rates[0][n] >= max(rates[0].values()) * (1 - 1e-9))
    assert fewest_best[1] <= most_best


@pytest.mark.parametrize("tau", [3.2, 5.7])
@pytest.mark.parametrize("context", [1024, 8192])
def test_large_trees_for_small_batches_only(tau, context):
    chosen = [choose_nodes(ROOFLINE, concave(tau), budget_sizes(63), b, b * context) for b in (1, 4, 16, 64, 256)]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0] == 63
    assert chosen[-1] <= 8


def test_nothing_accepted_means_nothing_drafted():
    acceptance = concave(3.0)
    assert choose_nodes(ROOFLINE, acceptance, budget_sizes(16), 1, 1024) == 16
    for _ in range(2000):
        acceptance.observe(16, 0)
    assert choose_nodes(ROOFLINE, acceptance, budget_sizes(16), 1, 1024) == 0
    # Forgotten after a while without nodes: tried again.
    acceptance.forget(int(6 * IDLE_HORIZON))
    assert choose_nodes(ROOFLINE, acceptance, budget_sizes(16), 1, 1024) == 16


def test_acceptance_learns_the_scale_of_the_profile():
    acceptance = Acceptance({8: 3.0, 16: 4.0})
    assert acceptance.accepted(16) == pytest.approx(3.0)
    for _ in range(3000):
        acceptance.observe(8, 1)
    # Half of the profile's 2 at 8 nodes, so about half of its 3 at 16 as well.
    assert acceptance.accepted(8) == pytest.approx(1.0, abs=0.08)
    assert acceptance.accepted(16) == pytest.approx(1.5, abs=0.12)
    for _ in range(3000):
        acceptance.observe(8, 4)
    assert acceptance.accepted(8) == pytest.approx(4.0, abs=0.1)


@pytest.mark.parametrize("flatter", [True, False])
def test_the_shape_of_the_profile_is_learned_too(flatter):
    """Steps and tokens of SmolLM2's head, whose curve is flatter than the profile: scaled to what 8 nodes yield, the
    profile says 8, and 4 are better."""
    seconds = {0: 45.5, 2: 50.5, 4: 50.5, 8: 55.7, 16: 64.3}
    costs = MeasuredCosts({n: [(1, t)] for n, t in seconds.items()}, dict.fromkeys(seconds, 0.0))
    true = {2: 0.42, 4: 0.61, 8: 0.70, 16: 0.78} if flatter else {n: DEFAULT_PROFILE[n] - 1 for n in (2, 4, 8, 16)}
    rates = {n: (1 + true.get(n, 0.0)) / t for n, t in seconds.items()}
    acceptance, rng, chosen = Acceptance(), random.Random(0), []
    for _ in range(2000):
        chosen.append(choose_nodes(costs, acceptance, budget_sizes(16), 1, 0))
        more = true[chosen[-1]] / (1 + true[chosen[-1]])
        accepted = next(n for n in itertools.count() if rng.random() >= more)
        acceptance.observe(chosen[-1], min(accepted, chosen[-1]))
    # Not at once, and others are tried now and then.
    late = [rates[n] for n in chosen[500:]]
    assert sum(late) / len(late) > 0.985 * max(rates.values())
    assert set(chosen) > {8}


def test_no_more_nodes_accepted_than_there_are():
    acceptance = Acceptance({1: 1.9, 16: 2.0})
    for _ in range(1000):
        acceptance.observe(16, 8)
    assert acceptance.accepted(1) == 1.0
    assert acceptance.accepted(16) == pytest.approx(8, abs=0.1)


def test_measured_costs():
    costs = MeasuredCosts(**TABLE)
    assert costs.nodes == [0, 4, 8]
    assert costs.step_seconds(1, 0, 0) == pytest.approx(1e-3)
    assert costs.step_seconds(10, 0, 4) == pytest.approx(1e-3 * (1 + 0.1 * 4 * 10 + 0.1))
    assert costs.step_seconds(32, 0, 8) == pytest.approx(1e-3 * (1 + 0.1 * 8 * 32 + 0.1))
    assert costs.step_seconds(1, 1e6, 0) == pytest.approx(1e-3 + 1e-2)
    # Few batches for large trees, a batch that is faster than a smaller one, more nodes that seem faster than none.
    uneven = MeasuredCosts({0: [(1, 2.0), (8, 1.9)], 4: [(1, 1.5)]}, {0: 0.1, 4: 0.0})
    assert uneven.step_seconds(8, 0, 0) == uneven.step_seconds(64, 0, 0) == 1.9
    assert uneven.step_seconds(1, 10, 4) == 3.0


def test_cost_table_round_trip(tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(json.dumps(TABLE))
    costs = read_costs(path)
    again = pickle.loads(pickle.dumps(costs))
    assert again.step_seconds(3, 100, 8) == MeasuredCosts(**TABLE).step_seconds(3, 100, 8)


@pytest.mark.parametrize(
    "table",
    [
        "not json",
        {"steps": TABLE["steps"]},
        {"steps": [1], "context": {"0": 0}},
        {"steps": {"4": [[1, 1.0]]}, "context": {"4": 0}},
        {"steps": {"0": [[2, 1.0]]}, "context": {"0": 0}},
        {"steps": {"0": [[1, 0.0]]}, "context": {"0": 0}},
        {"steps": {"0": []}, "context": {"0": 0}},
        {"steps": TABLE["steps"], "context": {"0": 0}},
    ],
)
def test_bad_cost_tables_are_refused(table, tmp_path):
    path = tmp_path / "costs.json"
    path.write_text(table if isinstance(table, str) else json.dumps(table))
    with pytest.raises(ValueError, match="cost"):
        read_costs(path)


@pytest.mark.parametrize("bad", [{}, {0: 2.0}, {8: 0.5}, {8: 1.0}, {8: 3.0, 16: 2.0}, {64: 3.0}])
def test_bad_profiles_are_refused(bad):
    from vllm_kvspec.engine.budget.choice import accepted_by_nodes

    with pytest.raises(ValueError, match="acceptance_profile"):
        accepted_by_nodes(bad)


def test_the_simulation_and_its_committed_table_agree():
    """Whoever changes the model must write the table again; the budget is nowhere slower than plain decoding in it."""
    root = Path(__file__).parents[2] / "benchmarks"
    done = subprocess.run([sys.executable, root / "budget_simulation.py"], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout == (root / "results/budget_simulation.md").read_text()
    rows = [line.split("|")[1:-1] for line in done.stdout.splitlines() if line.startswith("| ") and "k |" in line]
    assert len(rows) == 36
    assert min(float(row[3]) for row in rows) >= 1.0
    # The reason for the budget: a tree that never shrinks loses somewhere.
    assert min(float(row[4]) for row in rows) < 1.0
