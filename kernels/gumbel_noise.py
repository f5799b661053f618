# SPDX-License-Identifier: Apache-2.0
"""The Gumbel noise that vLLM 0.32's target sampler will add, drawn ahead of time for the draft's candidates.

vLLM samples token = argmax(logits / T + g) with g a pure function of (seed, position, token). Ranking the draft's
candidates by ``draft_logits + T * g`` with that very g makes them agree with the target far more often, and stays exact
because verification accepts a child only if it equals the target's own sample. The function: MurmurHash3 (32 bit,
public domain, Austin Appleby) over the four words seed low, seed high, position low, token; 32 bits to a uniform u in
(0, 1); ``g = -log(-log(1 - u))``, with a series near 0 where the large values of g come from.
Source: ``vllm/v1/worker/gpu/sample/gumbel.py``, is_drafting=False, use_fp64=False. Expressions keep its order of
operations, so that compiled code rounds the same way.
"""

import torch
import triton
import triton.language as tl


@triton.jit
def _rotate_left(word, bits: tl.constexpr):
    """32-bit rotation."""
    return (word << bits) | (word >> (32 - bits))


@triton.jit
def _mix(h, word):
    """One MurmurHash3 round of a 32-bit word."""
    word = _rotate_left(word * 0xCC9E2D51, 15) * 0x1B873593
    return _rotate_left(h ^ word, 13) * 5 + 0xE6546B64


@triton.jit
def _finish(h):
    """MurmurHash3's final avalanche for a 16-byte key."""
    h ^= 16
    h = (h ^ (h >> 16)) * 0x85EBCA6B
    h = (h ^ (h >> 13)) * 0xC2B2AE35
    return h ^ (h >> 16)


@triton.jit
def _gumbel_of_bits(bits):
    """-log(-log(1 - u)) in fp32, u = (bits + 0.5) / 2**32."""
    high = (bits >> 16).to(tl.int32).to(tl.float32)
    low = (bits & 0xFFFF).to(tl.int32).to(tl.float32)
    u = high * 1.52587890625e-05 + (low + 0.5) * 2.3283064365386963e-10
    series = 1.0 / 8.0
    for k in tl.static_range(7, 0, -1):
        series = 1.0 / k + u * series
    # 2**-24 keeps the logarithm finite where 1 - u rounds to 0.
    direct = tl.log(tl.maximum(1.0 - u, 5.960464477539063e-08))
    return -tl.log(-tl.where(u < 0.25, -u * series, direct))


@triton.jit
def noise_key(seed, position):
    """Hash of a 64-bit seed and a position, to be finished per token by `gumbel`."""
    seed = seed.to(tl.int64)
    h = _mix((seed ^ seed).to(tl.uint32), (seed & 0xFFFFFFFF).to(tl.uint32))
    h = _mix(h, ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32))
    return _mix(h, (position.to(tl.int64) & 0xFFFFFFFF).to(tl.uint32))


@triton.jit
def word_hash(key, token):
    """The 32-bit hash of tokens under a `noise_key`; the two broadcast."""
    return _finish(_mix(key, token.to(tl.uint32)))


@triton.jit
def gumbel(key, token):
    """The Gumbel noise, fp32, of tokens of the vocabulary under a `noise_key`; the two broadcast."""
    return _gumbel_of_bits(word_hash(key, token))


@triton.jit
def _gumbel_noise_kernel(
    seeds_ptr,
    temperature_ptr,
    positions_ptr,
    idx_mapping_ptr,
    noise_ptr,
    stride_positions_b,
    stride_noise_b,
    stride_noise_g,
    vocab_size,
    BLOCK: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    g = tl.program_id(1).to(tl.int64)
    token = tl.program_id(2) * BLOCK + tl.arange(0, BLOCK)
    inside = token < vocab_size
    out = noise_ptr + b * stride_noise_b + g * stride_noise_g + token
    r = tl.load(idx_mapping_ptr + b).to(tl.int64)
    temperature = tl.load(temperature_ptr + r).to(tl.float32)
    if temperature == 0.0:
        tl.store(out, tl.zeros([BLOCK], tl.float32), mask=inside)
        return
    key = noise_key(tl.load(seeds_ptr + r), tl.load(positions_ptr + b * stride_positions_b + g))
    tl.store(out, temperature * gumbel(key, token), mask=inside)


def gumbel_noise(
    seeds: torch.Tensor,
    temperature: torch.Tensor,
    positions: torch.Tensor,
    idx_mapping: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    """Return fp32 ``[B, G, V]`` = temperature times the target's Gumbel noise; see `reference.gumbel_noise`.

    seeds int64 ``[R]``, temperature fp32 ``[R]``, positions int64 ``[B, G]`` with contiguous rows,
    idx_mapping int ``[B]``, vocab_size = V.
    """
    batch, rows = positions.shape
    noise = torch.empty((batch, rows, vocab_size), dtype=torch.float32, device=positions.device)
    block = 1024
    if noise.numel() > 0:
        _gumbel_noise_kernel[(batch, rows, triton.cdiv(vocab_size, block))](
            seeds,
            temperature,
            positions,
            idx_mapping,
            noise,
            positions.stride(0),
            noise.stride(0),
            noise.stride(1),
            vocab_size,
            BLOCK=block,
        )
    return noise
