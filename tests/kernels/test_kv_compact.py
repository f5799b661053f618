# SPDX-License-Identifier: Apache-2.0
"""kv_compact: twin against copies done one by one in python, kernel against twin, bit for bit."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvspec.kernels import reference
from vllm_kvspec.kernels.kv_compact import kv_base_ptrs, kv_compact

NUM_BLOCKS, BLOCK_SIZE, TABLE = 24, 4, 6


def _caches(order: tuple[int, ...], dtype: torch.dtype, heads: int, content: int, layers: int, device) -> list:
    """Random bytes in logical [num_blocks, heads, block_size, content], stored in the given order of dimensions."""
    shape = (NUM_BLOCKS, heads, BLOCK_SIZE, content)
    inverse = [order.index(i) for i in range(4)]
    made = []
    for _ in range(layers):
        raw = torch.randint(0, 256, (*[shape[i] for i in order[:3]], content * dtype.itemsize), dtype=torch.uint8)
        made.append(raw.to(device).view(dtype).permute(inverse))
    return made


def _bytes(caches):
    return [cache.contiguous().view(torch.uint8) for cache in caches]


def _python_compact(caches, block_table, base, path, num_sampled):
    for cache in caches:
        for b, n in enumerate(num_sampled.tolist()):
            for d in range(1, n):
                src, dst = int(base[b] + path[b, d]), int(base[b]) + d
                src_block, dst_block = block_table[b, src // BLOCK_SIZE], block_table[b, dst // BLOCK_SIZE]
                cache[dst_block, :, dst % BLOCK_SIZE] = cache[src_block, :, src % BLOCK_SIZE].clone()


@st.composite
def _moves(draw):
    num_reqs, num_nodes = draw(st.integers(1, 3)), draw(st.integers(1, 9))
    base, path, count = [], [], []
    for _ in range(num_reqs):
        base.append(draw(st.integers(0, TABLE * BLOCK_SIZE - num_nodes)))
        length = draw(st.integers(0, num_nodes))
        chosen = sorted(draw(st.permutations(range(1, num_nodes)))[: max(length - 1, 0)])
        # Entries past the accepted path must be ignored whatever they hold.
        path.append(([0, *chosen] + [num_nodes - 1] * num_nodes)[:num_nodes])
        count.append(length)
    blocks = draw(st.permutations(range(NUM_BLOCKS)))[: num_reqs * TABLE]
    return (
        torch.tensor(blocks, dtype=torch.int32).view(num_reqs, TABLE),
        torch.tensor(base),
        torch.tensor(path, dtype=torch.int32),
        torch.tensor(count, dtype=torch.int32),
    )


@settings(max_examples=60, deadline=None)
@given(_moves())
def test_twin_matches_python_copies(moves):
    torch.manual_seed(0)
    caches = _caches((0, 2, 1, 3), torch.float32, 2, 6, 2, "cpu")
    expected = [cache.clone() for cache in caches]
    _python_compact(expected, *moves)
    reference.kv_compact(caches, kv_base_ptrs(caches), *moves)
    assert all(torch.equal(a, b) for a, b in zip(_bytes(caches), _bytes(expected), strict=True))


@pytest.mark.parametrize(
    ("order", "dtype", "heads", "content"),
    [
        pytest.param((0, 1, 2, 3), torch.float32, 2, 8, id="blocks-heads-slots-fp32"),
        pytest.param((0, 2, 1, 3), torch.bfloat16, 3, 20, id="blocks-slots-heads-bf16-3-heads"),
        pytest.param((1, 0, 2, 3), torch.float16, 2, 5, id="heads-first-odd-content"),
        pytest.param((0, 2, 1, 3), torch.float8_e4m3fn, 2, 7, id="fp8-single-bytes"),
    ],
)
@settings(max_examples=12, deadline=None)
@given(moves=_moves())
def test_kernel_matches_twin(order, dtype, heads, content, moves):
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(0)
    ours = _caches(order, dtype, heads, content, 3, device)
    twin = [cache.clone(memory_format=torch.preserve_format) for cache in ours]
    moves = [tensor.to(device) for tensor in moves]
    kv_compact(ours, kv_base_ptrs(ours), *moves)
    reference.kv_compact(twin, kv_base_ptrs(twin), *moves)
    assert all(torch.equal(a, b) for a, b in zip(_bytes(ours), _bytes(twin), strict=True))


def test_unequal_caches_are_refused():
    with pytest.raises(ValueError, match="one shape, strides"):
        kv_base_ptrs([torch.zeros(4, 2, 4, 8), torch.zeros(4, 2, 4, 6)])
    with pytest.raises(ValueError, match="content stride 1"):
        kv_base_ptrs([torch.zeros(4, 2, 8, 4).transpose(2, 3)])
