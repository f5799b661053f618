# SPDX-License-Identifier: Apache-2.0
"""Block tables: the kernels of ``vllm/v1/worker/gpu/block_table.py`` and of the staged writes in ``buffer_utils.py``.

vLLM passes the tables of all KV cache groups as a tensor of addresses, so the compiled code builds its arrays from
addresses too.
"""

import numba
import numpy as np
import torch
from numba import types
from numba.extending import intrinsic

from vllm_kvspec.engine.cpu.kernels.compiled import (
    BOOL,
    BOOLS,
    I32,
    I64,
    INT,
    U64,
    compiled,
    copy_bytes,
    flat,
    integers,
)

_NONE = np.zeros(1, dtype=np.int32)


@intrinsic
def _int32_pointer(typing_context, address):
    pointer = types.CPointer(types.int32)

    def generate(context, builder, signature, arguments):
        return builder.inttoptr(arguments[0], context.get_value_type(pointer))

    return pointer(types.uint64), generate


@compiled(I64, U64, U64, I64, I32, INT, INT, INT, I32, I32, I32, BOOL)
def _gather(
    mapping,
    sources,
    destinations,
    strides,
    num_blocks,
    num_blocks_stride,
    num_reqs,
    num_rows,
    num_computed,
    reach,
    block_sizes,
    mask_window,
):
    for group in range(len(sources)):
        stride = strides[group]
        out = numba.carray(_int32_pointer(destinations[group]), num_rows * stride)
        for row in range(num_rows):
            if row >= num_reqs:
                out[row * stride : (row + 1) * stride] = 0
                continue
            request = mapping[row]
            table = numba.carray(_int32_pointer(sources[group]), (request + 1) * stride)
            num_null = 0
            if mask_window and reach[group] > 0:
                num_null = max(num_computed[request] - reach[group], 0) // block_sizes[group]
            for i in range(num_blocks[group * num_blocks_stride + request]):
                out[row * stride + i] = table[request * stride + i] if i >= num_null else 0


def gather_block_tables(
    grid,
    batch_idx_to_req_idx: torch.Tensor,
    src_block_table_ptrs: torch.Tensor,
    dst_block_table_ptrs: torch.Tensor,
    block_table_strides: torch.Tensor,
    num_blocks_ptr: torch.Tensor,
    num_blocks_stride: int,
    num_reqs: int,
    # 0.33: blocks below a sliding window read as the null block.
    num_computed_tokens_ptr: torch.Tensor | None = None,
    sliding_window_reach_ptr: torch.Tensor | None = None,
    block_sizes_ptr: torch.Tensor | None = None,
    *,
    MASK_SLIDING_WINDOW: bool = False,
    **tiles,
) -> None:
    """Needs the launch grid: nothing else says how many rows to clear beyond ``num_reqs``."""
    _gather(
        integers(batch_idx_to_req_idx),
        flat(src_block_table_ptrs),
        flat(dst_block_table_ptrs),
        flat(block_table_strides),
        flat(num_blocks_ptr),
        num_blocks_stride,
        num_reqs,
        grid[1],
        flat(num_computed_tokens_ptr) if MASK_SLIDING_WINDOW else _NONE,
        flat(sliding_window_reach_ptr) if MASK_SLIDING_WINDOW else _NONE,
        flat(block_sizes_ptr) if MASK_SLIDING_WINDOW else _NONE,
        MASK_SLIDING_WINDOW,
    )


@compiled(INT, I64, I64, I64, U64, I64, I32, BOOLS, I64, INT, INT)
def _map_slots(
    max_num_tokens, mapping, query_start, positions, tables, strides, block_sizes, enabled, slots, slots_stride, pad
):
    num_reqs = len(mapping)
    for group in range(len(tables)):
        out = slots[group * slots_stride : group * slots_stride + max_num_tokens]
        block_size = np.int64(block_sizes[group])
        for row in range(num_reqs):
            request = mapping[row]
            if request < 0 or not enabled[group]:
                out[query_start[row] : query_start[row + 1]] = pad
                continue
            first = request * strides[group]
            table = numba.carray(_int32_pointer(tables[group]), first + strides[group])
            for i in range(query_start[row], query_start[row + 1]):
                block = positions[i] // block_size
                out[i] = table[first + block] * block_size + positions[i] - block * block_size
        out[query_start[num_reqs] :] = pad


def compute_slot_mappings(
    max_num_tokens: int,
    idx_mapping: torch.Tensor,
    query_start_loc: torch.Tensor,
    pos: torch.Tensor,
    block_table_ptrs: torch.Tensor,
    block_table_strides: torch.Tensor,
    block_sizes: torch.Tensor,
    slot_mapping_enabled: torch.Tensor,
    dcp_sharded: torch.Tensor,
    slot_mappings_ptr: torch.Tensor,
    slot_mappings_stride: int,
    cp_rank: int,
    *,
    CP_SIZE: int,
    CP_INTERLEAVE: int,
    PAD_ID: int,
    **tiles,
) -> None:
    if CP_SIZE != 1:
        raise ValueError(f"Context parallelism needs a GPU; found size {CP_SIZE}.")
    _map_slots(
        max_num_tokens,
        integers(idx_mapping),
        integers(query_start_loc),
        integers(pos),
        flat(block_table_ptrs),
        flat(block_table_strides),
        flat(block_sizes),
        flat(slot_mapping_enabled),
        flat(slot_mappings_ptr),
        slot_mappings_stride,
        PAD_ID,
    )


def apply_write(
    output_ptr: torch.Tensor,
    output_stride,
    write_indices_ptr: torch.Tensor,
    write_starts_ptr: torch.Tensor,
    write_contents_ptr: torch.Tensor,
    write_cu_lens_ptr: torch.Tensor,
    write_group_ids_ptr: torch.Tensor | None,
    *,
    MULTI_GROUP: bool,
    **tiles,
) -> None:
    """Staged writes of one tensor, or (MULTI_GROUP) of one tensor per group, given by addresses and row strides."""
    contents = flat(write_contents_ptr)
    num_writes = len(write_indices_ptr)
    size = contents.itemsize
    if MULTI_GROUP:
        groups = flat(write_group_ids_ptr)
        bases, strides = flat(output_ptr)[groups].tolist(), flat(output_stride)[groups].tolist()
    else:
        bases, strides = [output_ptr.data_ptr()] * num_writes, [output_stride] * num_writes
    address = contents.ctypes.data
    end = 0
    for base, stride, row, start, next_end in zip(
        bases,
        strides,
        write_indices_ptr.tolist(),
        write_starts_ptr.tolist(),
        write_cu_lens_ptr.tolist(),
        strict=True,
    ):
        copy_bytes(base + (row * stride + start) * size, address + end * size, (next_end - end) * size)
        end = next_end
