# SPDX-License-Identifier: Apache-2.0
"""tree_walk: twin against a python walk over random trees; kernel and the compiled version against the twin. The lossy
walk (FLy): rule by rule on trees made by hand, and on chains against the paper's own formula."""

import math

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


# Few, so that some are equal.
SCORES = st.sampled_from([-math.inf, -2.5, 0.0, 1.0])


@EACH
@settings(max_examples=60, deadline=None)
@given(batch=_batches(), data=st.data(), window=st.sampled_from([None, 0, 1, 2]))
def test_matches_twin(walk, batch, data, window):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    inputs = _tensors(batch, device)
    if window is not None:
        score = data.draw(st.lists(SCORES, min_size=len(inputs[0]), max_size=len(inputs[0])))
        inputs += [torch.tensor(score, dtype=torch.float32, device=device), window]
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


NO, YES = -math.inf, 0.0


def chain(length: int) -> list[int]:
    return [0, *range(length - 1)]


# The root's token is 1 and no child carries it. Below nodes 1, 2 and 3 the samples lead through 1, 2 and 3 nodes.
BUSH = ([0, 0, 0, 0, 1, 2, 3, 5, 6, 8], [1, 5, 5, 5, 6, 6, 6, 7, 7, 8], [0, 2, 3, 4, 5, 5, 5, 6, 6, 7])
LIKED = {
    name: [NO, *scores, *[NO] * 6] for name, scores in {"123": (1, 2, 3), "321": (3, 2, 1), "312": (3, 1, 2)}.items()
}
# Name: parents, samples, drafts; scores, window; emitted tokens and path.
ONE = (chain(4), [1, 2, 3, 4], [0, 9, 2, 3])
TWO = (chain(5), [1, 2, 3, 4, 5], [0, 9, 2, 8, 4])
THREE = (chain(7), [1, 2, 3, 4, 5, 6, 7], [0, 9, 2, 8, 4, 7, 6])
LOOSE = {
    "passes with its window": (*ONE, [NO, YES, NO, NO], 2, [9, 2, 3, 4], [0, 1, 2, 3]),
    "the tree ends before the window": (*ONE, [NO, YES, NO, NO], 3, [1], [0]),
    "the target was sure": (*ONE, [NO] * 4, 2, [1], [0]),
    "a second mismatch in the window": (*TWO, [NO, YES, NO, YES, NO], 2, [1], [0]),
    "others behind the window": (*THREE, [NO, YES] * 3 + [NO], 1, [9, 2, 8, 4, 7, 6, 7], list(range(7))),
    "the target's own token comes first": (
        *([0, 0, 0, 1], [1, 2, 3, 4], [0, 9, 1, 2]), [NO, YES, NO, NO], 1, [1, 3], [0, 2],
    ),
    "the best child that passes": (*BUSH, LIKED["312"], 2, [4, 5, 6, 7, 8], [0, 3, 6, 8, 9]),
    "the best of two that pass": (*BUSH, LIKED["321"], 2, [3, 5, 6, 7], [0, 2, 5, 7]),
    "the first of equals": (*BUSH, [NO, 2, 2, 2, *[NO] * 6], 1, [2, 5, 6], [0, 1, 4]),
    "no child passes": (*BUSH, LIKED["123"], 4, [1], [0]),
    "an invalid draft": (*(chain(3), [1, 2, 3], [0, -1, 2]), [NO, YES, NO], 1, [1], [0]),
    # Of two children with the same token the walk takes the first; only the second has a child.
    "a sibling's run does not count": (
        *([0, 0, 1, 1, 3], [1, 2, 3, 3, 4], [0, 9, 2, 2, 3]), [NO, YES, NO, NO, NO], 2, [1], [0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", LOOSE.values(), ids=LOOSE)
@pytest.mark.parametrize("walk", [*IMPLEMENTATIONS.values(), reference.tree_walk], ids=[*IMPLEMENTATIONS, "twin"])
def test_loose_rules(device, walk, case):
    parents, says, drafted, scores, window, emitted, nodes = case
    inputs = _tensors(([parents], [len(parents)], says, drafted, [0]), device)
    tokens, num_sampled, path = walk(*inputs, torch.tensor(scores, dtype=torch.float32, device=device), window)
    count = int(num_sampled[0])
    assert (tokens[0, :count].tolist(), path[0, :count].tolist()) == (emitted, nodes)
    # Without scores it is the target's own text, whatever the window.
    tokens, num_sampled, _ = walk(*inputs)
    assert tokens[0, : int(num_sampled[0])].tolist() == _python_walk(says, drafted, parents)[0]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), length=st.integers(1, 14), window=st.integers(1, 4))
def test_on_a_chain_it_is_the_papers_rule(data, length, window):
    """Draft j of K that the target did not sample passes iff it was unsure there, j + W <= K and W samples follow that
    are drafts (2511.22972, DeferDecide); the first that does not pass ends the chain."""
    says = data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
    drafted = data.draw(st.lists(st.integers(0, 1), min_size=length, max_size=length))
    unsure = data.draw(st.lists(st.booleans(), min_size=length, max_size=length))
    is_sampled = [None] + [drafted[j] == says[j - 1] for j in range(1, length)]
    accepted = 0
    for j in range(1, length):
        follows = is_sampled[j + 1 : j + 1 + window]
        if not is_sampled[j] and not (unsure[j] and j + window <= length - 1 and all(follows)):
            break
        accepted = j
    score = torch.tensor([YES if one else NO for one in unsure])
    inputs = _tensors(([chain(length)], [length], says, drafted, [0]), "cpu")
    tokens, num_sampled, _ = reference.tree_walk(*inputs, score, window)
    assert tokens[0, : num_sampled[0]].tolist() == [*drafted[1 : accepted + 1], says[accepted]]
