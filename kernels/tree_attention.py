# SPDX-License-Identifier: Apache-2.0
"""Target verification attention: causal attention over paged KV, with an ancestor mask among tree rows.

Handles prompts, plain decoding and trees in one batch. A tile holds BLOCK_Q query rows of one request times the query
heads of one KV head (BLOCK_M rows), so grouped heads share every KV read. Key tiles that all rows of the tile see whole
run without any mask arithmetic; the few at and past the first causal or tree boundary test, per row and key, the bit of
the row's int64 ancestor mask. Programs find their request by bisection in ``query_start_loc``: request b's first tile
is number ``query_start_loc[b] // BLOCK_Q + b``, which never overlaps the next one's, so the grid follows from shapes
alone. Short queries (decoding, trees) of small batches are cut along the keys into SPLITS programs and merged. A head's
sink is what the softmax of its first split starts with. Not supported: ALiBi.
"""

import torch
import triton
import triton.language as tl

from vllm_kvspec.kernels._paged_softmax import (
    LOG2_E,
    check_heads,
    load_kv_tile,
    merge_splits,
    new_parts,
    num_splits,
    scalar,
    softmax_step,
    store_rows,
    tile_config,
)

# Longest query for which keys are split: a tree with its root. Longer ones have enough query tiles.
_MAX_SPLIT_QUERY = 64


@triton.jit
def _popcount(mask):
    """Number of set bits of int64 values."""
    mask = mask - ((mask >> 1) & 0x5555555555555555)
    mask = (mask & 0x3333333333333333) + ((mask >> 2) & 0x3333333333333333)
    mask = (mask + (mask >> 4)) & 0x0F0F0F0F0F0F0F0F
    return ((mask * 0x0101010101010101) >> 56).to(tl.int32)


@triton.jit
def _find_request(query_start_loc_ptr, tile, num_reqs, BLOCK_Q: tl.constexpr):
    """The last request whose first query tile is not past `tile`."""
    low = 0
    high = num_reqs
    while low < high:
        middle = (low + high) // 2
        first = tl.load(query_start_loc_ptr + middle) // BLOCK_Q + middle
        if first <= tile:
            low = middle + 1
        else:
            high = middle
    return low - 1


