# SPDX-License-Identifier: Apache-2.0
"""The compiled attention of CPU engines equals the torch twins: layouts, windows, trees beside prompts, NaN in what no
row may read."""

from unittest import mock

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvspec.engine.cpu.kernels import attention
from vllm_kvspec.kernels import reference
from vllm_kvspec.tree import ancestor_masks

LAYOUTS = {"NHD": (0, 2, 1, 3), "HND": (0, 1, 2, 3)}


def paged(lengths, firsts, kv_heads, dim, block_size, layout, generator, dtype=torch.float32):
    """K and V views [num_blocks, block_size, kv_heads, dim] and a block table; NaN wherever nothing was written."""
    per_request = -(-max(lengths) // block_size) + 1
    num_blocks = per_request * len(lengths) + 2
    shape = (num_blocks, kv_heads, block_size, 2 * dim)
    stored = [shape[i] for i in LAYOUTS[layout]]
    cache = torch.full(stored, float("nan"), dtype=dtype).permute(LAYOUTS[layout])
    table = torch.randperm(num_blocks, generator=generator)[: per_request * len(lengths)].view(len(lengths), -1).int()
    for b, (first, length) in enumerate(zip(firsts, lengths, strict=True)):
        for p in range(first, length):
            row = torch.randn(kv_heads, 2 * dim, generator=generator).to(dtype)
            cache[table[b, p // block_size].item(), :, p % block_size] = row
    k, v = cache.transpose(1, 2).split(dim, -1)
    return k, v, table


def with_threads(count, attention, *inputs, **options):
    # Not set: vLLM forbids that in a process that has had an engine.
    with mock.patch.object(torch, "get_num_threads", return_value=count):
        return attention(*inputs, **options)


heads = st.sampled_from([(1, 1), (3, 1), (9, 3), (8, 2), (4, 4)])


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=heads, dim=st.sampled_from([8, 64, 80]), block_size=st.sampled_from([16, 32]),
       layout=st.sampled_from(list(LAYOUTS)), window=st.sampled_from([0, 0, 1, 7, 20]),
       soft_cap=st.sampled_from([0.0, 0.0, 0.5, 2.0, 50.0]),
       sink=st.sampled_from([None, None, -8.0, 0.0, 8.0]), threads=st.sampled_from([1, 2, 3]))  # fmt: skip
def test_tree_attention(data, shape, dim, block_size, layout, window, soft_cap, sink, threads):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    batch = data.draw(st.integers(1, 3))
    trees, rows, seqs, masks = [], [], [], torch.zeros(batch, 64, dtype=torch.int64)
    for b in range(batch):
        tree = data.draw(st.sampled_from([0, 0, 2, 5, 9]))
        before = data.draw(st.integers(0, 3)) if tree else data.draw(st.integers(0, 40))
        trees.append(tree)
        rows.append(tree + before)
        seqs.append(rows[-1] + data.draw(st.integers(0 if rows[-1] else 1, 70)))
        if tree:
            parents = [data.draw(st.integers(0, t - 1)) for t in range(1, tree)]
            masks[b, :tree] = torch.tensor(ancestor_masks(parents))
    firsts = [max(0, s - n - window + 1) if window else 0 for s, n in zip(seqs, rows, strict=True)]
    k, v, table = paged(seqs, firsts, shape[1], dim, block_size, layout, generator)
    starts = torch.tensor([0, *torch.tensor(rows).cumsum(0).tolist()], dtype=torch.int32)
    q = torch.randn(sum(rows) + 2, shape[0], dim, generator=generator)
    inputs = (q, k, v, table, starts, torch.tensor(seqs, dtype=torch.int32), masks)
    lengths = torch.tensor([*trees, 7], dtype=torch.int32)
    options = {"scale": dim**-0.5, "max_query_len": max(rows), "sliding_window": window, "soft_cap": soft_cap}
    options["sinks"] = None if sink is None else sink + torch.randn(shape[0], generator=generator)
    ours, twin = torch.full_like(q, 5.0), torch.full_like(q, 5.0)
    with_threads(threads, attention.tree_attention, *inputs, lengths, out=ours, **options)
    reference.tree_attention(*inputs, lengths, out=twin, **options)
    # The padding rows at the end stay as they were.
    torch.testing.assert_close(ours, twin, rtol=2e-5, atol=2e-6)


@settings(max_examples=60, deadline=None)
@given(data=st.data(), shape=heads, dim=st.sampled_from([8, 64, 80]), num_rows=st.sampled_from([1, 3, 8]),
       layout=st.sampled_from(list(LAYOUTS)), window=st.sampled_from([0, 1, 7, 20]), causal=st.booleans(),
       alone=st.booleans(), threads=st.sampled_from([1, 2, 3]))  # fmt: skip
def test_paged_draft_attention(data, shape, dim, num_rows, layout, window, causal, alone, threads):
    generator = torch.Generator().manual_seed(data.draw(st.integers(0, 999)))
    lengths = data.draw(st.lists(st.integers(int(alone), 90), min_size=1, max_size=3))
    firsts = [max(0, n - window + (not alone)) if window else 0 for n in lengths]
    k, v, table = paged([max(1, n) for n in lengths], firsts, shape[1], dim, 16, layout, generator)
    q = torch.randn(len(lengths), num_rows, shape[0], dim, generator=generator)
    block = (None, None) if alone else torch.randn(2, len(lengths), num_rows, shape[1], dim, generator=generator)
    inputs = (q, k, v, table, torch.tensor([*lengths, 3], dtype=torch.int32), *block)
    options = {"scale": dim**-0.5, "sliding_window": window, "causal": causal}
    ours = with_threads(threads, attention.paged_draft_attention, *inputs, out=torch.empty_like(q), **options)
    twin = reference.paged_draft_attention(*inputs, out=torch.empty_like(q), **options)
    torch.testing.assert_close(ours, twin, rtol=2e-5, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_other_dtypes_take_the_twin(dtype):
    generator = torch.Generator().manual_seed(0)
    k, v, table = paged([20], [0], 1, 64, 16, "NHD", generator, dtype)
    q = torch.randn(2, 3, 64, generator=generator).to(dtype)
    inputs = (q, k, v, table, torch.tensor([0, 2], dtype=torch.int32), torch.tensor([20], dtype=torch.int32))
    trees = (torch.zeros(1, 4, dtype=torch.int64), torch.zeros(1, dtype=torch.int32))
    options = {"scale": 0.125, "max_query_len": 2}
    ours = attention.tree_attention(*inputs, *trees, out=torch.empty_like(q), **options)
    assert torch.equal(ours, reference.tree_attention(*inputs, *trees, out=torch.empty_like(q), **options))
