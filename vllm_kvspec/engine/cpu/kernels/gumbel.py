# SPDX-License-Identifier: Apache-2.0
"""Sampling with Gumbel noise: the kernels of ``vllm/v1/worker/gpu/sample/gumbel.py``, and the noise alone.

The noise is the one that ``vllm_kvspec.kernels.reference.gumbel_noise`` defines, a function of (seed, position, token).
Here it is one loop without branches or calls, so that the compiler makes vector code of it: nothing of size
[rows, vocabulary] is stored.
"""

import math

import numba
import numpy as np
import torch
import vllm.v1.worker.gpu.sample.gumbel as vllm_gumbel

from vllm_kvspec.engine.cpu.kernels.compiled import BOOL, F32, F64, I64, INT, compiled, flat, integers, row_chunks

_F = np.float32
_U = np.uint32
# Finding a maximum is vector code only if NaN and the sign of zero are of no account.
_MAXIMUM = {"nnan", "nsz"}
_DRAFT_SALT = 1 << 30
_inlined = numba.njit(forceinline=True, error_model="numpy")
# 0.33 draws drafts that are cached for the rejection sampler with a seed of their own per step.
_HAS_STEP_SEEDS = hasattr(vllm_gumbel, "spec_step_seed")


@_inlined
def _mix(h, word):
    word = _U(word * _U(0xCC9E2D51))
    word = _U(_U(word << _U(15)) | _U(word >> _U(17)))
    h = _U(h ^ _U(word * _U(0x1B873593)))
    h = _U(_U(h << _U(13)) | _U(h >> _U(19)))
    return _U(_U(h * _U(5)) + _U(0xE6546B64))


@_inlined
def _finish(h):
    h = _U(h ^ _U(16))
    h = _U(_U(h ^ _U(h >> _U(16))) * _U(0x85EBCA6B))
    h = _U(_U(h ^ _U(h >> _U(13))) * _U(0xC2B2AE35))
    return _U(h ^ _U(h >> _U(16)))


@_inlined
def _key(seed, position, domain):
    """The hash of everything but the token."""
    h = _mix(_U(domain), _U(seed & 0xFFFFFFFF))
    h = _mix(h, _U((seed >> 32) & 0xFFFFFFFF))
    return _mix(h, _U(position & 0xFFFFFFFF))


@_inlined
def _log(x):
    """Natural logarithm of a positive normal fp32 number, to about one unit in the last place (Cephes' polynomial)."""
    bits = np.float32(x).view(np.int32)
    exponent = _F(np.int32(bits >> 23) - np.int32(126))
    m = np.int32((bits & np.int32(0x7FFFFF)) | np.int32(0x3F000000)).view(np.float32)
    small = m < _F(0.70710678)
    exponent = exponent - _F(1.0) if small else exponent
    m = m + m - _F(1.0) if small else m - _F(1.0)
    z = m * m
    y = _F(7.0376836292e-2)
    y = y * m + _F(-1.1514610310e-1)
    y = y * m + _F(1.1676998740e-1)
    y = y * m + _F(-1.2420140846e-1)
    y = y * m + _F(1.4249322787e-1)
    y = y * m + _F(-1.6668057665e-1)
    y = y * m + _F(2.0000714765e-1)
    y = y * m + _F(-2.4999993993e-1)
    y = y * m + _F(3.3333331174e-1)
    y = y * m * z + exponent * _F(-2.12194440e-4) - _F(0.5) * z
    return m + y + exponent * _F(0.693359375)


