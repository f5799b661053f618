# SPDX-License-Identifier: Apache-2.0
"""Rotary positions of a head's layers: each as the target rotates the keys that the layer reads."""

import copy
from typing import Any

import torch
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from vllm_kvspec.config import KVSpecDraftConfig

# Cosines and sines [B, R, rotated part of a head]; None for no rotation.
Rotary = tuple[torch.Tensor, torch.Tensor] | None


class RotaryEmbedding(Qwen3RotaryEmbedding):
    """Cosines and sines for one set of RoPE parameters."""

    def __init__(self, config: KVSpecDraftConfig, rope_parameters: dict[str, Any]):
        config = copy.copy(config)
        config.rope_parameters = rope_parameters
        super().__init__(config)

    @staticmethod
    def compute_default_rope_parameters(config: KVSpecDraftConfig, device=None, **kwargs) -> tuple[torch.Tensor, float]:
        """Qwen3's, of a part of a head where the target rotates only that.

        transformers 5.17 passes ``device`` by position, 5.19 not at all.
        """
        rope = config.rope_parameters
        size = int(config.head_dim * rope.get("partial_rotary_factor", 1.0))
        return 1.0 / (rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float) / size)), 1.0


class LayerRotary(nn.Module):
    """Cosines and sines for every layer of a head; layers with the same parameters share them."""

    def __init__(self, config: KVSpecDraftConfig):
        super().__init__()
        ropes = [config.layer_rope(i) for i in range(config.num_hidden_layers)]
        distinct = [rope for i, rope in enumerate(ropes) if rope is not None and rope not in ropes[:i]]
        self.embeddings = nn.ModuleList(RotaryEmbedding(config, rope) for rope in distinct)
        self.index = [None if rope is None else distinct.index(rope) for rope in ropes]

    def forward(self, hidden: torch.Tensor, positions: torch.Tensor) -> list[Rotary]:
        """One entry per layer, in the dtype of ``hidden``; ``positions`` int64 [B, R]."""
        found = [embedding(hidden, positions) for embedding in self.embeddings]
        return [None if i is None else found[i] for i in self.index]


def rotate(x: torch.Tensor, rotary: Rotary, interleaved: bool = False) -> torch.Tensor:
    """``x`` [B, heads, R, D] turned by ``rotary``; what lies beyond the rotated part of a head stays as it is.

    The pairs are (i, i + half of the rotated part), or with ``interleaved`` (2i, 2i + 1).
    """
    if rotary is None:
        return x
    # Both halves of a row hold the same angles.
    cos, sin = (part.chunk(2, dim=-1)[0].unsqueeze(1) for part in rotary)
    size = 2 * cos.shape[-1]
    turned, rest = x[..., :size], x[..., size:]
    a, b = (turned[..., ::2], turned[..., 1::2]) if interleaved else turned.chunk(2, dim=-1)
    pair = (a * cos - b * sin, b * cos + a * sin)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned, rest), dim=-1)
