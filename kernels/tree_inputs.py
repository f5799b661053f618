# SPDX-License-Identifier: Apache-2.0
"""Verification inputs of one step: depth positions and batch-indexed ancestor masks.

One program per row of the persistent batch buffers, so that rows past the batch are reset in the same launch and a CUDA
graph captured with more rows reads no stale tree. The true position of node t is ``base + depth[t]`` (siblings share
one), which RoPE and the sampler's noise need; its KV slot stays at flat position ``base + t``.
"""

import torch
import triton
import triton.language as tl


@triton.jit(do_not_specialize=["num_reqs"])
def _tree_inputs_kernel(
    positions_ptr,
    logits_indices_ptr,
    cu_num_logits_ptr,
    idx_mapping_ptr,
    depth_ptr,
    ancestor_mask_ptr,
    batch_mask_ptr,
    batch_len_ptr,
    local_pos_ptr,
    stride_depth_r,
    stride_mask_r,
    stride_batch_mask_b,
    num_reqs,
    BLOCK_NODES: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    if b >= num_reqs:
        tl.store(batch_len_ptr + b, 0)
        return
    start = tl.load(cu_num_logits_ptr + b).to(tl.int64)
    n = tl.load(cu_num_logits_ptr + b + 1).to(tl.int64) - start
    node = tl.arange(0, BLOCK_NODES)
    row = node < n
    if n <= 1:
        tl.store(batch_len_ptr + b, 0)
        tl.store(local_pos_ptr + start + node, tl.zeros([BLOCK_NODES], tl.int32), mask=row)
        return
    r = tl.load(idx_mapping_ptr + b).to(tl.int64)
    base = tl.load(positions_ptr + tl.load(logits_indices_ptr + start))
    index = tl.load(logits_indices_ptr + start + node, mask=row, other=0)
    depth = tl.load(depth_ptr + r * stride_depth_r + node, mask=row, other=0)
    mask = tl.load(ancestor_mask_ptr + r * stride_mask_r + node, mask=row, other=0)
    tl.store(positions_ptr + index, base + depth, mask=row)
    tl.store(local_pos_ptr + start + node, depth, mask=row)
    tl.store(batch_mask_ptr + b * stride_batch_mask_b + node, mask, mask=row)
    tl.store(batch_len_ptr + b, n.to(tl.int32))


def tree_inputs(
    positions: torch.Tensor,
    logits_indices: torch.Tensor,
    cu_num_logits: torch.Tensor,
    idx_mapping: torch.Tensor,
    depth: torch.Tensor,
    ancestor_mask: torch.Tensor,
    *,
    batch_mask: torch.Tensor,
    batch_len: torch.Tensor,
    local_pos: torch.Tensor,
) -> None:
    """Write true positions (in place), ``batch_mask``, ``batch_len`` and ``local_pos``; see `reference.tree_inputs`.

    positions int64 ``[T]``, logits_indices int64 ``[L]``, cu_num_logits int32 ``[B+1]``, idx_mapping int ``[B]``,
    depth int32 ``[R, N1]``, ancestor_mask int64 ``[R, N1]``, batch_mask int64 ``[Rmax, N1]``,
    batch_len int32 ``[Rmax]``, local_pos int32 ``[L]``. Inner dimensions are contiguous.
    """
    _tree_inputs_kernel[(batch_len.shape[0],)](
        positions,
        logits_indices,
        cu_num_logits,
        idx_mapping,
        depth,
        ancestor_mask,
        batch_mask,
        batch_len,
        local_pos,
        depth.stride(0),
        ancestor_mask.stride(0),
        batch_mask.stride(0),
        idx_mapping.shape[0],
        BLOCK_NODES=triton.next_power_of_2(depth.shape[1]),
        num_warps=1,
    )