@_inlined
def _noise(bits):
    """-log(-log(1 - u)) for u = (bits + 0.5) / 2**32, with the series for small u that vLLM uses."""
    u = _F(np.int32(bits >> _U(16))) * _F(2.0**-16) + (_F(np.int32(bits & _U(0xFFFF))) + _F(0.5)) * _F(2.0**-32)
    series = _F(1 / 7) + u * _F(1 / 8)
    series = _F(1 / 6) + u * series
    series = _F(1 / 5) + u * series
    series = _F(1 / 4) + u * series
    series = _F(1 / 3) + u * series
    series = _F(1 / 2) + u * series
    series = u * (_F(1) + u * series)
    direct = -_log(max(_F(1) - u, _F(2.0**-24)))
    return -_log(series if u < _F(0.25) else direct)


@_inlined
def _uniform64(low, high):
    u = (np.float64(np.int64((np.uint64(high) << np.uint64(32) | np.uint64(low)) >> np.uint64(11))) + 0.5) * 2.0**-53
    return u if u < 1.0 else 1.0 - 2.0**-53


@_inlined
def _first_maximum(scores, n):
    best = scores[0]
    for i in range(1, n):
        best = scores[i] if scores[i] > best else best
    index = 0
    while index < n - 1 and scores[index] != best:
        index += 1
    return index, best