@triton.jit(do_not_specialize=["num_reqs"])
def _tree_attention_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_table_ptr,
    query_start_loc_ptr,
    seq_lens_ptr,
    batch_mask_ptr,
    batch_len_ptr,
    sinks_ptr,
    q_scale,
    k_scale,
    v_scale,
    out_ptr,
    part_out_ptr,
    part_max_ptr,
    part_sum_ptr,
    stride_q_t,
    stride_q_h,
    stride_k_block,
    stride_k_slot,
    stride_k_h,
    stride_v_block,
    stride_v_slot,
    stride_v_h,
    stride_table_b,
    stride_mask_b,
    stride_out_t,
    stride_out_h,
    num_reqs,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    Q_SCALE_TENSOR: tl.constexpr,
    K_SCALE_TENSOR: tl.constexpr,
    V_SCALE_TENSOR: tl.constexpr,
    SOFT_CAP: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
):
    query_tile = tl.program_id(0)
    b = _find_request(query_start_loc_ptr, query_tile, num_reqs, BLOCK_Q)
    start = tl.load(query_start_loc_ptr + b)
    n = tl.load(query_start_loc_ptr + b + 1) - start
    first_query = (query_tile - (start // BLOCK_Q + b)) * BLOCK_Q
    if first_query >= n:
        return
    kv_head = tl.program_id(1).to(tl.int64)
    split = tl.program_id(2)
    b = b.to(tl.int64)
    seq_len = tl.load(seq_lens_ptr + b)
    tree = tl.load(batch_len_ptr + b)
    context_len = seq_len - n
    tree_start = seq_len - tree

    m = tl.arange(0, BLOCK_M)
    i = first_query + m // GROUP
    live = (m < BLOCK_Q * GROUP) & (i < n)
    head = kv_head * GROUP + m % GROUP
    dim = tl.arange(0, BLOCK_D)
    row = (start + i).to(tl.int64)
    q_mask = live[:, None] & (dim < HEAD_DIM)[None, :]
    # [BLOCK_M, BLOCK_D]
    q = tl.load(q_ptr + (row * stride_q_t + head * stride_q_h)[:, None] + dim[None, :], mask=q_mask, other=0.0)
    # A quantised query too: products in the output's dtype.
    q = q.to(out_ptr.dtype.element_ty)
    flat = context_len + i
    # Real masks hold bit 0, so 0 marks a row outside the tree.
    is_tree_row = live & (flat >= tree_start)
    row_mask_ptr = batch_mask_ptr + b * stride_mask_b
    row_mask = tl.load(row_mask_ptr + (flat - tree_start), mask=is_tree_row, other=0)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)
    # Nested: the outer test is settled at compile time, and without sinks there is nothing to load.
    if sinks_ptr is not None:  # noqa: SIM102
        if split == 0:
            # A key without a value, which only the denominator sees.
            row_max = tl.load(sinks_ptr + head, mask=live, other=0.0).to(tl.float32) * LOG2_E
            row_sum = tl.full([BLOCK_M], 1.0, tl.float32)

    last_key = context_len + tl.minimum(first_query + BLOCK_Q, n)
    lowest = tl.minimum(context_len + first_query, tree_start)
    first_key = 0
    if WINDOW > 0:
        true_row = tl.where(is_tree_row, tree_start + _popcount(row_mask) - 1, flat)
        first_key = tl.maximum(lowest - WINDOW + 1, 0)
    first_tile = first_key // TILE
    num_tiles = tl.cdiv(last_key, TILE) - first_tile
    share = tl.cdiv(num_tiles, SPLITS)
    begin = first_tile + split * share
    end = tl.minimum(begin + share, first_tile + num_tiles)
    # Tiles that every row sees whole need no masks; a window is small, so then all tiles are masked.
    full_end = begin
    if WINDOW == 0:
        full_end = tl.minimum(end, tl.minimum(context_len + first_query + 1, tree_start) // TILE)

    k_ptr = k_cache_ptr + kv_head * stride_k_h
    v_ptr = v_cache_ptr + kv_head * stride_v_h
    table_ptr = block_table_ptr + b * stride_table_b
    qk_scale = scale * LOG2_E * scalar(q_scale, Q_SCALE_TENSOR) * scalar(k_scale, K_SCALE_TENSOR)
    for tile in range(begin, full_end):
        keys = tile * TILE + tl.arange(0, TILE)
        k, v = load_kv_tile(
            k_ptr, v_ptr, table_ptr, keys, keys >= 0, dim,
            stride_k_block, stride_k_slot, stride_v_block, stride_v_slot, BLOCK_SIZE, HEAD_DIM,
        )  # fmt: skip
        row_max, row_sum, acc = softmax_step(q, k, v, live[:, None], row_max, row_sum, acc, qk_scale, False, SOFT_CAP)
    for tile in range(tl.maximum(begin, full_end), end):
        keys = tile * TILE + tl.arange(0, TILE)
        valid = (keys >= first_key) & (keys < last_key)
        k, v = load_kv_tile(
            k_ptr, v_ptr, table_ptr, keys, valid, dim,
            stride_k_block, stride_k_slot, stride_v_block, stride_v_slot, BLOCK_SIZE, HEAD_DIM,
        )  # fmt: skip
        tree_key = keys - tree_start
        shift = tl.minimum(tl.maximum(tree_key, 0), 63).to(tl.int64)
        is_ancestor = ((row_mask[:, None] >> shift[None, :]) & 1) != 0
        visible = valid[None, :] & (keys[None, :] <= flat[:, None])
        visible = visible & (is_ancestor | (row_mask == 0)[:, None] | (tree_key < 0)[None, :])
        if WINDOW > 0:
            is_tree_key = valid & (tree_key >= 0)
            key_mask = tl.load(row_mask_ptr + shift, mask=is_tree_key, other=0)
            true_key = tl.where(is_tree_key, tree_start + _popcount(key_mask) - 1, keys)
            visible = visible & (true_row[:, None] - true_key[None, :] < WINDOW)
        row_max, row_sum, acc = softmax_step(q, k, v, visible, row_max, row_sum, acc, qk_scale, True, SOFT_CAP)
    acc = acc * scalar(v_scale, V_SCALE_TENSOR)

    out_offset = row * stride_out_t + head * stride_out_h
    part_row = row * (NUM_KV_HEADS * GROUP) + head
    store_rows(
        out_ptr, out_offset, part_out_ptr, part_max_ptr, part_sum_ptr, part_row, split, live, dim,
        row_max, row_sum, acc, HEAD_DIM, SPLITS,
    )  # fmt: skip


def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    batch_mask: torch.Tensor,
    batch_len: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    sliding_window: int = 0,
    q_scale: float | torch.Tensor = 1.0,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Write the real rows of out ``[T, Hq, D]`` and return it; see `reference.tree_attention`.

    q ``[T, Hq, D]``, k_cache and v_cache ``[num_blocks, block_size, Hkv, D]`` (any strides but 1 in D; possibly fp8),
    block_table int32 ``[>=B, M]``, query_start_loc int32 ``[>=B+1]``, seq_lens int32 ``[B]``, batch_mask int64
    ``[Rmax, N1]`` with contiguous rows, batch_len int32 ``[Rmax]``, sinks ``[Hq]``, contiguous, or None. Raises
    ValueError for shapes or strides that do not fit.
    """
    check_heads(q, k_cache, v_cache, out)
    num_reqs = seq_lens.shape[0]
    num_rows, num_heads, head_dim = q.shape
    if num_reqs == 0 or num_rows == 0:
        return out
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    config = tile_config(min(max_query_len, num_rows) * group, q, group, sliding_window > 0)
    block_q = config["BLOCK_M"] // group
    query_tiles = num_rows // block_q + num_reqs
    splits = 1
    if max_query_len <= _MAX_SPLIT_QUERY:
        # Of the grid's tiles, those that have rows.
        live_tiles = min(query_tiles, num_reqs * triton.cdiv(max_query_len, block_q))
        splits = num_splits(live_tiles * num_kv_heads, block_table.shape[1] * block_size, q.device, config["num_warps"])
    parts = new_parts(num_rows, num_heads, splits, head_dim, q.device)
    _tree_attention_kernel[(query_tiles, num_kv_heads, splits)](
        q,
        k_cache,
        v_cache,
        block_table,
        query_start_loc,
        seq_lens,
        batch_mask,
        batch_len,
        sinks,
        q_scale,
        k_scale,
        v_scale,
        out,
        *parts,
        *q.stride()[:2],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_table.stride(0),
        batch_mask.stride(0),
        *out.stride()[:2],
        num_reqs,
        scale,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_SIZE=block_size,
        WINDOW=sliding_window,
        Q_SCALE_TENSOR=torch.is_tensor(q_scale),
        K_SCALE_TENSOR=torch.is_tensor(k_scale),
        V_SCALE_TENSOR=torch.is_tensor(v_scale),
        SOFT_CAP=soft_cap,
        SPLITS=splits,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_Q=block_q,
        **config,
    )
    if splits > 1:
        merge_splits(parts, out, query_start_loc[num_reqs : num_reqs + 1])
    return out
