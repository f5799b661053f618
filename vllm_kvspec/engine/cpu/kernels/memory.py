# SPDX-License-Identifier: Apache-2.0
"""Kernels that only move bytes at addresses: prompt embeddings, and KV blocks that must start as zeros.

(``vllm/v1/worker/gpu/model_states/prompt_embeds.py`` and ``_zero_kv_blocks_kernel`` of ``vllm/v1/worker/utils.py``.)
"""

import ctypes

import torch

from vllm_kvspec.engine.cpu.kernels.compiled import copy_bytes


def apply_prompt_embeds(
    inputs_embeds_ptr: torch.Tensor,
    inputs_embeds_stride: int,
    embeds_ptrs_ptr: torch.Tensor,
    mask_ptrs_ptr: torch.Tensor,
    embeds_lens_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    hidden_size: int,
    **tiles,
) -> None:
    """Rows that a request brought as embeddings replace those looked up, except where its mask says token."""
    starts = query_start_loc_ptr.tolist()
    row_bytes = hidden_size * inputs_embeds_ptr.element_size()
    for batch, request in enumerate(idx_mapping_ptr.tolist()):
        done, length = int(num_computed_tokens_ptr[request]), int(embeds_lens_ptr[request])
        source, mask = int(embeds_ptrs_ptr[request]), int(mask_ptrs_ptr[request])
        for i in range(min(starts[batch + 1] - starts[batch], length - done)):
            if mask and ctypes.c_uint8.from_address(mask + done + i).value:
                continue
            row = inputs_embeds_ptr[starts[batch] + i]
            copy_bytes(row.data_ptr(), source + (done + i) * row_bytes, row_bytes)


def zero_kv_blocks(
    seg_addrs_ptr: torch.Tensor,
    seg_block_strides_ptr: torch.Tensor,
    seg_page_sizes_ptr: torch.Tensor,
    block_ids_ptr: torch.Tensor,
    **tiles,
) -> None:
    """Strides and sizes count 4-byte words."""
    segments = zip(seg_addrs_ptr.tolist(), seg_block_strides_ptr.tolist(), seg_page_sizes_ptr.tolist(), strict=True)
    blocks = block_ids_ptr.tolist()
    for address, stride, size in segments:
        for block in blocks:
            ctypes.memset(address + 4 * block * stride, 0, 4 * size)