@compiled(F32, INT, I64, F32, I64, I64, INT, BOOL, INT, I64, INT, F32, INT, fastmath=_MAXIMUM)
def _sample(
    logits,
    stride,
    mapping,
    temperatures,
    seeds,
    positions,
    vocab_size,
    scale,
    block_size,
    token,
    t_stride,
    best,
    b_stride,
):
    scores = np.empty(block_size, dtype=np.float32)
    for row in range(len(mapping)):
        request = mapping[row]
        temperature = temperatures[request] if request >= 0 else _F(0)
        key = _key(seeds[row], positions[row], 0)
        divisor = temperature if scale and temperature != _F(0) else _F(1)
        for block in range((vocab_size + block_size - 1) // block_size):
            start = block * block_size
            n = min(block_size, vocab_size - start)
            part = logits[row * stride + start : row * stride + start + n]
            if temperature == _F(0):
                index, value = _first_maximum(part, n)
            else:
                first = _U(start)
                for i in range(n):
                    noise = _noise(_finish(_mix(key, _U(first + _U(i)))))
                    scores[i] = part[i] / divisor + noise
                index, value = _first_maximum(scores, n)
            token[row * t_stride + block] = start + index
            best[row * b_stride + block] = value


@compiled(F32, INT, I64, F32, I64, I64, INT, BOOL, INT, I64, INT, F64, INT)
def _sample64(
    logits,
    stride,
    mapping,
    temperatures,
    seeds,
    positions,
    vocab_size,
    scale,
    block_size,
    token,
    t_stride,
    best,
    b_stride,
):
    scores = np.empty(block_size, dtype=np.float64)
    for row in range(len(mapping)):
        request = mapping[row]
        temperature = temperatures[request] if request >= 0 else _F(0)
        low, high = _key(seeds[row], positions[row], 0), _key(seeds[row], positions[row], 0x9E3779B9)
        for block in range((vocab_size + block_size - 1) // block_size):
            start = block * block_size
            n = min(block_size, vocab_size - start)
            for i in range(n):
                score = logits[row * stride + start + i]
                if temperature != _F(0):
                    score = score / temperature if scale else score
                    word = _U(start + i)
                    u = _uniform64(_finish(_mix(low, word)), _finish(_mix(high, word)))
                    scores[i] = np.float64(score) - math.log(-math.log(u))
                else:
                    scores[i] = score
            index, value = _first_maximum(scores, n)
            token[row * t_stride + block] = start + index
            best[row * b_stride + block] = value


def _cache_logits(cache, column, source, mapping, vocab_size: int, per_token: bool) -> None:
    """Keep the logits that a draft was drawn from, before the temperature."""
    for row, request in enumerate(mapping.tolist()):
        if request >= 0:
            cache[request, int(column[row] if per_token else column), :vocab_size] = source[row]


def gumbel_sample(
    local_argmax_ptr: torch.Tensor,
    local_argmax_stride: int,
    local_max_ptr: torch.Tensor,
    local_max_stride: int,
    logits_cache_ptr: torch.Tensor | None,
    logits_cache_stride_0: int,
    logits_cache_stride_1: int,
    logits_cache_col_ptr: torch.Tensor | None,
    logits_cache_source_ptr: torch.Tensor | None,
    logits_cache_source_stride: int,
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    seeds_ptr: torch.Tensor,
    pos_ptr: torch.Tensor,
    temp_ptr: torch.Tensor,
    vocab_size: int,
    *,
    BLOCK_SIZE: int,
    IS_DRAFTING: bool,
    APPLY_TEMPERATURE: bool,
    USE_FP64: bool,
    PER_TOKEN_COL: bool,
) -> None:
    """Per row and block of the vocabulary: the largest of logits (over the temperature) plus noise, and its token."""
    mapping = integers(expanded_idx_mapping_ptr)
    seeds = flat(seeds_ptr)[np.maximum(mapping, 0)] * (mapping >= 0)
    if logits_cache_ptr is not None:
        _cache_logits(
            logits_cache_ptr, logits_cache_col_ptr, logits_cache_source_ptr, mapping, vocab_size, PER_TOKEN_COL
        )
        if _HAS_STEP_SEEDS:
            seeds ^= np.broadcast_to(integers(logits_cache_col_ptr.reshape(-1)), seeds.shape) << 32
    positions = integers(pos_ptr)
    if IS_DRAFTING:
        positions = positions + _DRAFT_SALT
    for rows in row_chunks(len(mapping)):
        logits = logits_ptr[rows].float()
        (_sample64 if USE_FP64 else _sample)(
            flat(logits),
            logits.stride(0),
            mapping[rows],
            flat(temp_ptr),
            seeds[rows],
            positions[rows],
            vocab_size,
            APPLY_TEMPERATURE,
            BLOCK_SIZE,
            flat(local_argmax_ptr[rows]),
            local_argmax_stride,
            flat(local_max_ptr[rows]),
            local_max_stride,
        )


@compiled(F32, INT, I64, I64, F32, I64)
def _fill_noise(out, num_rows, seeds, positions, temperatures, tokens):
    n = len(tokens)
    for row in range(num_rows):
        temperature = temperatures[row]
        part = out[row * n : (row + 1) * n]
        if temperature == _F(0):
            part[:] = _F(0)
            continue
        key = _key(seeds[row], positions[row], 0)
        for i in range(n):
            part[i] = _noise(_finish(_mix(key, _U(tokens[i] & 0xFFFFFFFF)))) * temperature


def gumbel_noise(
    seeds: torch.Tensor,
    temperature: torch.Tensor,
    positions: torch.Tensor,
    idx_mapping: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    """``reference.gumbel_noise``, compiled."""
    return gumbel_noise_at(seeds, temperature, positions, idx_mapping, torch.arange(vocab_size))


def gumbel_noise_at(
    seeds: torch.Tensor,
    temperature: torch.Tensor,
    positions: torch.Tensor,
    idx_mapping: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """``reference.gumbel_noise_at``, compiled."""
    noise = torch.empty((*positions.shape, len(tokens)), dtype=torch.float32)
    requests = idx_mapping.long().repeat_interleave(positions.shape[1])
    _fill_noise(
        flat(noise),
        positions.numel(),
        flat(seeds.long()[requests]),
        integers(positions.reshape(-1)),
        flat(temperature.float()[requests]),
        integers(tokens),
    )
    return noise


def temperature(
    logits_ptr: torch.Tensor,
    logits_stride: int,
    expanded_idx_mapping_ptr: torch.Tensor,
    temperature_ptr: torch.Tensor,
    vocab_size: int,
    **tiles,
) -> None:
    divisor = temperature_ptr[expanded_idx_mapping_ptr.long()].float()
    logits_ptr.div_(torch.where(divisor == 0, 1.0, divisor)[:, None])
