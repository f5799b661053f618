# SPDX-License-Identifier: Apache-2.0
"""The kernels of ``vllm/v1/worker/gpu/input_batch.py``: a step's inputs, and the request states after it."""

import numpy as np
import torch

from vllm_kvspec.engine.cpu.kernels.compiled import BOOL, I32, I64, INT, compiled, flat, integers

_NO_COUNTS = np.zeros(1, dtype=np.int32)
_NO_TOKENS = np.zeros(1, dtype=np.int64)


@compiled(I32, I32, INT, INT, I64, I64, I32, INT, I64, I64)
def _prefill_inputs(
    input_ids, lookahead, lookahead_stride, num_lookahead, mapping, query_start, all_tokens, stride, prefill, computed
):
    for row in range(len(mapping)):
        request = mapping[row]
        done = computed[request]
        if done >= prefill[request]:
            continue
        tokens = all_tokens[request * stride : (request + 1) * stride]
        length = query_start[row + 1] - query_start[row]
        for i in range(length):
            input_ids[query_start[row] + i] = tokens[done + i]
        for i in range(num_lookahead):
            position = done + length + i
            lookahead[i * lookahead_stride + request] = tokens[position] if position < prefill[request] else 0


def prepare_prefill_inputs(
    input_ids_ptr: torch.Tensor,
    next_prefill_tokens_ptr: torch.Tensor,
    next_prefill_tokens_stride: int,
    num_lookahead: int,
    idx_mapping_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    prefill_lens_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    **tiles,
) -> None:
    _prefill_inputs(
        flat(input_ids_ptr),
        flat(next_prefill_tokens_ptr),
        next_prefill_tokens_stride,
        num_lookahead,
        integers(idx_mapping_ptr),
        integers(query_start_loc_ptr),
        flat(all_token_ids_ptr),
        all_token_ids_stride,
        integers(prefill_lens_ptr),
        integers(num_computed_tokens_ptr),
    )


@compiled(I64, I32, I64, I64, I64, INT)
def _positions(positions, seq_lens, mapping, query_start, computed, max_num_reqs):
    for row in range(len(mapping)):
        done = computed[mapping[row]]
        length = query_start[row + 1] - query_start[row]
        seq_lens[row] = done + length
        for i in range(length):
            positions[query_start[row] + i] = done + i
    seq_lens[len(mapping) : max_num_reqs] = 0


def prepare_pos_seq_lens(
    pos_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    max_num_reqs: int,
    **tiles,
) -> None:
    _positions(
        flat(pos_ptr),
        flat(seq_lens_ptr),
        integers(idx_mapping_ptr),
        integers(query_start_loc_ptr),
        integers(num_computed_tokens_ptr),
        max_num_reqs,
    )


@compiled(I32, I64, I64, I64, I64, I64, I64, INT, I64, I64, INT)
def _combine(
    input_ids, mapping, last_sampled, query_start, seq_lens, prefill, drafts, drafts_stride, cu_logits, indices, num_new
):
    for row in range(len(mapping)):
        request = mapping[row]
        num_logits = cu_logits[row + 1] - cu_logits[row]
        first = query_start[row + 1] - num_logits
        for i in range(num_logits):
            indices[cu_logits[row] + i] = first + i
        if seq_lens[row] <= prefill[request]:
            continue
        # The last rows of a prompt keep their tokens.
        if num_new > 0 and seq_lens[row] - num_logits >= prefill[request]:
            input_ids[first] = last_sampled[request]
        for i in range(num_logits - num_new):
            input_ids[first + num_new + i] = drafts[request * drafts_stride + i]


def combine_sampled_and_draft_tokens(
    input_ids_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    last_sampled_tokens_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
    draft_tokens_ptr: torch.Tensor,
    draft_tokens_stride: int,
    cu_num_logits_ptr: torch.Tensor,
    logits_indices_ptr: torch.Tensor,
    *,
    NUM_NEW_SAMPLED_TOKENS: int = 1,
    **tiles,
) -> None:
    _combine(
        flat(input_ids_ptr),
        integers(idx_mapping_ptr),
        integers(last_sampled_tokens_ptr),
        integers(query_start_loc_ptr),
        integers(seq_lens_ptr),
        integers(prefill_len_ptr),
        integers(draft_tokens_ptr),
        draft_tokens_stride,
        integers(cu_num_logits_ptr),
        flat(logits_indices_ptr),
        NUM_NEW_SAMPLED_TOKENS,
    )


def get_num_sampled_and_rejected(
    num_sampled_ptr: torch.Tensor,
    num_rejected_ptr: torch.Tensor,
    seq_lens_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
) -> None:
    mapping = integers(idx_mapping_ptr)
    num_reqs = len(mapping)
    num_sampled, num_rejected = flat(num_sampled_ptr)[:num_reqs], flat(num_rejected_ptr)[:num_reqs]
    in_prefill = flat(seq_lens_ptr)[:num_reqs] < flat(prefill_len_ptr)[mapping]
    num_sampled[in_prefill] = 0
    num_rejected[:] = np.diff(flat(cu_num_logits_ptr)[: num_reqs + 1]) - num_sampled
    num_rejected[in_prefill] = 0


