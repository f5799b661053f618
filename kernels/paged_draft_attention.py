# SPDX-License-Identifier: Apache-2.0
"""The draft head's attention: block queries over the target's paged KV, read in place, plus the block's own K/V.

    out[b, g] = softmax(scale * q[b, g] . [K_context, K_block])[V_context, V_block]

Every query row of a request sees the same context (up to the sliding window) and the whole block, or with CAUSAL the
block up to its own row, so the G query positions times the query heads of one KV head form one tile: each KV byte is
read once per KV head (per 128 rows if there are more). Without K_block the rows are queries alone, all at the context's
last position. Small batches are cut along the context into SPLITS programs (flash-decoding) whose results are merged by
a second, tiny kernel; the first split also takes the block's own keys. A draft head has no ALiBi, soft-cap or sinks,
whatever its target has.
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


@triton.jit
def _paged_draft_attention_kernel(
    q_ptr,
    k_cache_ptr,
    v_cache_ptr,
    block_table_ptr,
    context_lens_ptr,
    k_block_ptr,
    v_block_ptr,
    k_scale,
    v_scale,
    out_ptr,
    part_out_ptr,
    part_max_ptr,
    part_sum_ptr,
    stride_q_b,
    stride_q_g,
    stride_q_h,
    stride_k_block,
    stride_k_slot,
    stride_k_h,
    stride_v_block,
    stride_v_slot,
    stride_v_h,
    stride_table_b,
    stride_kb_b,
    stride_kb_g,
    stride_kb_h,
    stride_vb_b,
    stride_vb_g,
    stride_vb_h,
    stride_out_b,
    stride_out_g,
    stride_out_h,
    scale,
    NUM_KV_HEADS: tl.constexpr,
    GROUP: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    CAUSAL: tl.constexpr,
    K_SCALE_TENSOR: tl.constexpr,
    V_SCALE_TENSOR: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_D: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_M: tl.constexpr,
    TILE: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    kv_head = (tl.program_id(1) % NUM_KV_HEADS).to(tl.int64)
    row = tl.program_id(1) // NUM_KV_HEADS * BLOCK_M + tl.arange(0, BLOCK_M)
    split = tl.program_id(2)
    g = row // GROUP
    head = kv_head * GROUP + row % GROUP
    live = g < BLOCK_ROWS
    dim = tl.arange(0, BLOCK_D)
    in_dim = dim < HEAD_DIM
    context_len = tl.load(context_lens_ptr + b)

    # [BLOCK_M, BLOCK_D]
    q_offset = b * stride_q_b + g.to(tl.int64) * stride_q_g + head * stride_q_h
    q = tl.load(q_ptr + q_offset[:, None] + dim[None, :], mask=live[:, None] & in_dim[None, :], other=0.0)
    row_max = tl.full([BLOCK_M], float("-inf"), tl.float32)
    row_sum = tl.zeros([BLOCK_M], tl.float32)
    acc = tl.zeros([BLOCK_M, BLOCK_D], tl.float32)

    qk_scale = scale * LOG2_E
    HAS_BLOCK: tl.constexpr = k_block_ptr is not None
    # The block's own keys come first, while no context tile is in flight: after the loop they would spill. Only cached
    # values carry v_scale, which multiplies everything at the end.
    # Nested: the outer test is settled at compile time.
    if HAS_BLOCK:  # noqa: SIM102
        if split == 0:
            for first in tl.range(0, BLOCK_ROWS, BLOCK_G, num_stages=1):
                key = first + tl.arange(0, BLOCK_G)
                in_block = key < BLOCK_ROWS
                k_row = b * stride_kb_b + key.to(tl.int64) * stride_kb_g + kv_head * stride_kb_h
                v_row = b * stride_vb_b + key.to(tl.int64) * stride_vb_g + kv_head * stride_vb_h
                k_mask, v_mask = in_block[None, :] & in_dim[:, None], in_block[:, None] & in_dim[None, :]
                k = tl.load(k_block_ptr + k_row[None, :] + dim[:, None], mask=k_mask, other=0.0)
                v = tl.load(v_block_ptr + v_row[:, None] + dim[None, :], mask=v_mask, other=0.0)
                visible = in_block[None, :] & live[:, None]
                if CAUSAL:
                    visible = visible & (key[None, :] <= g[:, None])
                row_max, row_sum, acc = softmax_step(q, k, v, visible, row_max, row_sum, acc, qk_scale, True)
            acc = acc / scalar(v_scale, V_SCALE_TENSOR)

    first_key = 0
    if WINDOW > 0:
        # Query 0 sees the lowest key of all: at position context_len, or without own keys one before.
        first_key = tl.maximum(context_len - WINDOW + (1 if HAS_BLOCK else 0), 0)
    first_tile = first_key // TILE
    num_tiles = tl.cdiv(context_len, TILE) - first_tile
    share = tl.cdiv(tl.maximum(num_tiles, 0), SPLITS)
    begin = first_tile + split * share
    end = tl.minimum(begin + share, first_tile + num_tiles)
    # Whole tiles that every row sees need no masks; a window is small, so then all tiles are masked.
    full_end = begin
    if WINDOW == 0:
        full_end = tl.minimum(end, context_len // TILE)

    k_ptr = k_cache_ptr + kv_head * stride_k_h
    v_ptr = v_cache_ptr + kv_head * stride_v_h
    table_ptr = block_table_ptr + b * stride_table_b
    context_scale = qk_scale * scalar(k_scale, K_SCALE_TENSOR)
    for tile in range(begin, full_end):
        keys = tile * TILE + tl.arange(0, TILE)
        k, v = load_kv_tile(
            k_ptr, v_ptr, table_ptr, keys, keys >= 0, dim,
            stride_k_block, stride_k_slot, stride_v_block, stride_v_slot, BLOCK_SIZE, HEAD_DIM,
        )  # fmt: skip
        row_max, row_sum, acc = softmax_step(q, k, v, live[:, None], row_max, row_sum, acc, context_scale, False)
    for tile in range(tl.maximum(begin, full_end), end):
        keys = tile * TILE + tl.arange(0, TILE)
        valid = (keys >= first_key) & (keys < context_len)
        k, v = load_kv_tile(
            k_ptr, v_ptr, table_ptr, keys, valid, dim,
            stride_k_block, stride_k_slot, stride_v_block, stride_v_slot, BLOCK_SIZE, HEAD_DIM,
        )  # fmt: skip
        visible = valid[None, :] & live[:, None]
        # Queries alone see the window that they begin with.
        if WINDOW > 0 and HAS_BLOCK:
            visible = visible & (context_len + g[:, None] - keys[None, :] < WINDOW)
        row_max, row_sum, acc = softmax_step(q, k, v, visible, row_max, row_sum, acc, context_scale, True)
    acc = acc * scalar(v_scale, V_SCALE_TENSOR)

    out_offset = b * stride_out_b + g.to(tl.int64) * stride_out_g + head * stride_out_h
    part_row = (b * BLOCK_ROWS + g) * (NUM_KV_HEADS * GROUP) + head
    store_rows(
        out_ptr, out_offset, part_out_ptr, part_max_ptr, part_sum_ptr, part_row, split, live, dim,
        row_max, row_sum, acc, HEAD_DIM, SPLITS,
    )  # fmt: skip


def paged_draft_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    k_block: torch.Tensor | None,
    v_block: torch.Tensor | None,
    *,
    scale: float,
    sliding_window: int = 0,
    causal: bool = False,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
    out: torch.Tensor,
) -> torch.Tensor:
    """Write and return out ``[B, G, Hq, D]``; see `reference.paged_draft_attention`.

    q ``[B, G, Hq, D]``, k_cache and v_cache ``[num_blocks, block_size, Hkv, D]`` (any strides but 1 in D, possibly
    fp8), block_table int32 ``[>=B, M]``, context_lens int32 ``[>=B]``, k_block and v_block ``[B, G, Hkv, D]``, or None.
    out is contiguous in its first two dimensions. Raises ValueError for shapes or strides that do not fit.
    """
    block = () if k_block is None else (k_block, v_block)
    check_heads(q, k_cache, v_cache, out, *block)
    num_reqs, block_rows, num_heads, head_dim = q.shape
    if num_reqs == 0:
        return out
    block_size, num_kv_heads = k_cache.shape[1:3]
    group = num_heads // num_kv_heads
    config = tile_config(block_rows * group, q)
    row_tiles = triton.cdiv(block_rows * group, config["BLOCK_M"])
    programs = num_reqs * num_kv_heads * row_tiles
    splits = num_splits(programs, block_table.shape[1] * block_size, q.device, config["num_warps"])
    parts = new_parts(num_reqs * block_rows, num_heads, splits, head_dim, q.device)
    _paged_draft_attention_kernel[(num_reqs, num_kv_heads * row_tiles, splits)](
        q,
        k_cache,
        v_cache,
        block_table,
        context_lens,
        k_block,
        v_block,
        k_scale,
        v_scale,
        out,
        *parts,
        *q.stride()[:3],
        *k_cache.stride()[:3],
        *v_cache.stride()[:3],
        block_table.stride(0),
        *(stride for rows in block for stride in rows.stride()[:3]),
        *(0,) * (0 if block else 6),
        *out.stride()[:3],
        scale,
        NUM_KV_HEADS=num_kv_heads,
        GROUP=group,
        HEAD_DIM=head_dim,
        BLOCK_ROWS=block_rows,
        BLOCK_SIZE=block_size,
        WINDOW=sliding_window,
        CAUSAL=causal,
        K_SCALE_TENSOR=torch.is_tensor(k_scale),
        V_SCALE_TENSOR=torch.is_tensor(v_scale),
        SPLITS=splits,
        BLOCK_D=triton.next_power_of_2(head_dim),
        BLOCK_G=min(config["TILE"], max(16, triton.next_power_of_2(block_rows))),
        **config,
    )
    if splits > 1:
        merge_splits(parts, out.view(num_reqs * block_rows, num_heads, head_dim), None)
    return out
