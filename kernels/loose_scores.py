# SPDX-License-Identifier: Apache-2.0
"""Which drafts FLy's lossy walk may go to although the target sampled another token: one pass over a row of logits.

One program per tree row. It reads the logits only where no child carries the sample, so a row that the walk cannot
leave loosely costs nothing. Every lane keeps its own three largest logits and its sum of exponentials; the lanes meet
once, at the end.
"""

import torch
import triton
import triton.language as tl

from vllm_kvspec.kernels.reference_loose import TOP

BLOCK = 1024


@triton.jit
def _top_entropy(logits, vocab_size, TOP: tl.constexpr, BLOCK: tl.constexpr):
    """Sum of ``-p log p`` over the TOP (at most 3) most probable tokens of a row."""
    lane = tl.arange(0, BLOCK)
    first = tl.full([BLOCK], -float("inf"), tl.float32)
    second, third = first, first
    total = tl.zeros([BLOCK], tl.float32)
    for begin in range(0, vocab_size, BLOCK):
        token = begin + lane
        x = tl.load(logits + token, mask=token < vocab_size, other=-float("inf")).to(tl.float32)
        largest = tl.maximum(first, x)
        # A lane that has seen -inf alone adds nothing, and no NaN.
        shift = tl.where(largest == -float("inf"), 0.0, largest)
        total = total * tl.exp(first - shift) + tl.exp(x - shift)
        third = tl.maximum(third, tl.minimum(second, x))
        second = tl.maximum(second, tl.minimum(first, x))
        first = largest
    largest = tl.max(first, 0)
    log_sum = largest + tl.log(tl.sum(total * tl.exp(first - largest), 0))
    entropy = 0.0
    for _ in tl.static_range(TOP):
        log_prob = tl.max(first, 0) - log_sum
        prob = tl.exp(log_prob)
        entropy -= tl.where(prob > 0.0, prob * log_prob, 0.0)
        taken = lane == tl.min(tl.where(first == tl.max(first, 0), lane, BLOCK), 0)
        first, second = tl.where(taken, second, first), tl.where(taken, third, second)
    return entropy


# A verification in parts passes slices that begin anywhere.
@triton.jit(do_not_specialize_on_alignment=["draft_tokens_ptr", "idx_mapping_ptr"])
def _loose_scores_kernel(
    logits_ptr,
    sampled_ptr,
    draft_tokens_ptr,
    parent_ptr,
    cu_num_logits_ptr,
    idx_mapping_ptr,
    score_ptr,
    threshold,
    vocab_size,
    stride_logits_l,
    stride_parent_r,
    BLOCK_NODES: tl.constexpr,
    TOP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    at = tl.program_id(1)
    start = tl.load(cu_num_logits_ptr + b).to(tl.int64)
    n = (tl.load(cu_num_logits_ptr + b + 1) - start).to(tl.int32)
    r = tl.load(idx_mapping_ptr + b).to(tl.int64)
    node = tl.arange(0, BLOCK_NODES)
    row = node < n
    draft = tl.load(draft_tokens_ptr + start + node, mask=row, other=-1).to(tl.int64)
    parent = tl.load(parent_ptr + r * stride_parent_r + node, mask=row, other=-1)
    # node > at leaves out the root, which is its own parent.
    child = (parent == at) & (node > at) & (draft >= 0)
    sampled = tl.load(sampled_ptr + start + at, mask=at < n, other=-1).to(tl.int64)
    has_child = tl.max(child.to(tl.int32), 0)
    is_decided = tl.max((child & (draft == sampled)).to(tl.int32), 0)
    if (has_child == 0) | (is_decided > 0):
        return
    logits = logits_ptr + (start + at) * stride_logits_l
    if _top_entropy(logits, vocab_size, TOP, BLOCK) >= threshold:
        score = tl.load(logits + draft, mask=child, other=-float("inf")).to(tl.float32)
        tl.store(score_ptr + start + node, score, mask=child)


def loose_scores(
    logits: torch.Tensor,
    sampled: torch.Tensor,
    draft_tokens: torch.Tensor,
    parent: torch.Tensor,
    cu_num_logits: torch.Tensor,
    idx_mapping: torch.Tensor,
    threshold: float,
) -> torch.Tensor:
    """Return score fp32 ``[L]``; see `reference_loose.loose_scores`.

    logits float ``[L, V]`` and parent int32 ``[R, N1]`` with contiguous rows, sampled int64 ``[L]``, draft_tokens int
    ``[L]``, cu_num_logits int32 ``[B+1]``, idx_mapping int ``[B]``.
    """
    num_reqs, num_nodes = idx_mapping.shape[0], parent.shape[1]
    score = torch.full((len(sampled),), -torch.inf, device=logits.device)
    if num_reqs > 0:
        _loose_scores_kernel[(num_reqs, num_nodes)](
            logits,
            sampled,
            draft_tokens,
            parent,
            cu_num_logits,
            idx_mapping,
            score,
            threshold,
            logits.shape[1],
            logits.stride(0),
            parent.stride(0),
            BLOCK_NODES=triton.next_power_of_2(num_nodes),
            TOP=TOP,
            BLOCK=BLOCK,
        )
    return score
