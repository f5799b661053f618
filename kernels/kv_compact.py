# SPDX-License-Identifier: Apache-2.0
"""Move the KV rows of the accepted tree path to contiguous slots, all layers in one launch.

Verification writes node t's K/V at flat position ``base + t``; the next step expects the accepted token of depth d at
``base + d``. One program per (request, layer) copies whole rows (all KV heads, K and V) as integers, so every cache
dtype and every stride order works. Depths go up one by one: ``path[d] >= d`` and increasing, so a row is read before
any later copy overwrites it. Layers are reached through a table of base addresses, because they are separate tensors.
"""

import torch
import triton
import triton.language as tl

from vllm_kvspec.kernels.reference import kv_base_ptrs

__all__ = ["kv_base_ptrs", "kv_compact"]

_WORDS = {8: tl.int64, 4: tl.int32, 2: tl.int16, 1: tl.uint8}


@triton.jit
def _kv_compact_kernel(
    base_ptrs_ptr,
    block_table_ptr,
    base_ptr,
    path_ptr,
    num_sampled_ptr,
    stride_block,
    stride_head,
    stride_slot,
    stride_table_b,
    stride_path_b,
    num_heads,
    content,
    WORD: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    BLOCK_HEADS: tl.constexpr,
    BLOCK_CONTENT: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    n = tl.load(num_sampled_ptr + b)
    if n <= 1:
        return
    address = tl.multiple_of(tl.load(base_ptrs_ptr + tl.program_id(1)), 16)
    cache_ptr = address.to(tl.pointer_type(WORD))
    base = tl.load(base_ptr + b)
    table_ptr = block_table_ptr + b * stride_table_b
    head = tl.arange(0, BLOCK_HEADS).to(tl.int64)[:, None]
    word = tl.arange(0, BLOCK_CONTENT)[None, :]
    # [BLOCK_HEADS, BLOCK_CONTENT]
    offset = head * stride_head + word
    inside = (head < num_heads) & (word < content)
    for d in range(1, n):
        src = tl.load(path_ptr + b * stride_path_b + d).to(tl.int64)
        if src != d:
            src_block = tl.load(table_ptr + (base + src) // BLOCK_SIZE).to(tl.int64)
            dst_block = tl.load(table_ptr + (base + d) // BLOCK_SIZE).to(tl.int64)
            src_row = src_block * stride_block + (base + src) % BLOCK_SIZE * stride_slot
            dst_row = dst_block * stride_block + (base + d) % BLOCK_SIZE * stride_slot
            row = tl.load(cache_ptr + src_row + offset, mask=inside, other=0)
            tl.store(cache_ptr + dst_row + offset, row, mask=inside)


def kv_compact(
    kv_caches: list[torch.Tensor],
    base_ptrs: torch.Tensor,
    block_table: torch.Tensor,
    base: torch.Tensor,
    path: torch.Tensor,
    num_sampled: torch.Tensor,
) -> None:
    """Copy position ``base + path[d]`` to ``base + d`` in every cache, in place; see `reference.kv_compact`.

    kv_caches ``[num_blocks, num_kv_heads, block_size, content]`` as accepted by `kv_base_ptrs`, base_ptrs int64
    ``[num_layers]`` from it, block_table int32 ``[>=B, M]``, base int64 ``[B]``, path int32 ``[B, N1]``,
    num_sampled int32 ``[B]``.
    """
    cache = kv_caches[0]
    _, num_heads, block_size, content = cache.shape
    size = cache.element_size()
    block, head, slot = (stride * size for stride in cache.stride()[:3])
    row_bytes = content * size
    width = next(w for w in _WORDS if all(x % w == 0 for x in (block, head, slot, row_bytes)))
    if num_sampled.shape[0] == 0:
        return
    _kv_compact_kernel[(num_sampled.shape[0], len(kv_caches))](
        base_ptrs,
        block_table,
        base,
        path,
        num_sampled,
        block // width,
        head // width,
        slot // width,
        block_table.stride(0),
        path.stride(0),
        num_heads,
        row_bytes // width,
        WORD=_WORDS[width],
        BLOCK_SIZE=block_size,
        BLOCK_HEADS=triton.next_power_of_2(num_heads),
        BLOCK_CONTENT=triton.next_power_of_2(row_bytes // width),
    )