@compiled(I64, I32, I64, I32, INT, BOOL, I64, INT, I64, I64, I64, BOOL, I32, INT, I32, I64, I64, INT)
def _update(
    mapping,
    computed,
    last_sampled,
    counts,
    counts_stride,
    has_counts,
    sampled,
    sampled_stride,
    num_sampled,
    num_rejected,
    query_start,
    has_query,
    all_tokens,
    stride,
    total_len,
    drafts,
    drafts_out,
    num_drafts,
):
    for row in range(len(mapping)):
        request = mapping[row]
        if request < 0:
            continue
        for i in range(num_drafts):
            drafts_out[request * num_drafts + i] = drafts[row * num_drafts + i]
        total, num_new = total_len[request], num_sampled[row]
        for i in range(num_new):
            token = sampled[row * sampled_stride + i]
            all_tokens[request * stride + total + i] = token
            if has_counts:
                counts[request * counts_stride + token] += 1
        if num_new > 0:
            last_sampled[request] = sampled[row * sampled_stride + num_new - 1]
            total_len[request] = total + num_new
        length = query_start[row + 1] - query_start[row] if has_query else 0
        computed[request] += length - num_rejected[row]


def post_update(
    idx_mapping_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    last_sampled_tokens_ptr: torch.Tensor,
    output_bin_counts_ptr: torch.Tensor | None,
    output_bin_counts_stride: int,
    sampled_tokens_ptr: torch.Tensor,
    sampled_tokens_stride: int,
    num_sampled_ptr: torch.Tensor,
    num_rejected_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor | None,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    total_len_ptr: torch.Tensor,
    # 0.33: the step's draft tokens go to their request states in the same launch.
    draft_tokens_ptr: torch.Tensor | None = None,
    draft_tokens_out_ptr: torch.Tensor | None = None,
    num_draft_tokens: int = 0,
    *,
    num_warps: int = 1,
) -> None:
    has_drafts = draft_tokens_ptr is not None
    _update(
        integers(idx_mapping_ptr),
        flat(num_computed_tokens_ptr),
        flat(last_sampled_tokens_ptr),
        _NO_COUNTS if output_bin_counts_ptr is None else flat(output_bin_counts_ptr),
        output_bin_counts_stride,
        output_bin_counts_ptr is not None,
        integers(sampled_tokens_ptr),
        sampled_tokens_stride,
        integers(num_sampled_ptr),
        integers(num_rejected_ptr),
        _NO_TOKENS if query_start_loc_ptr is None else integers(query_start_loc_ptr),
        query_start_loc_ptr is not None,
        flat(all_token_ids_ptr),
        all_token_ids_stride,
        flat(total_len_ptr),
        integers(draft_tokens_ptr) if has_drafts else _NO_TOKENS,
        flat(draft_tokens_out_ptr) if has_drafts else _NO_TOKENS,
        num_draft_tokens if has_drafts else 0,
    )


def post_update_num_computed_tokens(
    idx_mapping_ptr: torch.Tensor, num_computed_tokens_ptr: torch.Tensor, query_start_loc_ptr: torch.Tensor
) -> None:
    mapping = integers(idx_mapping_ptr)
    flat(num_computed_tokens_ptr)[mapping] += np.diff(flat(query_start_loc_ptr)[: len(mapping) + 1])


def expand_idx_mapping(
    idx_mapping_ptr: torch.Tensor,
    expanded_idx_mapping_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    **tiles,
) -> None:
    mapping, starts = integers(idx_mapping_ptr), integers(cu_num_logits_ptr)
    lengths = np.diff(starts[: len(mapping) + 1])
    first, end = starts[0], starts[len(mapping)]
    flat(expanded_idx_mapping_ptr)[first:end] = np.repeat(mapping, lengths)
    flat(expanded_local_pos_ptr)[first:end] = np.arange(first, end) - np.repeat(starts[:-1][: len(mapping)], lengths)


@compiled(I64, I64, I64, I64, I32, INT)
def _next_tokens(out, query_start, mapping, computed, all_tokens, stride):
    for row in range(len(mapping)):
        request = mapping[row]
        first = request * stride + computed[request] + 1 - query_start[row]
        for i in range(query_start[row], query_start[row + 1]):
            out[i] = all_tokens[first + i]


def prompt_logprobs_token_ids(
    prompt_logprobs_token_ids_ptr: torch.Tensor,
    query_start_loc_ptr: torch.Tensor,
    idx_mapping_ptr: torch.Tensor,
    num_computed_tokens_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    **tiles,
) -> None:
    """Of each row the token it predicts. (``vllm/v1/worker/gpu/sample/prompt_logprob.py``.)"""
    _next_tokens(
        flat(prompt_logprobs_token_ids_ptr),
        integers(query_start_loc_ptr),
        integers(idx_mapping_ptr),
        integers(num_computed_tokens_ptr),
        flat(all_token_ids_ptr),
        all_token_ids_stride,
    )
