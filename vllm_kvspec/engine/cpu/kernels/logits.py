# SPDX-License-Identifier: Apache-2.0
"""What requests do to their logits before sampling: penalties, biases, bad words, min-p, grammars, thinking budgets.

(``vllm/v1/worker/gpu/sample/{penalties,logit_bias,bad_words,min_p,thinking_budget}.py`` and ``structured_outputs.py``.)
vLLM hands fp32 logits to all of them but the grammars', which see the model's own.
"""

import numpy as np
import torch

from vllm_kvspec.engine.cpu.kernels.compiled import BOOL, F32, I16, I32, I64, INT, compiled, flat, integers, row_chunks

_F = np.float32
_MINUS_INF = float("-inf")


@compiled(F32, INT, I64, I64, I64, F32, F32, F32, I32, INT, I32, INT, INT)
def _penalize(
    logits,
    stride,
    mapping,
    tokens,
    local_pos,
    repetition,
    frequency,
    presence,
    prompt_mask,
    mask_stride,
    output_counts,
    counts_stride,
    vocab_size,
):
    counts = np.empty(vocab_size, dtype=np.int32)
    for row in range(len(mapping)):
        request = mapping[row]
        rep, freq, pres = repetition[request], frequency[request], presence[request]
        if rep == _F(1) and freq == _F(0) and pres == _F(0):
            continue
        counts[:] = output_counts[request * counts_stride : request * counts_stride + vocab_size]
        for i in range(row - local_pos[row] + 1, row + 1):
            # A placeholder for a draft that was never made is negative.
            if 0 <= tokens[i] < vocab_size:
                counts[tokens[i]] += 1
        inverse = _F(1) / rep
        for word in range((vocab_size + 31) // 32):
            in_prompt = prompt_mask[request * mask_stride + word]
            first = word * 32
            part = logits[row * stride + first : row * stride + min(first + 32, vocab_size)]
            for i in range(len(part)):
                count = counts[first + i]
                x = part[i]
                if count > 0 or (in_prompt >> i) & 1:
                    x = x * inverse if x > _F(0) else x * rep
                x = x - freq * _F(count)
                part[i] = x - pres if count > 0 else x


def penalties(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    token_ids_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
    repetition_penalty_ptr: torch.Tensor,
    frequency_penalty_ptr: torch.Tensor,
    presence_penalty_ptr: torch.Tensor,
    prompt_bin_mask_ptr: torch.Tensor,
    prompt_bin_mask_stride: int,
    output_bin_counts_ptr: torch.Tensor,
    output_bin_counts_stride: int,
    vocab_size: int,
    **tiles,
) -> None:
    _penalize(
        flat(logits_ptr),
        logits_stride,
        integers(expanded_idx_mapping_ptr),
        integers(token_ids_ptr),
        integers(expanded_local_pos_ptr),
        flat(repetition_penalty_ptr),
        flat(frequency_penalty_ptr),
        flat(presence_penalty_ptr),
        flat(prompt_bin_mask_ptr),
        prompt_bin_mask_stride,
        flat(output_bin_counts_ptr),
        output_bin_counts_stride,
        vocab_size,
    )


@compiled(I64, I32, INT, I64, I64, I32, INT, I32, INT)
def _count(mapping, all_tokens, stride, prompt_len, prefill_len, prompt_mask, mask_stride, counts, counts_stride):
    for request in mapping:
        tokens = all_tokens[request * stride : request * stride + prefill_len[request]]
        for i in range(prompt_len[request]):
            prompt_mask[request * mask_stride + tokens[i] // 32] |= np.int32(1) << np.int32(tokens[i] % 32)
        for i in range(prompt_len[request], prefill_len[request]):
            counts[request * counts_stride + tokens[i]] += 1


def bincount(
    expanded_idx_mapping_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    prompt_len_ptr: torch.Tensor,
    prefill_len_ptr: torch.Tensor,
    prompt_bin_mask_ptr: torch.Tensor,
    prompt_bin_mask_stride: int,
    output_bin_counts_ptr: torch.Tensor,
    output_bin_counts_stride: int,
    **tiles,
) -> None:
    _count(
        integers(expanded_idx_mapping_ptr),
        flat(all_token_ids_ptr),
        all_token_ids_stride,
        integers(prompt_len_ptr),
        integers(prefill_len_ptr),
        flat(prompt_bin_mask_ptr),
        prompt_bin_mask_stride,
        flat(output_bin_counts_ptr),
        output_bin_counts_stride,
    )


def min_p(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    min_p_ptr: torch.Tensor,
    vocab_size: int,
    **tiles,
) -> None:
    # Of a request without min-p the logarithm is -inf, below which there is nothing.
    log_min_p = min_p_ptr[expanded_idx_mapping_ptr.long()].float().log()
    for rows in row_chunks(logits_ptr.shape[0]):
        logits = logits_ptr[rows]
        threshold = logits.amax(dim=-1, keepdim=True).float() + log_min_p[rows, None]
        logits.masked_fill_(logits < threshold, _MINUS_INF)


@compiled(F32, INT, INT, I64, I64, I32, INT, I64, I32, INT, F32, INT, I64, I64, I64, I64, I32, INT, BOOL)
def _bias(
    all_logits,
    stride,
    vocab_size,
    mapping,
    num_allowed,
    allowed,
    allowed_stride,
    num_biased,
    biased,
    biased_stride,
    biases,
    biases_stride,
    positions,
    min_lens,
    num_stops,
    restore,
    stops,
    stops_stride,
    may_restore,
):
    for row in range(len(mapping)):
        request = mapping[row]
        logits = all_logits[row * stride : row * stride + vocab_size]
        n = num_allowed[request]
        if n > 0:
            tokens = allowed[request * allowed_stride : request * allowed_stride + n]
            kept = logits[tokens]
            logits[:] = -np.inf
            for i in range(n):
                logits[tokens[i]] = kept[i]
        for i in range(num_biased[request]):
            logits[biased[request * biased_stride + i]] += biases[request * biases_stride + i]
        n = num_stops[request]
        if n == 0 or positions[row] + 1 >= min_lens[request]:
            continue
        tokens = stops[request * stops_stride : request * stops_stride + n]
        kept = logits[tokens]
        for token in tokens:
            logits[token] = -np.inf
        # A grammar that allows nothing but stop tokens must not be left with nothing.
        if may_restore and restore[request] != 0 and logits.max() == -np.inf:
            for i in range(n):
                if kept[i] < np.inf:
                    logits[tokens[i]] = kept[i]


def logit_bias(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    vocab_size: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    num_allowed_token_ids_ptr: torch.Tensor,
    allowed_token_ids_ptr: torch.Tensor,
    allowed_token_ids_stride: int,
    num_logit_bias_ptr: torch.Tensor,
    bias_token_ids_ptr: torch.Tensor,
    bias_token_ids_stride: int,
    bias_ptr: torch.Tensor,
    bias_stride: int,
    pos_ptr: torch.Tensor,
    min_lens_ptr: torch.Tensor,
    num_stop_token_ids_ptr: torch.Tensor,
    restore_when_all_masked_ptr: torch.Tensor,
    stop_token_ids_ptr: torch.Tensor,
    stop_token_ids_stride: int,
    *,
    CHECK_ALL_MASKED_ROWS: bool,
    **tiles,
) -> None:
    """Allowed tokens, then biases, then no stop token before the minimum length."""
    _bias(
        flat(logits_ptr),
        logits_stride,
        vocab_size,
        integers(expanded_idx_mapping_ptr),
        integers(num_allowed_token_ids_ptr),
        flat(allowed_token_ids_ptr),
        allowed_token_ids_stride,
        integers(num_logit_bias_ptr),
        flat(bias_token_ids_ptr),
        bias_token_ids_stride,
        flat(bias_ptr),
        bias_stride,
        integers(pos_ptr),
        integers(min_lens_ptr),
        integers(num_stop_token_ids_ptr),
        integers(restore_when_all_masked_ptr),
        flat(stop_token_ids_ptr),
        stop_token_ids_stride,
        CHECK_ALL_MASKED_ROWS,
    )


@compiled(F32, INT, I64, I32, INT, I32, INT, I64, I32, INT, I64, I64, I64, I64)
def _forbid_words(
    logits,
    stride,
    mapping,
    words,
    words_stride,
    offsets,
    offsets_stride,
    num_words,
    all_tokens,
    tokens_stride,
    prompt_len,
    total_len,
    input_ids,
    local_pos,
):
    for row in range(len(mapping)):
        request = mapping[row]
        output_len = total_len[request] - prompt_len[request]
        length = output_len + local_pos[row]
        output = request * tokens_stride + prompt_len[request]
        # The request's first row holds its last committed token; drafts follow it.
        drafts = row - local_pos[row] + 1
        for word in range(num_words[request]):
            start = offsets[request * offsets_stride + word]
            last = offsets[request * offsets_stride + word + 1] - 1
            matches = last - start <= length
            for i in range(start, last):
                if not matches:
                    break
                at = length - (last - i)
                actual = np.int64(all_tokens[output + at]) if at < output_len else input_ids[drafts + at - output_len]
                matches = actual == words[request * words_stride + i]
            if matches:
                logits[row * stride + words[request * words_stride + last]] = -np.inf


def bad_words(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    bad_word_token_ids_ptr: torch.Tensor,
    bad_word_token_ids_stride: int,
    bad_word_offsets_ptr: torch.Tensor,
    bad_word_offsets_stride: int,
    num_bad_words_ptr: torch.Tensor,
    all_token_ids_ptr: torch.Tensor,
    all_token_ids_stride: int,
    prompt_len_ptr: torch.Tensor,
    total_len_ptr: torch.Tensor,
    input_ids_ptr: torch.Tensor,
    expanded_local_pos_ptr: torch.Tensor,
) -> None:
    _forbid_words(
        flat(logits_ptr),
        logits_stride,
        integers(expanded_idx_mapping_ptr),
        flat(bad_word_token_ids_ptr),
        bad_word_token_ids_stride,
        flat(bad_word_offsets_ptr),
        bad_word_offsets_stride,
        integers(num_bad_words_ptr),
        flat(all_token_ids_ptr),
        all_token_ids_stride,
        integers(prompt_len_ptr),
        integers(total_len_ptr),
        integers(input_ids_ptr),
        integers(expanded_local_pos_ptr),
    )


def _forbid(logits, mask, minus_inf):
    for word in range((len(logits) + 31) // 32):
        allowed = mask[word]
        part = logits[word * 32 : min(word * 32 + 32, len(logits))]
        for i in range(len(part)):
            part[i] = part[i] if (allowed >> i) & 1 else minus_inf


# Logits as the bits of their elements, which are of 4 or of 2 bytes.
_FORBID = {4: (torch.int32, compiled(I32, I32, INT)(_forbid)), 2: (torch.int16, compiled(I16, I32, INT)(_forbid))}


def grammar_bitmask(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    logits_indices_ptr: torch.Tensor,
    cu_num_logits_ptr: torch.Tensor,
    bitmask_ptr: torch.Tensor,
    bitmask_stride: int,
    vocab_size: int,
    *,
    MASK_STRIDE: int,
    **tiles,
) -> None:
    """A clear bit forbids its token. 0.33 has a mask for every position a request might have had, 0.32 for each."""
    starts = cu_num_logits_ptr.tolist()
    bits, forbid = _FORBID[logits_ptr.element_size()]
    minus_inf = torch.tensor(_MINUS_INF, dtype=logits_ptr.dtype).view(bits).item()
    logits, masks = flat(logits_ptr.view(bits)), flat(bitmask_ptr)
    for mask, place in enumerate(logits_indices_ptr.tolist()):
        request, position = divmod(place, MASK_STRIDE)
        row = starts[request] + position
        if row < starts[request + 1]:
            start = row * logits_stride
            forbid(logits[start : start + vocab_size], masks[mask * bitmask_stride :], minus_inf)
