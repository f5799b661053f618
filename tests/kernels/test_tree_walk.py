# SPDX-License-Identifier: Apache-2.0
"""tree_walk: twin against a python walk over random trees; kernel and the compiled version against the twin."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvspec.kernels import reference
from vllm_kvspec.kernels.tree_walk import tree_walk

IMPLEMENTATIONS = {"kernel": tree_walk}
if not torch.cuda.is_available():
    from vllm_kvspec.engine.cpu.kernels import trees

    IMPLEMENTATIONS["compiled"] = trees.tree_walk
EACH = pytest.mark.parametrize("walk", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


@st.composite
def _batches(draw):
    """Random trees over a tiny vocabulary, so that walks go deep, stop early and meet duplicate siblings."""
    num_nodes = draw(st.integers(1, 12))
    counts = draw(st.lists(st.integers(0, num_nodes), min_size=1, max_size=4))
    states = len(counts) + 2
    parents = [[0, *(draw(st.integers(0, t - 1)) for t in range(1, num_nodes))] for _ in range(states)]
    total = sum(counts)
    # A sampler may mark an invalid row with -1, which must not match a draft's -1.
    token = st.integers(-1, 2)
    sampled = draw(st.lists(token, min_size=total, max_size=total))
    drafted = draw(st.lists(st.integers(-1, 2), min_size=total, max_size=total))
    mapping = draw(st.permutations(range(states)))[: len(counts)]
    return parents, counts, sampled, drafted, mapping


def _tensors(batch, device):
    parents, counts, sampled, drafted, mapping = batch
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    return [
        torch.tensor(sampled, dtype=torch.int64, device=device),
        torch.tensor(drafted, dtype=torch.int64, device=device),
        torch.tensor(parents, dtype=torch.int32, device=device),
        starts.to(device),
        torch.tensor(mapping, dtype=torch.int64, device=device),
    ]


def _python_walk(sampled, drafted, parent):
    """The rule, written with children lists."""
    n = len(sampled)
    if n == 0:
        return [], []
    node, emitted, nodes = 0, [], []
    while True:
        nodes.append(node)
        emitted.append(sampled[node])
        children = [t for t in range(1, n) if parent[t] == node and drafted[t] == emitted[-1] >= 0]
        if not children:
            return emitted, nodes
        node = children[0]


@settings(max_examples=150, deadline=None)
@given(_batches())
def test_twin_matches_python_walk(batch):
    parents, counts, sampled, drafted, mapping = batch
    tokens, num_sampled, path = reference.tree_walk(*_tensors(batch, "cpu"))
    start = 0
    for b, n in enumerate(counts):
        emitted, nodes = _python_walk(sampled[start : start + n], drafted[start : start + n], parents[mapping[b]])
        start += n
        size = tokens.shape[1]
        assert num_sampled[b] == len(emitted)
        assert tokens[b].tolist() == emitted + [-1] * (size - len(emitted))
        assert path[b].tolist() == nodes + list(range(len(nodes), size))


@EACH
@settings(max_examples=60, deadline=None)
@given(batch=_batches())
def test_matches_twin(walk, batch):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = _tensors(batch, device)
    for ours, twin in zip(walk(*inputs), reference.tree_walk(*inputs), strict=True):
        assert ours.dtype == twin.dtype
        assert torch.equal(ours, twin)


@EACH
def test_largest_chain_is_accepted_whole(device, walk):
    # 64 nodes: the block is exactly full, so an off-by-one in a mask or in the stop rule shows.
    chain = ([[0, *range(63)]], [64], [*range(1, 65)], [*range(64)], [0])
    tokens, num_sampled, path = walk(*_tensors(chain, device))
    assert num_sampled.tolist() == [64]
    assert tokens[0].tolist() == list(range(1, 65))
    assert path[0].tolist() == list(range(64))


@EACH
def test_int32_drafts_match_int64_samples(device, walk):
    sampled, drafted, *rest = _tensors(([[0, 0, 1]], [3], [4, 7, 5], [9, 4, 7], [0]), device)
    tokens, num_sampled, _ = walk(sampled, drafted.int(), *rest)
    assert (tokens.tolist(), num_sampled.tolist()) == ([[4, 7, 5]], [3])
