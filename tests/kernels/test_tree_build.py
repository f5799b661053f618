# SPDX-License-Identifier: Apache-2.0
"""tree_build: the twin keeps the best closed set and builds a sound tree; the kernel and the CPU engine's compiled
version equal the twin."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvspec.kernels import reference
from vllm_kvspec.kernels.tree_build import tree_build

IMPLEMENTATIONS = {"kernel": tree_build}
if not torch.cuda.is_available():
    from vllm_kvspec.engine.cpu.kernels import trees

    IMPLEMENTATIONS["compiled"] = trees.tree_build
EACH = pytest.mark.parametrize("build", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
AND_TWIN = pytest.mark.parametrize("build", [*IMPLEMENTATIONS.values(), reference.tree_build])


@st.composite
def _candidates(draw, max_candidates: int = 12):
    """Level-ordered candidates with child <= parent, from few distinct steps so that ties are common."""
    count = draw(st.integers(1, max_candidates))
    parent, score = [], []
    for i in range(count):
        p = draw(st.integers(-1, i - 1))
        step = draw(st.sampled_from([0.0, -0.5, -1.0, -2.0, -math.inf]))
        parent.append(p)
        score.append((score[p] if p >= 0 else 0.0) + step)
    num_nodes = draw(st.integers(1, count))
    token = torch.arange(count)[None] + 100
    return torch.tensor([score]), token, torch.tensor([parent], dtype=torch.int32), num_nodes


def _random_candidates(batch, count, seed, dead=0.1):
    gen = torch.Generator().manual_seed(seed)
    parent = torch.stack([(torch.rand(count, generator=gen) * torch.arange(count)).long() - 1 for _ in range(batch)])
    parent[:, :3] = -1
    score = torch.zeros(batch, count)
    step = -torch.randint(0, 5, (batch, count), generator=gen) / 2
    step[torch.rand(batch, count, generator=gen) < dead] = -math.inf
    for i in range(count):
        above = score.gather(1, parent[:, i : i + 1].clamp(min=0))[:, 0]
        score[:, i] = torch.where(parent[:, i] >= 0, above, 0.0) + step[:, i]
    token = torch.randint(0, 1 << 40, (batch, count), generator=gen)
    return score, token, parent.int()


@settings(max_examples=150, deadline=None)
@given(_candidates())
def test_twin_keeps_the_best_candidates(case):
    score, token, parent, num_nodes = case
    tokens, tree_parent, depth, mask = (x[0].tolist() for x in reference.tree_build(*case))
    ranked = sorted(range(score.shape[1]), key=lambda i: (-score[0, i].item(), i))[:num_nodes]
    node_of = {c: t + 1 for t, c in enumerate(ranked)} | {-1: 0}
    for t, c in enumerate(ranked, start=1):
        if score[0, c] == -math.inf:
            assert (tree_parent[t], tokens[t - 1]) == (t - 1, 0)
        else:
            assert (tree_parent[t], tokens[t - 1]) == (node_of[parent[0, c].item()], token[0, c].item())
    assert (tree_parent[0], depth[0], mask[0]) == (0, 0, 1)
    for t in range(1, num_nodes + 1):
        assert tree_parent[t] < t
        assert depth[t] == depth[tree_parent[t]] + 1
        assert mask[t] == mask[tree_parent[t]] | 1 << t


@EACH
@pytest.mark.parametrize(
    ("batch", "count", "num_nodes"),
    [
        pytest.param(3, 40, 16, id="B3-M40-N16"),
        pytest.param(1, 63, 63, id="all-kept-63"),
        pytest.param(2, 70, 63, id="one-more-than-a-tile"),
        pytest.param(1, 300, 31, id="several-tiles"),
        pytest.param(4, 5, 1, id="single-node"),
    ],
)
def test_matches_twin(device, build, batch, count, num_nodes):
    case = [x.to(device) for x in _random_candidates(batch, count, seed=count)]
    for ours, twin in zip(build(*case, num_nodes), reference.tree_build(*case, num_nodes), strict=True):
        assert ours.dtype == twin.dtype
        assert torch.equal(ours, twin)


@EACH
@settings(max_examples=40, deadline=None)
@given(case=_candidates())
def test_matches_twin_on_ties(build, case):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    case = [x.to(device) if torch.is_tensor(x) else x for x in case]
    for ours, twin in zip(build(*case), reference.tree_build(*case), strict=True):
        assert torch.equal(ours, twin)


def test_prefix_is_the_smaller_tree():
    score, token, parent = _random_candidates(2, 64, seed=1, dead=0.0)
    large = reference.tree_build(score, token, parent, 32)
    small = reference.tree_build(score, token, parent, 12)
    assert all(torch.equal(a[:, : b.shape[1]], b) for a, b in zip(large, small, strict=True))


@AND_TWIN
def test_deepest_chain_uses_the_sign_bit(device, build):
    # Node 63's own bit is the int64 sign: a logical/arithmetic shift mix-up or a short doubling shows here.
    score = -torch.arange(63, dtype=torch.float32)[None].to(device)
    parent = torch.arange(-1, 62, dtype=torch.int32)[None].to(device)
    _, tree_parent, depth, mask = build(score, torch.ones_like(parent).long(), parent, 63)
    assert tree_parent[0].tolist() == [0, *range(63)]
    assert depth[0].tolist() == list(range(64))
    assert mask[0].tolist() == [(1 << (t + 1)) - 1 if t < 63 else -1 for t in range(64)]


@AND_TWIN
def test_broken_scores_still_give_a_sound_tree(device, build):
    # NaN, +inf and children above their parents: never a parent at or after its child, whatever the head computes.
    score = torch.tensor([[-3.0, math.nan, 5.0, math.inf, -1.0, math.nan]], device=device)
    parent = torch.tensor([[-1, 0, 0, 1, 2, 4]], dtype=torch.int32, device=device)
    _, tree_parent, depth, mask = build(score, torch.ones(1, 6, dtype=torch.int64, device=device), parent, 6)
    for t in range(1, 7):
        above = tree_parent[0, t].item()
        assert 0 <= above < t
        assert mask[0, t] == mask[0, above] | 1 << t
        assert depth[0, t] == depth[0, above] + 1


@AND_TWIN
@pytest.mark.parametrize("num_nodes", [0, 5, 64])
def test_impossible_sizes_are_refused(build, num_nodes):
    score, token, parent = _random_candidates(1, 4, seed=0)
    with pytest.raises(ValueError, match="num_nodes"):
        build(score, token, parent, num_nodes)
