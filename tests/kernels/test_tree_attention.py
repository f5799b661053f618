# SPDX-License-Identifier: Apache-2.0
"""tree_attention: twin against the rule spelled out per row and key in float64, kernel against both."""

import pytest
import torch

from vllm_kvspec.kernels import reference
from vllm_kvspec.kernels import tree_attention as module
from vllm_kvspec.kernels.tree_attention import tree_attention

# Relative error of the whole output. fp32 sums in another order; fp16/bf16 round the inputs of both products.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}
HND, NHD, SPLIT = "blocks-heads-slots-kv", "blocks-slots-heads-kv", "kv-blocks-slots-heads"


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


def _random_masks(rows: int, nodes: int, seed: int) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    masks = torch.zeros(rows, nodes, dtype=torch.int64)
    for b in range(rows):
        masks[b, 0] = 1
        for t in range(1, nodes):
            parent = int(torch.randint(0, t, (1,), generator=gen))
            masks[b, t] = masks[b, parent] | (torch.ones((), dtype=torch.int64) << t)
    return masks


def _visible(n: int, seq_len: int, tree: int, masks: list[int], window: int) -> torch.Tensor:
    """The rule of the twin's docstring, one pair at a time."""

    def depth_position(p: int) -> int:
        t = p - (seq_len - tree)
        return p if t < 0 else seq_len - tree + (masks[t] % 2**64).bit_count() - 1

    def sees(i: int, j: int) -> bool:
        row = seq_len - n + i
        if window and depth_position(row) - depth_position(j) >= window:
            return False
        if tree and row >= seq_len - tree and j >= seq_len - tree:
            return bool(masks[row - (seq_len - tree)] >> (j - (seq_len - tree)) & 1)
        return j <= row

    return torch.tensor([[sees(i, j) for j in range(seq_len)] for i in range(n)])


class Case:
    """A batch given as (query rows, context, tree size) per request, with padding rows at the end of q."""

    def __init__(self, make_paged, device, requests, heads, kv_heads, dim, block_size, dtype, layout, window, max_tree):
        lens = [n + context for n, context, _ in requests]
        firsts = [max(0, context - window + 1) if window else 0 for _, context, _ in requests]
        self.requests, self.window, self.scale = requests, window, dim**-0.5
        self.paged = make_paged(lens, kv_heads, dim, block_size, dtype, layout, device, firsts)
        rows = sum(n for n, _, _ in requests)
        gen = torch.Generator().manual_seed(5)
        self.q = torch.randn(rows + 3, heads, dim, generator=gen).to(dtype).to(device)
        self.masks = _random_masks(len(requests) + 2, max_tree, 3).to(device)
        starts = torch.tensor([0, *(n for n, _, _ in requests)]).cumsum(0).int()
        trees = [tree for _, _, tree in requests] + [0, 0]
        self.args = (
            self.q,
            self.paged.k_cache,
            self.paged.v_cache,
            self.paged.block_table,
            starts.to(device),
            torch.tensor(lens, dtype=torch.int32, device=device),
            self.masks,
            torch.tensor(trees, dtype=torch.int32, device=device),
        )
        self.max_query_len = max(n for n, _, _ in requests)

    def run(self, attention, **options) -> torch.Tensor:
        out = torch.full_like(self.q, float("nan"))
        options = (
            dict(scale=self.scale, max_query_len=self.max_query_len, sliding_window=self.window, out=out) | options
        )
        assert attention(*self.args, **options) is out
        # Padding rows stay untouched.
        assert out[-3:].isnan().all()
        return out[:-3]

    def truth(self, dense, **options) -> torch.Tensor:
        start, parts = 0, []
        for b, (n, context, tree) in enumerate(self.requests):
            visible = _visible(n, n + context, tree, self.masks[b].tolist(), self.window).to(self.q.device)
            if n:
                kv = self.paged.keys[b], self.paged.values[b]
                parts.append(dense(self.q[start : start + n], *kv, visible, self.scale, **options))
            start += n
        return torch.cat(parts)


