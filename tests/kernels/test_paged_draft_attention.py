# SPDX-License-Identifier: Apache-2.0
"""paged_draft_attention: twin against dense float64, kernel against both, over layouts, windows, splits and dtypes."""

import pytest
import torch

from vllm_kvspec.kernels import paged_draft_attention as module
from vllm_kvspec.kernels import reference
from vllm_kvspec.kernels.paged_draft_attention import paged_draft_attention

# Relative error of the whole output. fp32 sums in another order; fp16/bf16 round the inputs of both products.
TOLERANCE = {torch.float32: 2e-6, torch.float16: 1e-3, torch.bfloat16: 8e-3}


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


def _dense(dense, case, paged, window, scale, causal=False):
    q, block_k, block_v, lens = case
    truth = torch.empty_like(q, dtype=torch.float64)
    rows = torch.arange(q.shape[1], device=q.device)
    for b, n in enumerate(lens):
        k, v = torch.cat([paged.keys[b], block_k[b]]), torch.cat([paged.values[b], block_v[b]])
        j = torch.arange(n + len(rows), device=q.device)
        visible = (j >= n) | (n + rows[:, None] - j < window) if window else torch.ones(len(rows), len(j)).bool()
        if causal:
            visible = visible.to(q.device) & (j <= n + rows[:, None])
        truth[b] = dense(q[b], k, v, visible.to(q.device), scale)
    return truth


def _case(make_paged, device, lens, g, heads, kv_heads, dim, block_size, dtype, layout, window):
    firsts = [max(0, n - window + 1) for n in lens] if window else None
    paged = make_paged(lens, kv_heads, dim, block_size, dtype, layout, device, firsts)
    gen = torch.Generator().manual_seed(9)
    q = torch.randn(len(lens), g, heads, dim, generator=gen).to(dtype).to(device)
    block_k, block_v = (torch.randn(len(lens), g, kv_heads, dim, generator=gen).to(dtype).to(device) for _ in range(2))
    args = (q, paged.k_cache, paged.v_cache, paged.block_table, torch.tensor(lens, dtype=torch.int32, device=device))
    return paged, (q, block_k, block_v, lens), (*args, block_k, block_v)


HND, NHD, SPLIT = "blocks-heads-slots-kv", "blocks-slots-heads-kv", "kv-blocks-slots-heads"
CASES = [
    pytest.param([33], 4, 4, 4, 64, 16, torch.float32, HND, 0, id="B1-G4-H4-KV4-D64-bs16-ctx33-hnd"),
    pytest.param([0, 70, 128], 8, 4, 1, 80, 16, torch.float32, NHD, 0, id="B3-G8-H4-KV1-D80-ctx0-and-whole-tile-nhd"),
    pytest.param([130, 5], 3, 8, 1, 64, 32, torch.float32, SPLIT, 0, id="B2-G3-H8-KV1-group8-bs32"),
    pytest.param([75, 31], 8, 6, 2, 96, 16, torch.float32, HND, 0, id="B2-G8-H6-KV2-group3-D96"),
    pytest.param([75, 3, 0], 5, 4, 2, 64, 16, torch.float32, HND, 20, id="window20"),
    pytest.param([75], 5, 4, 2, 64, 16, torch.float32, HND, 1, id="window1-sees-no-context"),
    pytest.param([40], 20, 16, 1, 128, 16, torch.float32, HND, 0, id="320-rows-several-row-tiles"),
    pytest.param([75], 8, 4, 2, 64, 16, torch.float16, HND, 0, id="fp16"),
    pytest.param([75], 8, 4, 2, 64, 16, torch.bfloat16, HND, 0, id="bf16"),
    pytest.param([40], 4, 2, 1, 256, 16, torch.float32, HND, 0, id="D256"),
    pytest.param([40], 4, 4, 1, 512, 16, torch.float32, HND, 0, id="D512"),
]


@pytest.mark.parametrize(("lens", "g", "heads", "kv_heads", "dim", "block_size", "dtype", "layout", "window"), CASES)
@pytest.mark.parametrize("splits", [1, 4])
def test_kernel_and_twin_match_float64(
    monkeypatch, make_paged, dense, device, lens, g, heads, kv_heads, dim, block_size, dtype, layout, window, splits
):
    monkeypatch.setattr(module, "num_splits", lambda *_: splits)
    paged, case, args = _case(make_paged, device, lens, g, heads, kv_heads, dim, block_size, dtype, layout, window)
    truth = _dense(dense, case, paged, window, dim**-0.5)
    for attention in (paged_draft_attention, reference.paged_draft_attention):
        out = torch.full_like(case[0], float("nan"))
        assert attention(*args, scale=dim**-0.5, sliding_window=window, out=out) is out
        assert relative_error(out, truth) < TOLERANCE[dtype]


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(
    ("lens", "g", "heads", "kv_heads", "window"),
    [
        pytest.param([0, 70, 16], 8, 6, 2, 0, id="group3-ctx0"),
        pytest.param([75, 3], 5, 4, 2, 20, id="window20"),
        pytest.param([40], 20, 16, 1, 0, id="320-rows-several-row-tiles"),
        pytest.param([33], 1, 4, 1, 0, id="one-row"),
    ],
)
def test_causal_block(monkeypatch, make_paged, dense, device, lens, g, heads, kv_heads, window, splits):
    monkeypatch.setattr(module, "num_splits", lambda *_: splits)
    paged, case, args = _case(make_paged, device, lens, g, heads, kv_heads, 64, 16, torch.float32, HND, window)
    truth = _dense(dense, case, paged, window, 0.125, causal=True)
    for attention in (paged_draft_attention, reference.paged_draft_attention):
        out = torch.full_like(case[0], float("nan"))
        attention(*args, scale=0.125, sliding_window=window, causal=True, out=out)
        assert relative_error(out, truth) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("splits", [1, 4])
