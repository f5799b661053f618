# SPDX-License-Identifier: Apache-2.0
"""Addresses are computed in 64 bits: moving one argument to strides past 2**31 elements changes no result."""

import functools

import pytest
import torch
from far_memory import far

from vllm_kvspec.kernels import recycle, reference_recycle
from vllm_kvspec.kernels.kv_compact import kv_base_ptrs, kv_compact
from vllm_kvspec.kernels.loose_scores import loose_scores
from vllm_kvspec.kernels.paged_draft_attention import paged_draft_attention
from vllm_kvspec.kernels.tree_attention import tree_attention
from vllm_kvspec.kernels.tree_build import tree_build
from vllm_kvspec.kernels.tree_inputs import tree_inputs
from vllm_kvspec.kernels.tree_walk import tree_walk

REQUESTS, ROWS, HEADS, KV_HEADS, DIM, BLOCK_SIZE, CONTEXT = 3, 3, 6, 3, 16, 4, 5


def _random(*shape: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(sum(shape))).half()


def _tree_mask() -> torch.Tensor:
    return torch.tensor([[1, 3, 5], [1, 3, 7], [1, 3, 5]])


def _tree_attention() -> dict:
    return dict(
        q=_random(REQUESTS * ROWS, HEADS, DIM), k_cache=_random(6, BLOCK_SIZE, KV_HEADS, DIM),
        v_cache=_random(6, BLOCK_SIZE, KV_HEADS, DIM), block_table=torch.tensor([[5, 4], [3, 2], [1, 0]]).int(),
        query_start_loc=torch.arange(0, 10, ROWS).int(), seq_lens=torch.full((REQUESTS,), CONTEXT + ROWS).int(),
        batch_mask=_tree_mask(), batch_len=torch.full((REQUESTS,), ROWS).int(),
        out=_random(REQUESTS * ROWS, HEADS, DIM),
    )  # fmt: skip


def _draft_attention() -> dict:
    return dict(
        q=_random(REQUESTS, ROWS, HEADS, DIM), k_cache=_random(6, BLOCK_SIZE, KV_HEADS, DIM),
        v_cache=_random(6, BLOCK_SIZE, KV_HEADS, DIM), block_table=torch.tensor([[5, 4], [3, 2], [1, 0]]).int(),
        context_lens=torch.tensor([5, 8, 3]).int(), k_block=_random(REQUESTS, ROWS, KV_HEADS, DIM),
        v_block=_random(REQUESTS, ROWS, KV_HEADS, DIM), out=_random(REQUESTS, ROWS, HEADS, DIM),
    )  # fmt: skip


def _inputs() -> dict:
    return dict(
        positions=torch.arange(9) + 100, logits_indices=torch.arange(9), cu_num_logits=torch.tensor([0, 3, 6, 9]).int(),
        idx_mapping=torch.tensor([2, 0, 1]), depth=torch.tensor([[0, 1, 1], [0, 1, 2], [0, 1, 1]]).int(),
        ancestor_mask=_tree_mask(), batch_mask=torch.zeros(3, 3, dtype=torch.int64),
        batch_len=torch.zeros(3, dtype=torch.int32), local_pos=torch.zeros(9, dtype=torch.int32),
    )  # fmt: skip


def _walk() -> dict:
    return dict(
        sampled=torch.tensor([7, 8, 9, 7, 8, 9, 7, 8, 9]), draft_tokens=torch.tensor([0, 7, 7, 0, 7, 8, 0, 1, 7]),
        parent=torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 0]]).int(), cu_num_logits=torch.tensor([0, 3, 6, 9]).int(),
        idx_mapping=torch.tensor([2, 1, 0]),
    )  # fmt: skip


def _scores() -> dict:
    return _walk() | dict(logits=_random(9, 20).float(), sampled=torch.full((9,), 10))


def _build() -> dict:
    return dict(
        score=-torch.rand(3, 4, generator=torch.Generator().manual_seed(0)), token=torch.arange(12).view(3, 4),
        parent=torch.full((3, 4), -1).int(),
    )  # fmt: skip


def _compact() -> dict:
    cache = torch.arange(6 * 3 * BLOCK_SIZE * DIM, dtype=torch.float32).view(6, 3, BLOCK_SIZE, DIM)
    return dict(
        cache=cache, block_table=torch.tensor([[5, 4], [3, 2], [1, 0]]).int(), base=torch.tensor([1, 3, 2]),
        path=torch.tensor([[0, 2, 3], [0, 1, 3], [0, 3, 4]]).int(), num_sampled=torch.tensor([3, 3, 3]).int(),
    )  # fmt: skip


def _texts() -> torch.Tensor:
    return torch.tensor([[1, 2, 3, 1, 2, 4, 1, 2], [5, 6, 5, 6, 7, 8, 5, 6], [9, 9, 9, 8, 9, 9, 7, 9]]).int()