MIXED = [(9, 40, 9), (1, 77, 0), (0, 12, 0), (30, 0, 0), (20, 21, 0), (9, 0, 9), (9, 119, 9)]
CASES = [
    pytest.param(MIXED, 4, 2, 64, 16, torch.float32, HND, 0, 9, id="mixed-H4-KV2-D64-bs16-tree9-hnd"),
    pytest.param(MIXED, 4, 4, 80, 16, torch.float32, NHD, 0, 9, id="mixed-H4-KV4-D80-nhd"),
    pytest.param([(17, 130, 17)], 8, 1, 64, 32, torch.float32, SPLIT, 0, 17, id="B1-group8-bs32-tree17"),
    pytest.param([(64, 70, 64)], 4, 2, 64, 16, torch.float32, HND, 0, 64, id="largest-tree-64"),
    pytest.param([(5, 66, 5), (4, 60, 4)], 6, 2, 96, 16, torch.float32, HND, 0, 6, id="group3-D96-small-trees"),
    pytest.param([(12, 50, 5)], 4, 2, 64, 16, torch.float32, HND, 0, 9, id="prompt-chunk-then-tree"),
    pytest.param(MIXED, 4, 2, 64, 16, torch.float32, HND, 20, 9, id="mixed-window20"),
    pytest.param([(9, 80, 9), (1, 80, 0)], 4, 2, 64, 16, torch.float32, HND, 3, 9, id="window3-inside-tree"),
    pytest.param(
        [(40, 60, 40)], 8, 1, 64, 16, torch.float32, HND, 12, 40, id="window12-query-tiles-that-start-in-the-tree"
    ),
    pytest.param([(9, 75, 9), (1, 40, 0)], 4, 2, 64, 16, torch.float16, HND, 0, 9, id="fp16"),
    pytest.param([(9, 75, 9), (1, 40, 0)], 4, 2, 128, 16, torch.bfloat16, HND, 0, 9, id="bf16-D128"),
    pytest.param([(3, 20, 3)], 80, 1, 64, 16, torch.float32, HND, 0, 9, id="group80-wider-than-the-tile"),
    pytest.param([(9, 40, 9)], 2, 1, 256, 16, torch.float32, HND, 0, 9, id="D256"),
    pytest.param([(9, 40, 9)], 4, 1, 512, 16, torch.float32, HND, 0, 9, id="D512"),
]
NAMES = ("requests", "heads", "kv_heads", "dim", "block_size", "dtype", "layout", "window", "max_tree")


@pytest.mark.parametrize(NAMES, CASES)
@pytest.mark.parametrize("splits", [1, 4])
def test_kernel_and_twin_match_float64(
    monkeypatch, make_paged, dense, device, splits,
    requests, heads, kv_heads, dim, block_size, dtype, layout, window, max_tree,
):  # fmt: skip
    monkeypatch.setattr(module, "num_splits", lambda *_: splits)
    case = Case(make_paged, device, requests, heads, kv_heads, dim, block_size, dtype, layout, window, max_tree)
    truth = case.truth(dense)
    for attention in (tree_attention, reference.tree_attention):
        assert relative_error(case.run(attention), truth) < TOLERANCE[dtype]


