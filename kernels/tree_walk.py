# SPDX-License-Identifier: Apache-2.0
"""Sample-and-walk verification: follow the target's own samples down the drafted tree.

One program per request holds the whole tree (at most 64 nodes) in registers and takes one step per accepted node. The
rule needs no draft probabilities and no random numbers: a child is accepted iff it carries the token that the target
sampled at its parent. With scores (FLy, lossy) it may go on where no child does: see `reference.tree_walk`.
"""

import torch
import triton
import triton.language as tl


# A verification in parts passes slices that begin anywhere.
@triton.jit(do_not_specialize=["window"], do_not_specialize_on_alignment=["draft_tokens_ptr", "idx_mapping_ptr"])
def _tree_walk_kernel(
    sampled_ptr,
    draft_tokens_ptr,
    parent_ptr,
    cu_num_logits_ptr,
    idx_mapping_ptr,
    score_ptr,
    window,
    tokens_ptr,
    num_sampled_ptr,
    path_ptr,
    stride_parent_r,
    stride_tokens_b,
    stride_path_b,
    NUM_NODES: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
    LOOSE: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    start = tl.load(cu_num_logits_ptr + b).to(tl.int64)
    n = (tl.load(cu_num_logits_ptr + b + 1) - start).to(tl.int32)
    r = tl.load(idx_mapping_ptr + b).to(tl.int64)
    node = tl.arange(0, BLOCK_NODES)
    row = node < n
    sampled = tl.load(sampled_ptr + start + node, mask=row, other=-1).to(tl.int64)
    draft = tl.load(draft_tokens_ptr + start + node, mask=row, other=-1).to(tl.int64)
    parent = tl.load(parent_ptr + r * stride_parent_r + node, mask=row, other=-1)

    if LOOSE:
        score = tl.load(score_ptr + start + node, mask=row, other=-float("inf"))
        said = tl.load(sampled_ptr + start + parent, mask=row & (node > 0), other=-1).to(tl.int64)
        native = (draft == said) & (draft >= 0)
        # Nodes that the target's own tokens lead through below each node. Children come after their parent; of two that
        # carry the same token the walk takes the first, which is written last.
        run = tl.zeros([BLOCK_NODES], tl.int32)
        for i in range(1, n):
            below = tl.sum(tl.where((node == n - i) & native, run + 1, 0))
            above = tl.sum(tl.where(node == n - i, parent, 0))
            run = tl.where((node == above) & (below > 0), below, run)

    tokens = tl.full([BLOCK_NODES], -1, tl.int64)
    path = node
    count = tl.zeros([], tl.int32)
    current = tl.zeros([], tl.int32)
    while current < n:
        token = tl.sum(tl.where(node == current, sampled, 0))
        # draft is -1 outside the tree; node > current leaves out the root, which is its own parent.
        child = (parent == current) & (node > current) & (draft >= 0)
        following = tl.min(tl.where(child & (draft == token), node, BLOCK_NODES))
        if LOOSE:
            good = tl.where(child & (run >= window), score, -float("inf"))
            best = tl.max(good)
            is_loose = (following == BLOCK_NODES) & (best > -float("inf"))
            best_node = tl.min(tl.where(good == best, node, BLOCK_NODES))
            following = tl.where(is_loose, best_node, following)
            token = tl.where(is_loose, tl.sum(tl.where(node == best_node, draft, 0)), token)
        tokens = tl.where(node == count, token, tokens)
        path = tl.where(node == count, current, path)
        count += 1
        current = following

    inside = node < NUM_NODES
    tl.store(tokens_ptr + b * stride_tokens_b + node, tokens, mask=inside)
    tl.store(path_ptr + b * stride_path_b + node, path, mask=inside)
    tl.store(num_sampled_ptr + b, count)


def tree_walk(
    sampled: torch.Tensor,
    draft_tokens: torch.Tensor,
    parent: torch.Tensor,
    cu_num_logits: torch.Tensor,
    idx_mapping: torch.Tensor,
    score: torch.Tensor | None = None,
    window: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return tokens int64 ``[B, N1]``, num_sampled int32 ``[B]``, path int32 ``[B, N1]``; see `reference.tree_walk`.

    sampled int64 ``[L]``, draft_tokens int ``[L]``, parent int32 ``[R, N1]`` with contiguous rows,
    cu_num_logits int32 ``[B+1]``, idx_mapping int ``[B]``, score fp32 ``[L]``.
    """
    num_reqs, num_nodes = idx_mapping.shape[0], parent.shape[1]
    tokens = torch.empty((num_reqs, num_nodes), dtype=torch.int64, device=sampled.device)
    path = torch.empty((num_reqs, num_nodes), dtype=torch.int32, device=sampled.device)
    num_sampled = torch.empty(num_reqs, dtype=torch.int32, device=sampled.device)
    if num_reqs > 0:
        _tree_walk_kernel[(num_reqs,)](
            sampled,
            draft_tokens,
            parent,
            cu_num_logits,
            idx_mapping,
            score,
            window,
            tokens,
            num_sampled,
            path,
            parent.stride(0),
            tokens.stride(0),
            path.stride(0),
            NUM_NODES=num_nodes,
            BLOCK_NODES=triton.next_power_of_2(num_nodes),
            LOOSE=score is not None,
            num_warps=1,
        )
    return tokens, num_sampled, path
