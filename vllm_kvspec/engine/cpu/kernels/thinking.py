# SPDX-License-Identifier: Apache-2.0
"""Thinking budgets: the kernels of ``vllm/v1/worker/gpu/sample/thinking_budget.py``.

Tokens are a request's committed ones, then the drafts before a row. Of the marker that opens a thinking section and of
the one that ends it, the last place is what counts; places among committed tokens are kept from step to step.
"""

import numba
import numpy as np
import torch

from vllm_kvspec.engine.cpu.kernels.compiled import F32, I32, I64, INT, compiled, flat, integers

_FORCED = np.float32(1e9)


@numba.njit
def _token(committed, input_ids, drafts, i):
    return np.int64(committed[i]) if i < len(committed) else input_ids[drafts + i - len(committed)]


@numba.njit
def _last_marker(committed, input_ids, drafts, length, marker, lowest, last):
    """The last place at or after ``lowest`` where ``marker`` stands before ``length``, else ``last``."""
    for i in range(length - len(marker), lowest - 1, -1):
        j = 0
        while j < len(marker) and _token(committed, input_ids, drafts, i + j) == marker[j]:
            j += 1
        if j == len(marker):
            return i
    return last


@compiled(I64, I64, I32, INT, I64, I32, I32, I32, I64, I64, INT, INT)
def _update_cache(
    req_ids, budgets, all_tokens, stride, total_len, last_start, last_end, scan_pos, start, end, longest, block
):
    for request in req_ids:
        if budgets[request] < 0:
            continue
        total = total_len[request]
        committed = all_tokens[request * stride : request * stride + total]
        first, opened, closed = np.int64(scan_pos[request]), np.int64(last_start[request]), np.int64(last_end[request])
        if first > total:
            first, opened, closed = 0, -1, -1
        if first == 0 and opened < 0 and closed < 0:
            # As vLLM: backwards by blocks, until one has a marker; earlier ones change nothing.
            high = total
            while high > 0 and opened < 0 and closed < 0:
                low = max(high - block, 0)
                opened = _last_marker(committed, start, 0, min(high + len(start) - 1, total), start, low, -1)
                closed = _last_marker(committed, start, 0, min(high + len(end) - 1, total), end, low, -1)
                high = low
        else:
            opened = _last_marker(committed, start, 0, total, start, first, opened)
            closed = _last_marker(committed, start, 0, total, end, first, closed)
        last_start[request], last_end[request] = opened, closed
        scan_pos[request] = max(total - (longest - 1), 0)


def update_committed_marker_cache(
    req_ids_ptr: torch.Tensor,
    thinking_token_budget_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    total_len_ptr: torch.Tensor,
    cached_last_start_ptr: torch.Tensor,
    cached_last_end_ptr: torch.Tensor,
    cached_scan_pos_ptr: torch.Tensor,
    reasoning_start_token_ids_ptr: torch.Tensor,
    natural_reasoning_end_token_ids_ptr: torch.Tensor,
    *,
    START_LEN: int,
    NATURAL_END_LEN: int,
    MAX_LEN: int,
    BLOCK: int,
) -> None:
    _update_cache(
        integers(req_ids_ptr),
        integers(thinking_token_budget_ptr),
        flat(all_token_ids_ptr),
        all_token_ids_stride,
        integers(total_len_ptr),
        flat(cached_last_start_ptr),
        flat(cached_last_end_ptr),
        flat(cached_scan_pos_ptr),
        integers(reasoning_start_token_ids_ptr)[:START_LEN],
        integers(natural_reasoning_end_token_ids_ptr)[:NATURAL_END_LEN],
        MAX_LEN,
        BLOCK,
    )


@compiled(F32, INT, I64, I64, I32, INT, I64, I64, I64, I64, I64, I64, I64, I64)
def _force_end(
    logits,
    logits_stride,
    mapping,
    budgets,
    all_tokens,
    stride,
    total_len,
    input_ids,
    local_pos,
    last_start,
    last_end,
    start,
    natural_end,
    forced_end,
):
    for row in range(len(mapping)):
        request = mapping[row]
        if budgets[request] < 0:
            continue
        total = total_len[request]
        length = total + local_pos[row]
        committed = all_tokens[request * stride : request * stride + total]
        # The request's first row holds its last committed token; drafts follow it.
        drafts = row - local_pos[row] + 1
        low = max(total - len(start) + 1, 0)
        opened = _last_marker(committed, input_ids, drafts, length, start, low, last_start[request])
        low = max(total - len(natural_end) + 1, 0)
        closed = _last_marker(committed, input_ids, drafts, length, natural_end, low, last_end[request])
        if opened < 0 or opened <= closed or length - (opened + len(start)) < budgets[request]:
            continue
        # The longest beginning of the forced end that stands there already.
        done = min(len(forced_end) - 1, length)
        while done > 0:
            j = 0
            while j < done and _token(committed, input_ids, drafts, length - done + j) == forced_end[j]:
                j += 1
            if j == done:
                break
            done -= 1
        logits[row * logits_stride + forced_end[done]] = _FORCED


def thinking_budget(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    thinking_token_budget_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    total_len_ptr: torch.Tensor,
    input_ids_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    cached_last_start_ptr: torch.Tensor,
    cached_last_end_ptr: torch.Tensor,
    reasoning_start_token_ids_ptr: torch.Tensor,
    natural_reasoning_end_token_ids_ptr: torch.Tensor,
    reasoning_end_token_ids_ptr: torch.Tensor,
    *,
    START_LEN: int,
    NATURAL_END_LEN: int,
    END_LEN: int,
) -> None:
    _force_end(
        flat(logits_ptr),
        logits_stride,
        integers(expanded_idx_mapping_ptr),
        integers(thinking_token_budget_ptr),
        flat(all_token_ids_ptr),
        all_token_ids_stride,
        integers(total_len_ptr),
        integers(input_ids_ptr),
        integers(expanded_local_pos_ptr),
        integers(cached_last_start_ptr),
        integers(cached_last_end_ptr),
        integers(reasoning_start_token_ids_ptr)[:START_LEN],
        integers(natural_reasoning_end_token_ids_ptr)[:NATURAL_END_LEN],
        integers(reasoning_end_token_ids_ptr)[:END_LEN],
    )
