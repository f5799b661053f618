# SPDX-License-Identifier: Apache-2.0
"""Paged KV caches for the attention tests: several layouts, permuted blocks, NaN wherever nothing was written."""

import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

# The helpers beside the tests, whatever pytest's import mode.
sys.path.append(str(Path(__file__).parent))


@dataclass
class Paged:
    """One batch's cache and the rows that were written to it."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    block_table: torch.Tensor
    # Per request, [length, Hkv, D] in the cache's dtype.
    keys: list[torch.Tensor]
    values: list[torch.Tensor]


def _empty_cache(layout: str, num_blocks: int, block_size: int, heads: int, dim: int, dtype: torch.dtype):
    """K and V views [num_blocks, block_size, heads, dim] full of NaN."""
    shapes = {
        "blocks-heads-slots-kv": (num_blocks, heads, block_size, 2 * dim),
        "blocks-slots-heads-kv": (num_blocks, block_size, heads, 2 * dim),
        "kv-blocks-slots-heads": (2, num_blocks, block_size, heads, dim),
    }
    raw = torch.full(shapes[layout], float("nan")).to(dtype)
    if layout == "kv-blocks-slots-heads":
        return raw[0], raw[1]
    if layout == "blocks-heads-slots-kv":
        raw = raw.transpose(1, 2)
    return raw[..., :dim], raw[..., dim:]


@pytest.fixture
def make_paged():
    """Factory: write random rows at positions [first, length) of each request, leave NaN everywhere else."""

    def make(lengths, heads, dim, block_size, dtype, layout, device, firsts=None, seed=0) -> Paged:
        gen = torch.Generator().manual_seed(seed)
        per_request = max(1, -(-max(lengths) // block_size)) + 1
        num_blocks = per_request * len(lengths) + 3
        k_cache, v_cache = (
            t.to(device) if device.type != "cpu" else t
            for t in _empty_cache(layout, num_blocks, block_size, heads, dim, dtype)
        )
        table = torch.randperm(num_blocks, generator=gen)[: per_request * len(lengths)].view(len(lengths), -1).int()
        keys, values = [], []
        for b, length in enumerate(lengths):
            first = firsts[b] if firsts else 0
            rows = [torch.randn(length, heads, dim, generator=gen).to(dtype).to(device) for _ in range(2)]
            for cache, row in zip((k_cache, v_cache), rows, strict=True):
                for p in range(first, length):
                    cache[table[b, p // block_size].item(), p % block_size] = row[p]
            keys.append(rows[0])
            values.append(rows[1])
        return Paged(k_cache, v_cache, table.to(device), keys, values)

    return make


def dense_attention(q, k, v, visible, scale, soft_cap=0.0, sinks=None):
    """float64 truth: q [n, Hq, D], k and v [m, Hkv, D], visible bool [n, m], sinks [Hq] or None."""
    group = q.shape[1] // k.shape[1]
    k, v = (x.double().repeat_interleave(group, 1) for x in (k, v))
    scores = torch.einsum("nhd,mhd->nhm", q.double(), k) * scale
    if soft_cap:
        scores = soft_cap * torch.tanh(scores / soft_cap)
    scores = scores.masked_fill(~visible[:, None, :], float("-inf"))
    total = scores.logsumexp(-1)
    if sinks is not None:
        total = torch.logaddexp(total, sinks.double())
    return torch.einsum("nhm,mhd->nhd", (scores - total[:, :, None]).exp(), v)


@pytest.fixture
def dense():
    return dense_attention
