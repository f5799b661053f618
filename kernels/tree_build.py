# SPDX-License-Identifier: Apache-2.0
"""Candidates to the best tree of N nodes: tokens, parents, depths and ancestor masks.

One program per request. Ranks come from counting, for each candidate, how many go before it (higher score, or equal
score and lower index): no sort, no atomics, and ties are settled as in the twin. A child never outranks its parent, so
the N best are a tree and rank order is a valid node order. Ancestor masks come from pointer doubling in registers:
after k rounds a node's mask covers 2**k generations.
"""

import torch
import triton
import triton.language as tl

from vllm_kvspec.kernels.reference import check_num_nodes


@triton.jit
def _load_scores(score_ptr, index, num_candidates):
    """Scores at `index`, NaN and outside as -inf."""
    score = tl.load(score_ptr + index, mask=index < num_candidates, other=float("-inf"))
    return tl.where(score == score, score, float("-inf"))


@triton.jit
def _tree_build_kernel(
    score_ptr,
    token_ptr,
    parent_ptr,
    tokens_out_ptr,
    parent_out_ptr,
    depth_out_ptr,
    mask_out_ptr,
    stride_score_b,
    stride_token_b,
    stride_parent_b,
    num_candidates,
    NUM_NODES: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
    ROUNDS: tl.constexpr,
    TILE: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    score_ptr += b * stride_score_b
    node = tl.arange(0, BLOCK_NODES)
    tile = tl.arange(0, TILE)

    # Candidate index behind each node; -1 for the root.
    kept = tl.full([BLOCK_NODES], -1, tl.int32)
    for i0 in range(0, num_candidates, TILE):
        i = i0 + tile
        score = _load_scores(score_ptr, i, num_candidates)
        rank = tl.zeros([TILE], tl.int32)
        for j0 in range(0, num_candidates, TILE):
            j = j0 + tile
            other = _load_scores(score_ptr, j, num_candidates)
            # [TILE, TILE]
            tie = (other[None, :] == score[:, None]) & (j[None, :] < i[:, None])
            before = ((other[None, :] > score[:, None]) | tie) & (j[None, :] < num_candidates)
            rank += tl.sum(before.to(tl.int32), 1)
        # [TILE, BLOCK_NODES]
        chosen = (rank[:, None] + 1 == node[None, :]) & (i[:, None] < num_candidates)
        kept += tl.sum(tl.where(chosen, i[:, None] + 1, 0), 0)

    real = (node >= 1) & (node <= NUM_NODES)
    score = tl.load(score_ptr + kept, mask=real, other=float("-inf"))
    token = tl.load(token_ptr + b * stride_token_b + kept, mask=real, other=0)
    source = tl.load(parent_ptr + b * stride_parent_b + kept, mask=real, other=-1)
    unused = (score == float("-inf")) | (score != score)
    token = tl.where(unused, 0, token)
    found = tl.min(tl.where(source[:, None] == kept[None, :], node[None, :], BLOCK_NODES), 1)
    previous = tl.maximum(node - 1, 0)
    # The minimum keeps parent[t] < t whatever the scores; a source of -1 finds the root.
    parent = tl.where(unused, previous, tl.minimum(found, previous))

    mask = tl.full([BLOCK_NODES], 1, tl.int64) << node
    ancestor = parent
    for _ in range(ROUNDS):
        # [BLOCK_NODES, BLOCK_NODES]
        points = ancestor[:, None] == node[None, :]
        mask |= tl.sum(tl.where(points, mask[None, :], 0), 1)
        ancestor = tl.sum(tl.where(points, ancestor[None, :], 0), 1)
    depth = tl.sum(((mask[:, None] >> node[None, :]) & 1).to(tl.int32), 1) - 1

    inside = node <= NUM_NODES
    row = b * (NUM_NODES + 1)
    tl.store(tokens_out_ptr + b * NUM_NODES + node - 1, token, mask=real)
    tl.store(parent_out_ptr + row + node, parent, mask=inside)
    tl.store(depth_out_ptr + row + node, depth, mask=inside)
    tl.store(mask_out_ptr + row + node, mask, mask=inside)


def tree_build(
    score: torch.Tensor, token: torch.Tensor, parent: torch.Tensor, num_nodes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens int64 ``[B, N]``, parent int32, depth int32, ancestor_mask int64 ``[B, N1]`` of the best trees.

    score fp32 ``[B, M]``, token int64 ``[B, M]``, parent int32 ``[B, M]`` with contiguous rows; num_nodes = N, at most
    63 and at most M (ValueError). See `reference.tree_build`.
    """
    check_num_nodes(num_nodes, score.shape[1])
    batch, num_candidates = score.shape
    tokens = torch.empty((batch, num_nodes), dtype=torch.int64, device=score.device)
    tree_parent = torch.empty((batch, num_nodes + 1), dtype=torch.int32, device=score.device)
    depth = torch.empty_like(tree_parent)
    mask = torch.empty((batch, num_nodes + 1), dtype=torch.int64, device=score.device)
    if batch > 0:
        _tree_build_kernel[(batch,)](
            score,
            token,
            parent,
            tokens,
            tree_parent,
            depth,
            mask,
            score.stride(0),
            token.stride(0),
            parent.stride(0),
            num_candidates,
            NUM_NODES=num_nodes,
            BLOCK_NODES=triton.next_power_of_2(num_nodes + 1),
            ROUNDS=num_nodes.bit_length(),
            TILE=32,
        )
    return tokens, tree_parent, depth, mask
