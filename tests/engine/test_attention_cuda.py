# SPDX-License-Identifier: Apache-2.0
"""The CUDA attention backend, as far as it goes without a GPU: which kernel a batch gets, and with which arguments.

Tensors are on the CPU, so the op is its torch twin; the class, its metadata and its call are the ones a GPU runs.
"""

from types import SimpleNamespace

import pytest
import torch

# isort: off
import vllm.v1.worker.cpu.shm  # noqa: F401
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.triton_attn import TritonAttentionImpl, TritonAttentionMetadata
from vllm.v1.attention.backends.triton_attn import TritonAttentionMetadataBuilder

# isort: on
from vllm_kvspec.engine.attention import TreeAttentionBackend, TreeAttentionImpl, TreeAttentionMetadataBuilder
from vllm_kvspec.engine.tree_state import TreeState
from vllm_kvspec.kernels import reference

HEADS, KV_HEADS, DIM, BLOCK, NODES = 4, 2, 64, 16, 3


@pytest.fixture
def state() -> TreeState:
    state = TreeState(max_num_reqs=2, num_nodes=NODES, device=torch.device("cpu"))
    state.batch_len[0] = NODES + 1
    # Root with children 1 and 2; node 3 under node 2.
    state.batch_mask[0] = torch.tensor([0b1, 0b11, 0b101, 0b1101])
    return state


@pytest.fixture
def build(state, monkeypatch):
    """Metadata of one request with ``query_len`` rows behind 21 tokens of context, through our builder."""

    def make(query_len: int):
        empty = torch.empty(0)
        stock = TritonAttentionMetadata(
            num_actual_tokens=query_len,
            max_query_len=query_len,
            query_start_loc=torch.tensor([0, query_len], dtype=torch.int32),
            max_seq_len=64,
            seq_lens=torch.tensor([21 + query_len], dtype=torch.int32),
            block_table=torch.tensor([[3, 1, 2, 0]], dtype=torch.int32),
            slot_mapping=torch.zeros(query_len, dtype=torch.int64),
            seq_threshold_3D=1,
            num_par_softmax_segments=16,
            softmax_segm_output=empty,
            softmax_segm_max=empty,
            softmax_segm_expsum=empty,
            causal=True,
        )
        monkeypatch.setattr(TritonAttentionMetadataBuilder, "build", lambda *args: stock)
        builder = object.__new__(TreeAttentionMetadataBuilder)
        builder.tree_state = state
        return builder.build(0, None)

    return make


def impl(sliding_window: int | None = None) -> TreeAttentionImpl:
    return TreeAttentionImpl(HEADS, DIM, DIM**-0.5, KV_HEADS, None, sliding_window, "auto")


def test_only_uniform_graphs():
    """A full graph of mixed lengths would hold whichever kernel it was captured with."""
    assert TreeAttentionMetadataBuilder.get_cudagraph_support(None, None) is AttentionCGSupport.UNIFORM_BATCH


def test_names():
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    assert AttentionBackendEnum[TreeAttentionBackend.get_name()] is AttentionBackendEnum.CUSTOM
    assert TreeAttentionBackend.get_impl_cls() is TreeAttentionImpl
    assert TreeAttentionBackend.get_builder_cls() is TreeAttentionMetadataBuilder


@pytest.mark.parametrize("window", [None, 7])
def test_tree_rows(build, state, window):
    torch.manual_seed(0)
    rows = NODES + 1
    metadata = build(rows)
    query = torch.randn(rows, HEADS, DIM)
    kv_cache = torch.randn(4, KV_HEADS, BLOCK, 2 * DIM)
    layer = SimpleNamespace(_k_scale=torch.ones(1), _v_scale=torch.ones(1))
    found = impl(window).forward(layer, query, None, None, kv_cache, metadata, torch.empty(rows, HEADS, DIM))
    k, v = kv_cache.transpose(1, 2).split(DIM, dim=-1)
    expected = reference.tree_attention(
        query,
        k,
        v,
        metadata.block_table,
        metadata.query_start_loc,
        metadata.seq_lens,
        state.batch_mask,
        state.batch_len,
        scale=DIM**-0.5,
        max_query_len=rows,
        sliding_window=window or 0,
        out=torch.empty_like(query),
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("query_len", "has_drafts", "only_chains", "tree_kernel"),
    [
        pytest.param(NODES + 1, False, False, True, id="uniform-decode-graph"),
        pytest.param(NODES, False, False, True, id="shorter-decode-graph"),
        pytest.param(1, False, False, False, id="plain-decode"),
        pytest.param(9, True, False, True, id="mixed-with-drafts"),
        pytest.param(9, False, False, False, id="prompt-only"),
        pytest.param(NODES + 1, True, True, False, id="chains-only"),
    ],
)
def test_which_kernel(build, state, monkeypatch, query_len, has_drafts, only_chains, tree_kernel):
    state.has_drafts, state.only_chains = has_drafts, only_chains
    calls = []
    monkeypatch.setattr(TritonAttentionImpl, "forward", lambda *args: calls.append("stock"))
    monkeypatch.setattr("vllm_kvspec.engine.attention_shared.ops.tree_attention", lambda *a, **k: calls.append("tree"))
    query = torch.zeros(query_len, HEADS, DIM)
    layer = SimpleNamespace(_k_scale=torch.ones(1), _v_scale=torch.ones(1))
    impl().forward(layer, query, None, None, torch.zeros(4, KV_HEADS, BLOCK, 2 * DIM), build(query_len), query.clone())
    assert calls == ["tree" if tree_kernel else "stock"]


@pytest.mark.parametrize(
    ("argument", "sentence"), [({"sinks": torch.zeros(HEADS)}, "sinks"), ({"logits_soft_cap": 30.0}, "soft-capping")]
)
def test_refused_features(argument, sentence):
    with pytest.raises(ValueError, match=sentence):
        TreeAttentionImpl(HEADS, DIM, DIM**-0.5, KV_HEADS, None, None, "auto", **argument)
