# SPDX-License-Identifier: Apache-2.0
"""What a step reports about its samples: log-probabilities, ranks, sampling masks, NaN counts, flattened samples.

(``vllm/v1/worker/gpu/sample/{logprob,output}.py``, ``metrics/logits.py`` and ``spec_decode/rejection_sampler.py``.)
"""

import numpy as np
import torch

from vllm_kvspec.engine.cpu.kernels.compiled import (
    BOOLS,
    F32,
    I32,
    I64,
    INT,
    U8,
    compiled,
    flat,
    integers,
    row_chunks,
)

_NO_TOKENS = np.zeros(1, dtype=np.int64)


def topk_log_softmax(
    output_ptr: torch.Tensor,
    logits_ptr: torch.Tensor,
    logits_stride: int,
    topk_ids_ptr: torch.Tensor,
    topk_ids_stride: int,
    topk: int,
    vocab_size: int,
    **tiles,
) -> None:
    for rows in row_chunks(logits_ptr.shape[0]):
        logits = logits_ptr[rows].float()
        maximum = logits.amax(dim=-1, keepdim=True)
        log_sum = (logits - maximum).exp_().sum(dim=-1, keepdim=True).log_()
        output_ptr[rows] = logits.gather(-1, topk_ids_ptr[rows].long()) - maximum - log_sum


@compiled(I64, F32, INT, I64, INT)
def _count_not_below(ranks, logits, stride, tokens, vocab_size):
    for row in range(len(tokens)):
        part = logits[row * stride : row * stride + vocab_size]
        x = part[tokens[row]]
        rank = np.int32(0)
        for i in range(vocab_size):
            rank += np.int32(part[i] >= x)
        ranks[row] = rank


def ranks(
    output_ptr: torch.Tensor,
    logits_ptr: torch.Tensor,
    logits_stride: int,
    token_ids_ptr: torch.Tensor,
    vocab_size: int,
    **tiles,
) -> None:
    tokens = integers(token_ids_ptr)
    for rows in row_chunks(logits_ptr.shape[0]):
        logits = logits_ptr[rows].float()
        _count_not_below(flat(output_ptr)[rows], flat(logits), logits.stride(0), tokens[rows], vocab_size)


@compiled(I64, INT, BOOLS, INT, I64, I64, INT, I64, I64, I32, INT, INT)
def _list_tokens(out, out_stride, valid, valid_stride, sampled, topk, topk_stride, mapping, nums, own, own_stride, k):
    for row in range(len(mapping)):
        request = mapping[row]
        out[row * out_stride] = sampled[row]
        valid[row * valid_stride] = True
        n = nums[request]
        for i in range(n if n > 0 else k):
            token = np.int64(own[request * own_stride + i]) if n > 0 else topk[row * topk_stride + i]
            out[row * out_stride + 1 + i] = token
            valid[row * valid_stride + 1 + i] = True


def fill_logprob_token_ids(
    out_token_ids_ptr: torch.Tensor,
    out_token_ids_stride: int,
    out_valid_mask_ptr: torch.Tensor,
    out_valid_mask_stride: int,
    sampled_token_ids_ptr: torch.Tensor,
    topk_indices_ptr: torch.Tensor,
    topk_indices_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    num_per_req_token_ids_ptr: torch.Tensor,
    per_req_token_ids_ptr: torch.Tensor,
    per_req_token_ids_stride: int,
    *,
    NUM_TOPK: int,
    **tiles,
) -> None:
    """The sampled token, then the tokens a request named, or else the top k."""
    _list_tokens(
        flat(out_token_ids_ptr),
        out_token_ids_stride,
        flat(out_valid_mask_ptr),
        out_valid_mask_stride,
        integers(sampled_token_ids_ptr),
        integers(topk_indices_ptr) if NUM_TOPK > 0 else _NO_TOKENS,
        topk_indices_stride,
        integers(expanded_idx_mapping_ptr),
        integers(num_per_req_token_ids_ptr),
        flat(per_req_token_ids_ptr),
        per_req_token_ids_stride,
        NUM_TOPK,
    )


