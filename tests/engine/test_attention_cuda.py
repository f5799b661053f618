# SPDX-License-Identifier: Apache-2.0
"""The CUDA attention backends, as far as they go without a GPU: which kernel a row gets, and with which arguments.

Tensors are on the CPU, so the tree op is its torch twin, and so is what stands for the stock kernels; the classes,
their metadata and their calls are the ones a GPU runs.
"""

from types import SimpleNamespace

import pytest
import torch
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata

from vllm_kvspec.engine.verify.attention_cuda import (
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
    FlashTreeBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
    TritonTreeBackend,
)
from vllm_kvspec.engine.verify.tree_state import TreeState
from vllm_kvspec.kernels import reference

pytestmark = pytest.mark.cpu

HEADS, KV_HEADS, DIM, BLOCK, NODES, CONTEXT = 4, 2, 64, 16, 3, 21
STOCK = {
    TritonTreeBackend: (TritonAttentionImpl, TritonAttentionMetadataBuilder),
    FlashTreeBackend: (FlashAttentionImpl, FlashAttentionMetadataBuilder),
}
NO_TREE = (torch.zeros(8, NODES + 1, dtype=torch.int64), torch.zeros(8, dtype=torch.int32))


SOFT_CAP, SINKS = {"logits_soft_cap": 0.5}, {"sinks": torch.tensor([-1.0, 0.0, 1.0, 2.0])}


def attention(query, kv_cache, common: CommonAttentionMetadata, masks, window, soft_cap, sinks) -> torch.Tensor:
    k, v = kv_cache.transpose(1, 2).split(DIM, dim=-1)
    return reference.tree_attention(
        query, k, v, common.block_table_tensor, common.query_start_loc, common.seq_lens, *masks,
        scale=DIM**-0.5, max_query_len=common.max_query_len, sliding_window=window, soft_cap=soft_cap, sinks=sinks,
        out=torch.empty(query.shape),
    )  # fmt: skip


@pytest.fixture
def state() -> TreeState:
    state = TreeState(max_num_reqs=4, num_nodes=NODES, device=torch.device("cpu"))
    return state


@pytest.fixture(params=STOCK, ids=lambda backend: backend.__name__)
def backend(request, monkeypatch) -> SimpleNamespace:
    """A backend whose stock kernel is causal attention in torch, on metadata that is the batch as it was given."""
    impl, builder = STOCK[request.param]
    seen = SimpleNamespace(cls=request.param, stock_rows=0)

    def forward(self, layer, query, key, value, kv_cache, metadata, output, *_):
        assert len(query) == len(output) == metadata.num_actual_tokens
        assert all(rows is None or len(rows) == len(query) for rows in (key, value))
        assert len(metadata.slot_mapping) == metadata.num_actual_tokens
        seen.stock_rows += len(query)
        features = self.sliding_window[0] + 1, self.logits_soft_cap, self.sinks
        return output.copy_(attention(query, kv_cache, metadata, NO_TREE, *features))

    monkeypatch.setattr("vllm.v1.attention.backends.flash_attn.flash_attn_supports_sinks", lambda: True, raising=False)
    monkeypatch.setattr(impl, "forward", forward)
    monkeypatch.setattr(builder, "build", lambda self, prefix, common, fast_build=False: common)
    return seen


def batch(query_lens: list[int]) -> CommonAttentionMetadata:
    starts = torch.tensor([0, *query_lens]).cumsum(0).int()
    num_reqs, num_tokens = len(query_lens), sum(query_lens)
    return CommonAttentionMetadata(
        query_start_loc=starts,
        query_start_loc_cpu=starts.clone(),
        seq_lens=torch.tensor(query_lens, dtype=torch.int32) + CONTEXT,
        seq_lens_cpu_upper_bound=torch.tensor(query_lens, dtype=torch.int32) + CONTEXT,
        num_reqs=num_reqs,
        num_actual_tokens=num_tokens,
        max_query_len=max(query_lens),
        max_seq_len=64,
        block_table_tensor=torch.randperm(num_reqs * 4).view(num_reqs, 4).int(),
        slot_mapping=torch.arange(num_tokens),
        positions=torch.arange(num_tokens),
        is_prefilling=torch.zeros(num_reqs, dtype=torch.bool),
    )


