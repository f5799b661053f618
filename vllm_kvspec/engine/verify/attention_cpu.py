# SPDX-License-Identifier: Apache-2.0
"""Attention backend for the CPU engine: plain paged layout, every row through the tree attention op.

vLLM's own CPU backend packs K per instruction set inside a C++ kernel that takes no mask, so neither the tree nor the
head could read its cache.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from vllm.config import VllmConfig
from vllm.v1.attention.backend import (
    AttentionBackend,
    AttentionImpl,
    AttentionLayer,
    AttentionMetadataBuilder,
    AttentionType,
    CommonAttentionMetadata,
    MultipleOf,
)

from vllm_kvspec.engine.cpu.kernels.attention import store_kv
from vllm_kvspec.engine.target_kv import split_kv
from vllm_kvspec.engine.verify.attention import HasTreeState, attend, refuse_attention_features
from vllm_kvspec.engine.verify.tree_state import TreeState


@dataclass
class CPUTreeMetadata:
    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    slot_mapping: torch.Tensor
    tree_state: TreeState


class CPUTreeMetadataBuilder(HasTreeState, AttentionMetadataBuilder[CPUTreeMetadata]):
    def __init__(self, kv_cache_spec, layer_names: list[str], vllm_config: VllmConfig, device: torch.device):
        super().__init__(kv_cache_spec, layer_names, vllm_config, device)

    def build(
        self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False
    ) -> CPUTreeMetadata:
        common = common_attn_metadata
        return CPUTreeMetadata(
            num_actual_tokens=common.num_actual_tokens,
            max_query_len=common.max_query_len,
            query_start_loc=common.query_start_loc,
            seq_lens=common.seq_lens,
            block_table=common.block_table_tensor,
            slot_mapping=common.slot_mapping,
            tree_state=self.tree_state,
        )


class CPUTreeAttentionBackend(AttentionBackend):
    forward_includes_kv_cache_update: bool = False
    supported_dtypes: ClassVar[list[torch.dtype]] = [torch.float16, torch.bfloat16, torch.float32]
    supported_kv_cache_dtypes: ClassVar[list[str]] = ["auto", "float16", "bfloat16"]

    @staticmethod
    def get_name() -> str:
        # vLLM looks the name up among its enum members; the CPU platform resolves this one.
        return "CPU_ATTN"

    @staticmethod
    def get_supported_kernel_block_sizes(kv_cache_spec=None) -> list[int | MultipleOf]:
        return [MultipleOf(16)]

    @classmethod
    def supports_sliding_window(cls) -> bool:
        return True

    @staticmethod
    def get_impl_cls() -> type["CPUTreeAttentionImpl"]:
        return CPUTreeAttentionImpl

    @staticmethod
    def get_builder_cls() -> type[CPUTreeMetadataBuilder]:
        return CPUTreeMetadataBuilder


class CPUTreeAttentionImpl(AttentionImpl):
    def __init__(
        self,
        num_heads: int,
        head_size: int,
        scale: float,
        num_kv_heads: int | None = None,
        alibi_slopes: list[float] | None = None,
        sliding_window: int | None = None,
        kv_cache_dtype: str = "auto",
        logits_soft_cap: float | None = None,
        attn_type: str = AttentionType.DECODER,
        kv_sharing_target_layer_name: str | None = None,
        sinks: torch.Tensor | None = None,
    ):
        refuse_attention_features(alibi_slopes, attn_type)
        self.num_heads = num_heads
        self.num_kv_heads = num_kv_heads or num_heads
        self.head_size = head_size
        self.scale = float(scale)
        self.sliding_window = sliding_window or 0
        self.kv_cache_dtype = kv_cache_dtype
        self.logits_soft_cap = logits_soft_cap
        self.sinks = sinks
        self._kv_cache: torch.Tensor | None = None

    def _keys_and_values(self, kv_cache: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Views of the layer's cache: made once, the cache stays."""
        if kv_cache is not self._kv_cache:
            self._kv_cache, self._views = kv_cache, split_kv(kv_cache, self.head_size)
        return self._views

    def do_kv_cache_update(
        self,
        layer: AttentionLayer,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        slot_mapping: torch.Tensor,
    ) -> None:
        """Write K and V [num_tokens, num_kv_heads, head_dim] to their slots; negative slots are padding."""
        store_kv(key, value, *self._keys_and_values(kv_cache), slot_mapping)

    def forward(
        self,
        layer: AttentionLayer,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        kv_cache: torch.Tensor,
        attn_metadata: CPUTreeMetadata | None,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [num_tokens, num_heads, head_dim] -> output of the same shape, in place."""
        if attn_metadata is None:
            return output.fill_(0)
        attend(self, query, *self._keys_and_values(kv_cache), attn_metadata, self.sliding_window, output)
        return output