@pytest.mark.parametrize(
    ("lens", "g", "dim", "window"),
    [
        pytest.param([1, 70, 16], 8, 64, 0, id="one-key"),
        pytest.param([75, 3], 5, 64, 20, id="window20"),
        pytest.param([75], 3, 64, 1, id="window1-sees-the-last-key"),
        pytest.param([40], 8, 512, 0, id="D512"),
    ],
)
def test_queries_alone(monkeypatch, make_paged, dense, device, lens, g, dim, window, splits):
    """Each row as a decode step's at the context's last position."""
    monkeypatch.setattr(module, "num_splits", lambda *_: splits)
    # One key more of a window than a block's first row sees.
    paged, case, args = _case(make_paged, device, lens, g, 4, 2, dim, 16, torch.float32, HND, window and window + 1)
    rows = []
    for b, length in enumerate(lens):
        first = max(0, length - window) if window else 0
        keys, values = (x[b][first:].double() for x in (paged.keys, paged.values))
        visible = torch.ones(g, len(keys), dtype=torch.bool, device=device)
        rows.append(dense(case[0][b].double(), keys, values, visible, 0.125))
    for attention in (paged_draft_attention, reference.paged_draft_attention):
        out = torch.full_like(case[0], float("nan"))
        attention(*args[:5], None, None, scale=0.125, sliding_window=window, out=out)
        assert relative_error(out, torch.stack(rows)) < TOLERANCE[torch.float32]


@pytest.mark.parametrize("as_tensor", [False, True])
def test_scales_apply_to_the_cache_only(make_paged, dense, device, as_tensor):
    paged, case, args = _case(make_paged, device, [37], 4, 4, 2, 64, 16, torch.float32, HND, 0)
    k_scale, v_scale = (torch.tensor([s], device=device) if as_tensor else s for s in (0.5, 3.0))
    paged.keys[0], paged.values[0] = paged.keys[0] * 0.5, paged.values[0] * 3.0
    truth = _dense(dense, case, paged, 0, 0.125)
    for attention in (paged_draft_attention, reference.paged_draft_attention):
        out = torch.full_like(case[0], float("nan"))
        attention(*args, scale=0.125, k_scale=k_scale, v_scale=v_scale, out=out)
        assert relative_error(out, truth) < TOLERANCE[torch.float32]


def test_fp8_cache(make_paged, dense, device):
    fp8 = torch.float8_e4m3fn
    paged, case, args = _case(make_paged, device, [37], 4, 4, 2, 64, 16, torch.float32, HND, 0)
    caches = [torch.where(c.isnan(), 0, c).to(fp8) for c in args[1:3]]
    paged.keys[0], paged.values[0] = paged.keys[0].to(fp8).float(), paged.values[0].to(fp8).float()
    truth = _dense(dense, case, paged, 0, 0.125)
    for attention in (paged_draft_attention, reference.paged_draft_attention):
        out = torch.full_like(case[0], float("nan"))
        attention(args[0], *caches, *args[3:], scale=0.125, out=out)
        assert relative_error(out, truth) < TOLERANCE[torch.float32]


def test_saturated_logits_stay_finite(make_paged, dense, device):
    # Scores of several thousand: an online softmax that forgets to subtract the maximum overflows.
    paged, case, args = _case(make_paged, device, [100], 4, 4, 2, 64, 16, torch.float32, HND, 0)
    out = paged_draft_attention(*args, scale=300.0, out=torch.full_like(case[0], float("nan")))
    assert relative_error(out, _dense(dense, case, paged, 0, 300.0)) < 1e-3


def test_shapes_that_do_not_fit_are_refused(make_paged, device):
    _, case, args = _case(make_paged, device, [20], 4, 4, 2, 64, 16, torch.float32, HND, 0)
    with pytest.raises(ValueError, match="multiple of Hkv"):
        paged_draft_attention(case[0][:, :, :3], *args[1:], scale=1.0, out=torch.empty_like(case[0][:, :, :3]))
    with pytest.raises(ValueError, match="contiguous head dimension"):
        strided = case[0].repeat(1, 1, 1, 2)[..., ::2]
        paged_draft_attention(strided, *args[1:], scale=1.0, out=torch.empty_like(case[0]))