@compiled(F32, INT, I32, U8, I32)
def _list_kept(logits, max_kept, tokens, packed, count_out):
    count = 0
    packed[:] = 0
    for i in range(len(logits)):
        if -np.inf < logits[i] < np.inf:
            if count < max_kept:
                tokens[count] = i
            packed[i // 8] |= np.uint8(1 << (i % 8))
            count += 1
    count_out[0] = count


def compact_sampling_mask(
    logits_ptr: torch.Tensor,
    logits_row_stride: int,
    logits_col_stride: int,
    cu_num_logits_ptr: torch.Tensor,
    num_sampled_tokens_ptr: torch.Tensor,
    token_ids_ptr: torch.Tensor,
    token_ids_row_stride: int,
    packed_mask_ptr: torch.Tensor,
    packed_mask_row_stride: int,
    counts_ptr: torch.Tensor,
    vocab_size: int,
    max_num_kept: int,
    *,
    ROWS_PER_REQUEST: int,
    **tiles,
) -> None:
    """Of each sampled row: the tokens that could be drawn, as a list cut at ``max_num_kept`` and as bits."""
    starts, num_sampled = cu_num_logits_ptr.tolist(), num_sampled_tokens_ptr.tolist()
    counts = flat(counts_ptr)
    for out_row in range(counts_ptr.shape[0]):
        request, slot = divmod(out_row, ROWS_PER_REQUEST)
        if slot >= num_sampled[request]:
            counts[out_row] = 0
            continue
        logits = logits_ptr[starts[request] + slot].float().contiguous()
        _list_kept(
            flat(logits),
            max_num_kept,
            flat(token_ids_ptr[out_row]),
            flat(packed_mask_ptr[out_row]),
            counts[out_row : out_row + 1],
        )


def num_nans(
    logits_ptr: torch.Tensor, logits_stride: int, num_nans_ptr: torch.Tensor, vocab_size: int, **tiles
) -> None:
    for rows in row_chunks(logits_ptr.shape[0]):
        num_nans_ptr[rows] = logits_ptr[rows].isnan().sum(dim=-1)


@compiled(I64, I64, INT, I64, I64)
def _flatten(out, sampled, stride, num_sampled, starts):
    for row in range(len(num_sampled)):
        for i in range(num_sampled[row]):
            out[starts[row] + i] = sampled[row * stride + i]


def flatten_sampled(
    flat_sampled_ptr: torch.Tensor,
    sampled_ptr: torch.Tensor,
    sampled_stride: int,
    num_sampled_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    *,
    num_warps: int = 1,
) -> None:
    _flatten(
        flat(flat_sampled_ptr),
        integers(sampled_ptr),
        sampled_stride,
        integers(num_sampled_ptr),
        integers(cu_num_logits_ptr),
    )


def gather_draft_sampled(
    draft_sampled_ptr: torch.Tensor,
    pos_ptr: torch.Tensor,
    input_ids_ptr: torch.Tensor,
    positions_ptr: torch.Tensor,
    logits_indices_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
    num_logits: int,
    **tiles,
) -> None:
    """Token and position of each logits row; -1 for drafts that stand in a prompt, where none was proposed."""
    rows = integers(logits_indices_ptr)[:num_logits]
    positions, local_pos = flat(positions_ptr)[rows], flat(expanded_local_pos_ptr)[:num_logits]
    prefill_len = flat(prefill_len_ptr)[integers(expanded_idx_mapping_ptr)[:num_logits]]
    is_placeholder = (local_pos > 0) & (positions - local_pos < prefill_len)
    flat(draft_sampled_ptr)[:num_logits] = np.where(is_placeholder, -1, flat(input_ids_ptr)[rows])
    flat(pos_ptr)[:num_logits] = positions