@pytest.mark.parametrize(
    ("soft_cap", "sinks"),
    [
        pytest.param(1.5, None, id="cap"),
        pytest.param(0.0, torch.float32, id="sinks"),
        pytest.param(0.0, torch.bfloat16, id="sinks-bf16"),
        pytest.param(1.5, torch.float32, id="both"),
    ],
)
@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize("window", [0, 20, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
def test_soft_cap_and_sinks(monkeypatch, make_paged, dense, device, dtype, window, splits, sinks, soft_cap):
    monkeypatch.setattr(module, "num_splits", lambda *_: splits)
    requests = [(9, 75, 9), (1, 40, 0), (12, 20, 5), (3, 0, 0)]
    case = Case(make_paged, device, requests, 6, 2, 64, 16, dtype, HND, window, 9)
    # From next to nothing to nearly all of the weight.
    sinks = None if sinks is None else torch.linspace(-4, 8, 6).to(sinks).to(device)
    options = dict(soft_cap=soft_cap, sinks=sinks)
    truth = case.truth(dense, **options)
    for attention in (tree_attention, reference.tree_attention):
        assert relative_error(case.run(attention, **options), truth) < TOLERANCE[dtype]


@pytest.mark.parametrize("attention", [tree_attention, reference.tree_attention])
def test_soft_cap_of_scores_far_beyond_it(make_paged, dense, device, attention):
    case = Case(make_paged, device, [(9, 40, 9), (1, 20, 0)], 4, 2, 64, 16, torch.float32, HND, 0, 9)
    case.scale = 1e3
    assert relative_error(case.run(attention, soft_cap=2.0), case.truth(dense, soft_cap=2.0)) < 1e-5


def test_chain_mask_is_plain_causal_attention(make_paged, device):
    case = Case(make_paged, device, [(9, 40, 9), (6, 3, 6)], 4, 2, 64, 16, torch.float32, HND, 0, 9)
    chain = (2 << torch.arange(9)) - 1
    case.masks.copy_(chain.expand_as(case.masks))
    for attention in (tree_attention, reference.tree_attention):
        with_mask = case.run(attention)
        case.args[-1].zero_()
        without = case.run(attention)
        case.args[-1][:2] = torch.tensor([9, 6])
        torch.testing.assert_close(with_mask, without, rtol=1e-6, atol=1e-6)


def test_scales_and_fp8_cache(make_paged, dense, device):
    fp8 = torch.float8_e4m3fn
    case = Case(make_paged, device, [(9, 40, 9), (1, 20, 0)], 4, 2, 64, 16, torch.float32, HND, 0, 9)
    caches = [torch.where(c.isnan(), 0, c).to(fp8) for c in case.args[1:3]]
    case.args = (case.q, *caches, *case.args[3:])
    case.paged.keys = [k.to(fp8).float() * 0.5 for k in case.paged.keys]
    case.paged.values = [v.to(fp8).float() * 3.0 for v in case.paged.values]
    truth = case.truth(dense)
    for attention in (tree_attention, reference.tree_attention):
        for k_scale, v_scale in ((0.5, 3.0), (torch.tensor([0.5], device=device), torch.tensor(3.0, device=device))):
            out = case.run(attention, k_scale=k_scale, v_scale=v_scale)
            assert relative_error(out, truth) < TOLERANCE[torch.float32]


def test_fp8_query(make_paged, dense, device):
    """Where the cache is fp8 vLLM hands over fp8 queries; products are in the output's dtype all the same."""
    case = Case(make_paged, device, [(9, 40, 9), (1, 20, 0)], 4, 2, 64, 16, torch.float32, HND, 0, 9)
    quantized = case.q.to(torch.float8_e4m3fn)
    case.q = quantized.float() * 0.25
    case.args = (quantized, *case.args[1:])
    truth = case.truth(dense)
    for attention in (tree_attention, reference.tree_attention):
        for q_scale in (0.25, torch.tensor([0.25], device=device)):
            assert relative_error(case.run(attention, q_scale=q_scale), truth) < TOLERANCE[torch.float32]


def test_upper_bound_of_query_length_is_enough(make_paged, dense, device):
    case = Case(make_paged, device, [(5, 30, 5), (1, 9, 0)], 4, 2, 64, 16, torch.float32, HND, 0, 9)
    out = case.run(tree_attention, max_query_len=64)
    assert relative_error(out, case.truth(dense)) < TOLERANCE[torch.float32]


def test_accumulates_in_fp32(make_paged, dense, device):
    # Rounding the running output to bf16 after each of 24 key tiles gives 7e-3; rounding only what the products take
    # in gives 2.3e-3.
    case = Case(make_paged, device, [(2, 1500, 2)], 4, 1, 64, 16, torch.bfloat16, HND, 0, 2)
    assert relative_error(case.run(tree_attention), case.truth(dense)) < 4e-3