def _grow() -> dict:
    text, request, base = _texts(), torch.tensor([2, 0, 1]), torch.tensor([7, 7, 7]).int()
    return dict(
        matches=reference_recycle.own_matches(text, request, base), request=request, base=base, text=text,
        temperature=torch.zeros(3), seed=torch.arange(3), chain=torch.zeros(3).int(), owner=torch.zeros(3).long(),
    )  # fmt: skip


def _run_grow(**arguments) -> tuple:
    table = reference_recycle.empty_table(64, arguments["request"].device)
    return recycle.recycle_tree(table, **arguments, size=5, num_nodes=5, coupled=True)


def _learn() -> dict:
    return dict(
        token=torch.arange(72).view(9, 8), log_prob=-torch.arange(72.0).view(9, 8), input_ids=torch.arange(9) % 4,
        positions=torch.arange(9) % 5, logits_indices=torch.arange(9), local_pos=torch.tensor([0, 1, 2] * 3),
        idx_mapping=torch.tensor([2, 2, 2, 0, 0, 0, 1, 1, 1]), owner=torch.arange(3), text=_texts(),
        parent=torch.tensor([[0, 0, 0], [0, 0, 1], [0, 0, 0]]).int(),
    )  # fmt: skip


def _run_learn(**arguments) -> tuple:
    table = reference_recycle.empty_table(64, arguments["owner"].device)
    recycle.recycle_update(table, **arguments)
    return tuple(table)


def _run_compact(cache: torch.Tensor, **moves) -> torch.Tensor:
    kv_compact([cache], kv_base_ptrs([cache]), **moves)
    return cache


def _run_inputs(**inputs) -> tuple:
    tree_inputs(**inputs)
    return tuple(inputs.values())


# Kernel: its arguments, the launch, and the (argument, dimension) pairs that may be far away.
KERNELS = {
    "tree_attention": (
        _tree_attention,
        lambda **a: tree_attention(**a, scale=0.25, max_query_len=ROWS),
        [("q", 0), ("q", 1), ("block_table", 0), ("batch_mask", 0), ("out", 0), ("out", 1)]
        + [(cache, dim) for cache in ("k_cache", "v_cache") for dim in range(3)],
    ),
    "paged_draft_attention": (
        _draft_attention,
        lambda **a: paged_draft_attention(**a, scale=0.25),
        [("block_table", 0)]
        + [(name, dim) for name in ("q", "k_block", "v_block", "k_cache", "v_cache", "out") for dim in range(3)],
    ),
    "tree_inputs": (_inputs, _run_inputs, [("depth", 0), ("ancestor_mask", 0), ("batch_mask", 0)]),
    "tree_walk": (_walk, tree_walk, [("parent", 0)]),
    "loose_scores": (_scores, lambda **a: loose_scores(**a, threshold=0.0), [("logits", 0), ("parent", 0)]),
    "tree_build": (
        _build,
        lambda **a: tree_build(**a, num_nodes=3),
        [(name, 0) for name in ("score", "token", "parent")],
    ),
    "own_matches": (
        lambda: dict(text=_texts(), request=torch.tensor([2, 0, 1]), base=torch.tensor([7, 7, 7]).int()),
        recycle.own_matches,
        [("text", 0)],
    ),
    "recycle_tree": (_grow, _run_grow, [("text", 0)]),
    "recycle_update": (_learn, _run_learn, [("text", 0), ("parent", 0)]),
    "kv_compact": (_compact, _run_compact, [("cache", 0), ("cache", 1), ("cache", 2), ("path", 0), ("block_table", 0)]),
}


def _tensors(result: torch.Tensor | tuple) -> tuple:
    return (result,) if torch.is_tensor(result) else result


@functools.cache
def _near(kernel: str, device: torch.device) -> tuple:
    """Results with every argument in ordinary memory."""
    arguments, launch, _ = KERNELS[kernel]
    return _tensors(launch(**{k: v.to(device) for k, v in arguments().items()}))


@pytest.mark.parametrize(
    ("kernel", "name", "dim"),
    [
        pytest.param(kernel, *at, id=f"{kernel}-{at[0]}-{at[1]}")
        for kernel, (*_, pairs) in KERNELS.items()
        for at in pairs
    ],
)
def test_far_argument_changes_nothing(device, kernel, name, dim):
    arguments, launch, _ = KERNELS[kernel]
    if device.type == "cuda" and torch.cuda.mem_get_info()[0] < 48 << 30:
        pytest.skip(reason="a GPU has no memory that is reserved but never filled: needs 48 GB free")
    moved = {k: v.to(device) for k, v in arguments().items()}
    moved[name] = far(moved[name], dim)
    for ours, truth in zip(_tensors(launch(**moved)), _near(kernel, device), strict=True):
        assert torch.equal(ours, truth)
