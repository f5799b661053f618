# SPDX-License-Identifier: Apache-2.0
"""Attention backends for CUDA: vLLM's FlashAttention or Triton backend, with tree rows through our kernel.

Cache layout and cache update are inherited. vLLM sorts a batch so that requests with drafts lead: their rows run the
tree kernel and all others the stock one, as do batches without drafts and engines that only propose chains. A CUDA
graph of a uniform decode batch, n+1 rows a request, always holds the tree kernel: whether a row is on a tree is data
(``batch_len``). Batches of mixed lengths run piecewise or eagerly.
"""

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionCGSupport, CommonAttentionMetadata
from vllm.v1.attention.backends.flash_attn import (
    FlashAttentionBackend,
    FlashAttentionImpl,
    FlashAttentionMetadataBuilder,
)
from vllm.v1.attention.backends.triton_attn import (
    TritonAttentionBackend,
    TritonAttentionImpl,
    TritonAttentionMetadataBuilder,
)

from vllm_kvspec.engine.target_kv import split_kv
from vllm_kvspec.engine.verify.attention import HasTreeState, attend, refuse_attention_features
from vllm_kvspec.engine.verify.tree_state import TreeState


@dataclass
class TreeMetadata:
    """A batch's leading requests, whose rows run the tree kernel, and the stock metadata of the others, if any."""

    tree_state: TreeState
    num_actual_tokens: int
    max_query_len: int
    query_start_loc: torch.Tensor
    seq_lens: torch.Tensor
    block_table: torch.Tensor
    rest: Any = None


def without_leading(common: CommonAttentionMetadata, num_reqs: int) -> CommonAttentionMetadata:
    """The batch without its first ``num_reqs`` requests; rows count from 0 again. No device sync."""
    num_tokens = int(common.query_start_loc_cpu[num_reqs])
    by_request = ("block_table_tensor", "seq_lens_cpu_upper_bound", "is_prefilling", "req_idx")
    by_token = ("slot_mapping", "positions")
    cut = {name: value[num_reqs:] for name in by_request if (value := getattr(common, name)) is not None}
    cut |= {name: value[num_tokens:] for name in by_token if (value := getattr(common, name)) is not None}
    return common.replace(
        query_start_loc=common.query_start_loc[num_reqs:] - num_tokens,
        query_start_loc_cpu=common.query_start_loc_cpu[num_reqs:] - num_tokens,
        # A copy, for its alignment: kernels are compiled for aligned lengths.
        seq_lens=common.seq_lens[num_reqs:].clone(),
        num_reqs=common.num_reqs - num_reqs,
        num_actual_tokens=common.num_actual_tokens - num_tokens,
        _num_computed_tokens_cache=None,
        _token_to_req_indices_cache=None,
        **cut,
    )


class TreeMetadataBuilder(HasTreeState):
    """Over a stock metadata builder."""

    # A graph of mixed lengths would be captured without drafts, hence with the stock kernel, and replayed with them.
    _cudagraph_support: ClassVar[AttentionCGSupport] = AttentionCGSupport.UNIFORM_BATCH

    def build(self, common_prefix_len: int, common_attn_metadata: CommonAttentionMetadata, fast_build: bool = False):
        """``TreeMetadata`` if any row may be on a tree, else stock metadata."""
        common, state = common_attn_metadata, self.tree_state
        rows, length = state.num_nodes + 1, common.max_query_len
        # Also shorter ones: vLLM can schedule a prefix of the nodes, and captures graphs for it.
        uniform = 1 < length <= rows and common.num_actual_tokens == length * common.num_reqs
        num_reqs = 0 if state.only_chains else common.num_reqs if uniform else state.num_draft_reqs
        if num_reqs == 0:
            return super().build(common_prefix_len, common, fast_build)
        rest = None
        if num_reqs < common.num_reqs:
            rest = super().build(0, without_leading(common, num_reqs), fast_build)
        starts = common.query_start_loc_cpu[: num_reqs + 1].numpy()
        return TreeMetadata(
            tree_state=state,
            num_actual_tokens=int(starts[-1]),
            max_query_len=int(np.diff(starts).max()),
            query_start_loc=common.query_start_loc[: num_reqs + 1],
            seq_lens=common.seq_lens[:num_reqs],
            block_table=common.block_table_tensor[:num_reqs],
            rest=rest,
        )


class TreeAttention:
    """Over a stock attention implementation."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        refuse_attention_features(self.alibi_slopes, self.attn_type)

    def fused_output_quant_supported(self, quant_key) -> bool:
        """The tree kernel writes unquantised output."""
        return False

    def forward(
        self,
        layer: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor | None,
        value: torch.Tensor | None,
        kv_cache: torch.Tensor,
        attn_metadata: Any,
        output: torch.Tensor,
        output_scale: torch.Tensor | None = None,
        output_block_scale: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """query [num_tokens, num_heads, head_dim] -> output of the same shape, in place."""
        if not isinstance(attn_metadata, TreeMetadata):
            return super().forward(
                layer, query, key, value, kv_cache, attn_metadata, output, output_scale, output_block_scale
            )
        quantized = self.kv_cache_dtype.startswith("fp8")
        k_cache, v_cache = split_kv(kv_cache, self.head_size, current_platform.fp8_dtype() if quantized else None)
        # The layer quantises queries where it quantises the cache.
        scales = (layer._q_scale, layer._k_scale, layer._v_scale) if quantized else ()
        # self.sliding_window is (left, right) with left = W - 1, or (-1, -1) for full attention.
        attend(self, query, k_cache, v_cache, attn_metadata, self.sliding_window[0] + 1, output, *scales)
        if attn_metadata.rest is not None:
            rest = slice(attn_metadata.num_actual_tokens, None)
            # From 0.33 on there are none where a fused op has written the cache (supports_kv_cache_update_bypass).
            key, value = (None if rows is None else rows[rest] for rows in (key, value))
            super().forward(layer, query[rest], key, value, kv_cache, attn_metadata.rest, output[rest])
        return output


class TreeBackend:
    """Over a stock backend."""

    impl_cls: ClassVar[type]
    builder_cls: ClassVar[type]

    @staticmethod
    def get_name() -> str:
        # The enum member that vLLM keeps for plugins.
        return "CUSTOM"

    @classmethod
    def get_impl_cls(cls) -> type:
        return cls.impl_cls

    @classmethod
    def get_builder_cls(cls) -> type:
        return cls.builder_cls

    @classmethod
    def supports_per_head_quant_scales(cls) -> bool:
        """The tree kernel and the head read one scale for a layer."""
        return False

    @classmethod
    def supports_batch_invariance(cls) -> bool:
        """The tree kernel's tiles and splits depend on the batch."""
        return False


class TritonTreeMetadataBuilder(TreeMetadataBuilder, TritonAttentionMetadataBuilder):
    pass


class TritonTreeAttention(TreeAttention, TritonAttentionImpl):
    pass


class TritonTreeBackend(TreeBackend, TritonAttentionBackend):
    impl_cls = TritonTreeAttention
    builder_cls = TritonTreeMetadataBuilder


class FlashTreeMetadataBuilder(TreeMetadataBuilder, FlashAttentionMetadataBuilder):
    pass


class FlashTreeAttention(TreeAttention, FlashAttentionImpl):
    pass


class FlashTreeBackend(TreeBackend, FlashAttentionBackend):
    impl_cls = FlashTreeAttention
    builder_cls = FlashTreeMetadataBuilder
