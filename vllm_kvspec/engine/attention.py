# SPDX-License-Identifier: Apache-2.0
"""Attention backend for CUDA: vLLM's Triton backend, with tree rows through our kernel.

Cache layout and cache update are inherited. Batches without drafts, and engines that only propose chains, run the stock
kernel. A CUDA graph of a uniform decode batch, n+1 rows a request, always holds the tree kernel: whether a row is on a
tree is data (``batch_len``). Batches of mixed lengths run piecewise or eagerly.
"""

from dataclasses import dataclass, fields
from typing import ClassVar

import torch
from vllm.v1.attention.backend import AttentionCGSupport
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadata,
    TritonAttentionMetadataBuilder,
)

from vllm_kvspec.engine.attention_shared import attend, refuse_attention_features
from vllm_kvspec.engine.target_kv import split_kv
from vllm_kvspec.engine.tree_state import TreeState


@dataclass
class TreeAttentionMetadata(TritonAttentionMetadata):
    # None: no row of this batch is on a tree.
    tree_state: TreeState | None = None


class TreeAttentionMetadataBuilder(TritonAttentionMetadataBuilder):
    # A graph of mixed lengths would be captured without drafts, hence with the stock kernel, and replayed with them.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH
    # Set by the runner once the KV caches exist.
    tree_state: TreeState

    def build(self, common_prefix_len: int, common_attn_metadata, fast_build: bool = False) -> TreeAttentionMetadata:
        stock = super().build(common_prefix_len, common_attn_metadata, fast_build)
        rows = self.tree_state.num_nodes + 1
        length = stock.max_query_len
        # Also shorter ones: vLLM can schedule a prefix of the nodes, and captures graphs for it.
        uniform = 1 < length <= rows and stock.num_actual_tokens == length * stock.seq_lens.shape[0]
        metadata = TreeAttentionMetadata(**{f.name: getattr(stock, f.name) for f in fields(stock)})
        branches = not self.tree_state.only_chains and (uniform or self.tree_state.has_drafts)
        metadata.tree_state = self.tree_state if branches else None
        return metadata


class TreeAttentionBackend(TritonAttentionBackend):
    @staticmethod
    def get_name() -> str:
        # The enum member that vLLM keeps for plugins.
        return "CUSTOM"

    @staticmethod
    def get_impl_cls() -> type["TreeAttentionImpl"]:
        return TreeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[TreeAttentionMetadataBuilder]:
        return TreeAttentionMetadataBuilder


class TreeAttentionImpl(TritonAttentionImpl):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        refuse_attention_features(
            self.alibi_slopes, self.logits_soft_cap, self.attn_type, self.kv_sharing_target_layer_name, self.sinks
        )

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: TreeAttentionMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [num_tokens, num_heads, head_dim] -> output of the same shape, in place."""
        if attn_metadata is None or attn_metadata.tree_state is None or output_scale is not None:
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        quantized = self.kv_cache_dtype.startswith("fp8")
        k_cache, v_cache = split_kv(kv_cache, self.head_size, self.fp8_dtype if quantized else None)
        scales = (layer._k_scale, layer._v_scale) if quantized else (1.0, 1.0)
        # self.sliding_window is (left, right) with left = W - 1, or (-1, -1) for full attention.
        attend(self, query, k_cache, v_cache, attn_metadata, self.sliding_window[0] + 1, output, *scales)
        return output