def run_layer(
    backend,
    state,
    query_lens: list[int],
    trees: list[int] = (),
    window: int | None = None,
    cache_is_written=False,
    features: dict | None = None,
) -> None:
    """One layer over a batch gives what the twin gives; ``trees`` is the batch's requests that are on a tree.

    ``features``: the layer's soft-cap and sinks, as vLLM's layer gives them.
    """
    features = features or {}
    torch.manual_seed(0)
    for b in trees:
        state.batch_len[b] = min(query_lens[b], NODES + 1)
        # Root with children 1 and 2; node 3 under node 2.
        state.batch_mask[b] = torch.tensor([0b1, 0b11, 0b101, 0b1101])
    common = batch(query_lens)
    builder = object.__new__(backend.cls.get_builder_cls())
    builder.tree_state = state
    impl = backend.cls.get_impl_cls()(HEADS, DIM, DIM**-0.5, KV_HEADS, None, window, "auto", **features)
    rows = common.num_actual_tokens
    query = torch.randn(rows, HEADS, DIM)
    key = None if cache_is_written else torch.randn(rows, KV_HEADS, DIM)
    kv_cache = torch.randn(4 * len(query_lens), KV_HEADS, BLOCK, 2 * DIM)
    layer = SimpleNamespace(_q_scale=torch.ones(1), _k_scale=torch.ones(1), _v_scale=torch.ones(1))
    out = torch.full_like(query, float("nan"))
    found = impl.forward(layer, query, key, key, kv_cache, builder.build(0, common), out)
    options = features.get("logits_soft_cap", 0.0), features.get("sinks")
    expected = attention(query, kv_cache, common, (state.batch_mask, state.batch_len), window or 0, *options)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("cls", STOCK)
def test_names_and_graphs(cls):
    """A full graph of mixed lengths would hold whichever kernel it was captured with."""
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    assert AttentionBackendEnum[cls.get_name()] is AttentionBackendEnum.CUSTOM
    assert not cls.supports_per_head_quant_scales() and not cls.supports_batch_invariance()
    assert cls.get_builder_cls().get_cudagraph_support(None, None) is AttentionCGSupport.UNIFORM_BATCH


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize(
    ("query_lens", "trees", "stock_rows"),
    [
        pytest.param([4, 4], [0, 1], 0, id="uniform"),
        pytest.param([4, 4], [], 0, id="uniform-graph-without-drafts"),
        pytest.param([3, 3], [0, 1], 0, id="shorter-uniform"),
        pytest.param([4, 3, 1, 30], [0, 1], 31, id="trees-decode-prompt"),
        pytest.param([9, 4, 17], [0], 21, id="tree-behind-a-prompt's-end"),
        pytest.param([4, 2, 4], [0, 2], 0, id="request-without-drafts-between"),
        pytest.param([1, 1], [], 2, id="plain-decode"),
        pytest.param([9, 30], [], 39, id="prompts"),
    ],
)
def test_rows(backend, state, query_lens, trees, stock_rows, window):
    state.num_draft_reqs = max(trees, default=-1) + 1
    run_layer(backend, state, query_lens, trees, window)
    assert backend.stock_rows == stock_rows


@pytest.mark.parametrize("features", [SOFT_CAP, SINKS, SOFT_CAP | SINKS], ids=" ".join)
@pytest.mark.parametrize("window", [None, 7])
def test_soft_cap_and_sinks(backend, state, window, features):
    state.num_draft_reqs = 2
    run_layer(backend, state, [4, 3, 1, 30], [0, 1], window, features=features)
    assert backend.stock_rows == 31


def test_no_keys_where_a_fused_op_has_written_the_cache(backend, state):
    """``supports_kv_cache_update_bypass`` (from 0.33 on), which our backends inherit."""
    state.num_draft_reqs = 1
    run_layer(backend, state, [4, 9], [0], cache_is_written=True)
    assert backend.stock_rows == 9


def test_chains_run_the_stock_kernel(backend, state):
    state.only_chains, state.num_draft_reqs = True, 1
    run_layer(backend, state, [NODES + 1])
    assert backend.stock_rows == NODES + 1


def test_quantized_query(backend, state, monkeypatch):
    """fp8 cache: views of its bytes, and the layer's three scales."""
    found = {}
    monkeypatch.setattr(
        "vllm_kvspec.engine.verify.attention.ops.tree_attention",
        lambda q, k, v, *a, **keys: found.update(keys, q=q, k=k, v=v),
    )
    monkeypatch.setattr(
        "vllm_kvspec.engine.verify.attention_cuda.current_platform.fp8_dtype", lambda: torch.float8_e4m3fn
    )
    builder = object.__new__(backend.cls.get_builder_cls())
    builder.tree_state = state
    impl = backend.cls.get_impl_cls()(HEADS, DIM, DIM**-0.5, KV_HEADS, None, None, "auto")
    impl.kv_cache_dtype = "fp8"
    layer = SimpleNamespace(_q_scale="q", _k_scale="k", _v_scale="v")
    query = torch.zeros(NODES + 1, HEADS, DIM).to(torch.float8_e4m3fn)
    cache = torch.zeros(4, KV_HEADS, BLOCK, 2 * DIM, dtype=torch.uint8)
    impl.forward(layer, query, query, query, cache, builder.build(0, batch([NODES + 1])), torch.zeros(query.shape))
    assert (found["q_scale"], found["k_scale"], found["v_scale"]) == ("q", "k", "v")
    assert {found[name].dtype for name in "qkv"} == {torch.float8_e4m3fn}
    assert not impl.fused_output_quant_supported(None)


@pytest.mark.parametrize("cls", STOCK)
def test_refused_features(cls):
    with pytest.raises(ValueError, match="ALiBi"):
        cls.get_impl_cls()(HEADS, DIM, DIM**-0.5, KV_HEADS, [0.5] * HEADS, None, "auto")
