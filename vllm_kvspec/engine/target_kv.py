# SPDX-License-Identifier: Apache-2.0
"""The target's paged KV cache as the head and the compaction see it: views, never copies.

vLLM 0.32 gives every attention layer one tensor, logically [num_blocks, num_kv_heads, block_size, 2 * head_dim] with
K then V in the last dimension, under whatever strides its layout has.
"""

from dataclasses import dataclass

import torch
from vllm.platforms import current_platform
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, SlidingWindowSpec, iter_layer_specs

from vllm_kvspec.kernels.reference import kv_base_ptrs

EMPTY_BLOCK_SIZE = 16


def split_kv(kv_cache: torch.Tensor, head_dim: int, cache_dtype: torch.dtype | None = None):
    """(K, V) views [num_blocks, block_size, num_kv_heads, head_dim] of a layer's cache."""
    if cache_dtype is not None and kv_cache.dtype != cache_dtype:
        kv_cache = kv_cache.view(cache_dtype)
    return kv_cache.transpose(1, 2).split(head_dim, dim=-1)


@dataclass
class PagedLayer:
    """One target attention layer: K and V views, per-tensor scales, and the KV cache group its block table is in."""

    k_cache: torch.Tensor
    v_cache: torch.Tensor
    k_scale: torch.Tensor
    v_scale: torch.Tensor
    group: int
    sliding_window: int


def empty_layer(num_kv_heads: int, head_dim: int, dtype: torch.dtype, device: torch.device) -> PagedLayer:
    """A layer with one block of no content, for passes before KV caches exist, which read no context."""
    cache = torch.zeros(1, EMPTY_BLOCK_SIZE, num_kv_heads, head_dim, dtype=dtype, device=device)
    one = torch.ones(1, device=device)
    return PagedLayer(cache, cache, one, one, group=0, sliding_window=0)


@dataclass
class CacheClass:
    """Layers of one group whose caches share shape, strides and dtype: one compaction launch."""

    group: int
    kv_caches: list[torch.Tensor]
    base_ptrs: torch.Tensor


def check_groups(kv_cache_config: KVCacheConfig) -> None:
    """Raise ValueError unless every layer caches plain K and V for full or sliding-window attention."""
    for group in kv_cache_config.kv_cache_groups:
        # Several where layers with one block table differ in size, as with --kv-cache-dtype-skip-layers.
        for spec in iter_layer_specs(group.kv_cache_spec):
            # Their subclasses (latent attention, sinks) cache something else.
            if type(spec) not in (FullAttentionSpec, SlidingWindowSpec):
                raise ValueError(
                    "kvspec needs every target layer to cache plain K and V for full or sliding-window attention; "
                    f"found {type(spec).__name__} in {group.layer_names[0]}'s group. Serve this model without kvspec."
                )


def layers_by_index(kv_cache_config: KVCacheConfig) -> dict[int, tuple[str, int]]:
    """Target layer number -> (attention layer name, KV cache group)."""
    from vllm.model_executor.models.utils import extract_layer_index

    return {
        extract_layer_index(name): (name, number)
        for number, group in enumerate(kv_cache_config.kv_cache_groups)
        for name in group.layer_names
    }


def paged_layer(name: str, group: int, static_forward_context: dict) -> PagedLayer:
    """Views of the attention layer ``name``. Its cache must be bound already."""
    layer = static_forward_context[name]
    cache_dtype = current_platform.fp8_dtype() if layer.impl.kv_cache_dtype.startswith("fp8") else None
    k_cache, v_cache = split_kv(layer.kv_cache, layer.head_size, cache_dtype)
    window = layer.sliding_window or 0
    return PagedLayer(k_cache, v_cache, layer._k_scale, layer._v_scale, group, window)


def cache_classes(kv_cache_config: KVCacheConfig, static_forward_context: dict) -> list[CacheClass]:
    """All target caches by (group, shape, strides, dtype).

    Layers of several groups may have one memory, of which each group owns other blocks. A cache that several layers of
    a group read is listed once: moving its rows twice would move other rows.
    """
    classes: dict[tuple, list[torch.Tensor]] = {}
    for number, group in enumerate(kv_cache_config.kv_cache_groups):
        for name in group.layer_names:
            layer = static_forward_context[name]
            if layer.kv_sharing_target_layer_name is not None:
                continue
            cache = layer.kv_cache
            key = (number, tuple(cache.shape), cache.stride(), cache.dtype)
            classes.setdefault(key, []).append(cache)
    return [CacheClass(key[0], caches, kv_base_ptrs(caches)) for key, caches in classes.items()]
