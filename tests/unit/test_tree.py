# SPDX-License-Identifier: Apache-2.0
"""Fixed tree shapes and the expansion of a head's scores, against plain Python."""

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvspec.kernels.reference import gumbel_noise, tree_build
from vllm_kvspec.kernels.reference_candidates import tree_candidates
from vllm_kvspec.tree import (
    RankingScales,
    ancestor_masks,
    chain_parents,
    check_parents,
    depths,
    expand_tree,
    fixed_levels,
    num_candidates,
    parents_from_widths,
    ranking_scale,
)

VOCAB, RANK = 13, 4


def head_scores(batch=2, block=3, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(batch, block, VOCAB, generator=generator)
    factors = [torch.randn(VOCAB, RANK, generator=generator) for _ in range(2)]
    anchor = torch.randint(VOCAB, (batch,), generator=generator)
    noise = torch.randn(batch, block, VOCAB, generator=generator)
    return logits, anchor, factors, noise


def path_score(path, b, logits, anchor, factors, noise=None, scale=None):
    """Cumulative log-probability of a path of tokens, one softmax at a time."""
    total, previous = 0.0, anchor[b]
    for level, token in enumerate(path):
        row = logits[b, level] + factors[1] @ factors[0][previous]
        if noise is not None:
            row = row + noise[b, level]
        if scale is not None:
            row = row / scale[b]
        total, previous = total + row.log_softmax(0)[token].item(), token
    return total


def candidate_paths(token, parent):
    paths = []
    for t, p in zip(token.tolist(), parent.tolist(), strict=True):
        paths.append((*paths[p], t) if p >= 0 else (t,))
    return paths


def test_widths():
    assert parents_from_widths([2, 1]) == [0, 0, 1, 2]
    assert parents_from_widths([1, 1, 1]) == chain_parents(3) == [0, 1, 2]
    for widths in ([], [2, 0], [8, 8]):
        with pytest.raises(ValueError):
            parents_from_widths(widths)


@pytest.mark.parametrize("parents", [[], [1], [0, 2], [-1], list(range(64))])
def test_what_is_no_tree_is_refused(parents):
    with pytest.raises(ValueError):
        check_parents(parents)


@given(st.lists(st.integers(0, 10**6), min_size=1, max_size=63))
def test_depths_and_masks(numbers):
    parents = [number % node for node, number in enumerate(numbers, start=1)]
    for node, (depth, mask) in enumerate(zip(depths(parents), ancestor_masks(parents), strict=True)):
        ancestors = {node}
        while node:
            node = parents[node - 1]
            ancestors.add(node)
        assert {j for j in range(64) if mask >> j & 1} == ancestors
        assert -(2**63) <= mask < 2**63
        assert depth == len(ancestors) - 1


@pytest.mark.parametrize("mode", ["plain", "scale", "noise", "both"])
def test_full_expansion_is_exhaustive(mode):
    """With a beam and width that leave nothing out, the scores are those of all paths."""
    logits, anchor, factors, noise = head_scores(block=2)
    noise = noise if mode in ("noise", "both") else None
    scale = torch.tensor([0.5, 2.0]) if mode in ("scale", "both") else None
    score, token, parent = expand_tree(logits, anchor, *factors, noise, scale, beam=VOCAB, width=VOCAB)
    assert score.shape == token.shape == parent.shape == (2, num_candidates(2, VOCAB, VOCAB))
    assert (score.dtype, token.dtype, parent.dtype) == (torch.float32, torch.int64, torch.int32)
    for b in range(2):
        paths = candidate_paths(token[b], parent[b])
        assert set(paths) == {p for n in (1, 2) for p in itertools.product(range(VOCAB), repeat=n)}
        expected = [path_score(path, b, logits, anchor, factors, noise, scale) for path in paths]
        torch.testing.assert_close(score[b], torch.tensor(expected), atol=1e-4, rtol=1e-4)


@settings(max_examples=30, deadline=None)
@given(beam=st.integers(1, 6), width=st.integers(1, 5), block=st.integers(1, 4), seed=st.integers(0, 1000))
def test_expansion_rules(beam, width, block, seed):
    logits, anchor, factors, _ = head_scores(block=block, seed=seed)
    score, token, parent = expand_tree(logits, anchor, *factors, beam=beam, width=width)
    assert score.shape[1] == num_candidates(block, beam, width)
    for b in range(2):
        paths = candidate_paths(token[b], parent[b])
        assert len(set(paths)) == len(paths)
        for i, (path, p) in enumerate(zip(paths, parent[b].tolist(), strict=True)):
            assert p < i
            assert abs(score[b, i].item() - path_score(path, b, logits, anchor, factors)) < 1e-3
            assert p < 0 or score[b, i] <= score[b, p]
        for level in range(1, block):
            at = [i for i, path in enumerate(paths) if len(path) == level]
            parents = {parent[b, i].item() for i, path in enumerate(paths) if len(path) == level + 1}
            best = sorted(at, key=lambda i: -score[b, i].item())[:beam]
            assert parents == set(best)


@settings(max_examples=60, deadline=None)
@given(
    beam=st.integers(1, 8),
    width=st.integers(1, 5),
    block=st.integers(1, 5),
    num_nodes=st.integers(1, 12),
    seed=st.integers(0, 1000),
)
def test_a_small_tree_needs_fewer_candidates(beam, width, block, num_nodes, seed):
    """Tokens, parents, depths and masks are those of the whole expansion."""
    logits, anchor, factors, _ = head_scores(block=block, seed=seed)
    num_nodes = min(num_nodes, num_candidates(block, beam, width))
    whole = expand_tree(logits, anchor, *factors, beam=beam, width=width)
    fewer = expand_tree(logits, anchor, *factors, beam=beam, width=width, num_nodes=num_nodes)
    assert num_nodes <= fewer.score.shape[1] <= whole.score.shape[1]
    for small, large in zip(tree_build(*fewer, num_nodes), tree_build(*whole, num_nodes), strict=True):
        assert torch.equal(small, large)


def test_chain_rows_hold_the_greedy_chain_only():
    logits, anchor, factors, _ = head_scores(block=3)
    chain = torch.tensor([True, False])
    score, token, parent = expand_tree(logits, anchor, *factors, beam=4, width=3, chain=chain)
    unchained = expand_tree(logits, anchor, *factors, beam=4, width=3)
    torch.testing.assert_close(score[1], unchained[0][1])
    assert score[0].isfinite().sum() == 3
    tokens, tree_parent, _, _ = tree_build(score, token, parent, 5)
    previous, greedy = anchor[0], []
    for level in range(3):
        previous = (logits[0, level] + factors[1] @ factors[0][previous]).argmax()
        greedy.append(previous.item())
    assert tokens[0].tolist()[:3] == greedy
    assert tree_parent[0].tolist() == [0, 0, 1, 2, 3, 4]


def fixed_candidates(logits, anchor, factors, parents, coupled):
    """Tokens [B, N] of a fixed shape at temperature 1 with seed 7, and the noise [B, G, V] they were ranked under."""
    batch, block = logits.shape[:2]
    rows, ones, base = torch.zeros(batch, dtype=torch.int64), torch.ones(1), torch.arange(batch) + 5
    seeds = torch.tensor([7])
    levels, nodes = fixed_levels(parents)
    candidates = tree_candidates(
        logits, anchor, *factors, levels=levels, base=base, idx_mapping=rows, temperature=ones, seeds=seeds,
        coupled=coupled, scales=RankingScales(0.5, 1.0),
    )  # fmt: skip
    noise = gumbel_noise(seeds, ones, base[:, None] + torch.arange(block), rows, VOCAB)
    return candidates.token[:, nodes], noise if coupled else torch.zeros_like(noise)


@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize("parents", [parents_from_widths([3, 2, 1]), [0, 0, 2, 2, 2, 0, 4], [0], chain_parents(3)])
def test_fixed_tree_ranks_siblings(parents, coupled):
    logits, anchor, factors, _ = head_scores(block=3)
    tokens, noise = fixed_candidates(logits, anchor, factors, parents, coupled)
    assert tokens.shape == (2, len(parents))
    for b in range(2):
        all_tokens = [anchor[b].item(), *tokens[b].tolist()]
        for node, depth in enumerate(depths(parents)):
            children = [t for t, p in enumerate(parents, start=1) if p == node]
            if children:
                row = logits[b, depth] + factors[1] @ factors[0][all_tokens[node]] + noise[b, depth]
                assert [all_tokens[t] for t in children] == row.topk(len(children)).indices.tolist()


def test_fixed_tree_deeper_than_the_block_is_refused():
    logits, anchor, factors, _ = head_scores(block=2)
    with pytest.raises(ValueError, match="deeper than the head's block"):
        fixed_candidates(logits, anchor, factors, chain_parents(3), False)


def test_ranking_scale():
    temperature, scales = torch.tensor([0.0, 0.7, 2.0]), RankingScales(greedy=0.25, coupled=0.5)
    assert ranking_scale(temperature, True, scales).tolist() == [0.25, 0.5, 0.5]
    assert ranking_scale(temperature, False, scales).tolist() == temperature.clamp(min=0.25).tolist()
