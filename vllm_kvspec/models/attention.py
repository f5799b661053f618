# SPDX-License-Identifier: Apache-2.0
"""How a layer of the head attends: to a context of keys and values, and to the rows of its own block.

The context is the target's KV as it lies in the cache (``fusion: "direct"``), or one of KVShot's other ways to use it
(arXiv 2604.26412, section 3), kept for comparison.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from vllm_kvspec.config import KVSpecDraftConfig
from vllm_kvspec.models.rotary import Rotary, rotate

KV = tuple[torch.Tensor, torch.Tensor]


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""


class KVSpecAttention(nn.Module):
    """Attention of rows over a context and over the rows themselves."""

    def __init__(self, config: KVSpecDraftConfig, input_size: int | None = None):
        super().__init__()
        self.head_dim = config.head_dim
        self.interleaved = config.rope_interleaved
        # Side by side on the head axis, every source layer has query, key and value heads of its own.
        sources = len(config.target_kv_layer_ids) if config.fusion == "concat" else 1
        q_size = sources * config.num_attention_heads * config.head_dim
        kv_size = sources * config.num_key_value_heads * config.head_dim
        input_size = input_size or config.hidden_size
        self.q_proj = nn.Linear(input_size, q_size, bias=False)
        self.k_proj = nn.Linear(input_size, kv_size, bias=False)
        self.v_proj = nn.Linear(input_size, kv_size, bias=False)
        silent_start = config.context != "hidden" and config.fusion == "direct"
        self.o_proj = (ZeroLinear if silent_start else nn.Linear)(q_size, config.hidden_size, bias=False)
        if config.fusion in ("projection", "projection_rope"):
            self.redo_rope = config.fusion == "projection_rope"
            self.k_fuse = nn.Linear(len(config.target_kv_layer_ids) * kv_size, kv_size, bias=False)
            self.v_fuse = nn.Linear(len(config.target_kv_layer_ids) * kv_size, kv_size, bias=False)
        if config.qk_norm:
            self.q_norm = Qwen3RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = Qwen3RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def project_context(self, target_kv: list[KV], rotary: Rotary) -> KV:
        """KVShot's linear projection: keys and values of several target layers, each [B, Hkv, S, D], mixed into one.

        The target's keys are rotated. With ``projection_rope`` they are turned back before the mix and again after it,
        so that a key's phase says its position.
        """
        keys, values = ([kv[part] for kv in target_kv] for part in (0, 1))
        if self.redo_rope:
            back = rotary and (rotary[0], -rotary[1])
            keys = [rotate(k, back, self.interleaved) for k in keys]
        key, value = (
            fuse(torch.cat([x.transpose(1, 2).flatten(2) for x in parts], dim=-1).to(fuse.weight.dtype))
            .unflatten(-1, (-1, self.head_dim))
            .transpose(1, 2)
            for fuse, parts in ((self.k_fuse, keys), (self.v_fuse, values))
        )
        return (rotate(key, rotary, self.interleaved) if self.redo_rope else key), value

    def keys_values(self, hidden: torch.Tensor, rotary: Rotary) -> KV:
        """The rows' own keys and values [B, Hkv, R, D] from normed ``hidden`` [B, R, H]."""
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        k = self.k_norm(self.k_proj(hidden).view(shape)).transpose(1, 2)
        v = self.v_proj(hidden).view(shape).transpose(1, 2)
        return rotate(k, rotary, self.interleaved), v

    def forward(self, hidden: torch.Tensor, rotary: Rotary, context: list[KV], mask: torch.Tensor):
        """``hidden`` [B, R, H] -> ([B, R, H], the rows' own keys and values).

        ``rotary``: cos and sin [B, R, D], or None. ``context``: keys and values [B, Hkv, *, D], one after the other
        before the rows' own. ``mask`` [B or 1, 1, R, all keys] bool.
        """
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        q = self.q_norm(self.q_proj(hidden).view(shape)).transpose(1, 2)
        q = rotate(q, rotary, self.interleaved)
        own = self.keys_values(hidden, rotary)
        k, v = (torch.cat([kv[part].to(q.dtype) for kv in (*context, own)], dim=2) for part in (0, 1))
        return self.o_proj(self.attend(q, k, v, mask).transpose(1, 2).flatten(2)), own

    def attend(self, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """softmax(q k / sqrt(D)) v; q [B, Hq, R, D], k and v [B, Hkv, K, D] -> [B, Hq, R, D]."""
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)


class GatedAttention(nn.Module):
    """KVShot's gated delta (eq. 6 to 9): an EAGLE-3 layer's attention, corrected by cross-attention to the target's KV.

    n = SelfAttn(x), o = CrossAttn(x, target KV), D = o - n, g = sigmoid(W_g [n; o; D] + b_g), out = n + g * (W_D D).
    """

    def __init__(self, config: KVSpecDraftConfig):
        super().__init__()
        self.own_attn, self.cross_attn = KVSpecAttention(config), KVSpecAttention(config)
        self.fusion_gate = nn.Linear(3 * config.hidden_size, config.hidden_size)
        self.delta_proj = nn.Linear(config.hidden_size, config.hidden_size, bias=False)

    def keys_values(self, hidden: torch.Tensor, rotary: Rotary) -> KV:
        return self.own_attn.keys_values(hidden, rotary)

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: Rotary,
        context: list[tuple[KV, KV]],
        mask: tuple[torch.Tensor, torch.Tensor],
    ):
        """As ``KVSpecAttention.forward``; ``context`` and ``mask`` are pairs (own, target's)."""
        own, own_kv = self.own_attn(hidden, rotary, [pair[0] for pair in context], mask[0])
        cross, cross_kv = self.cross_attn(hidden, rotary, [pair[1] for pair in context], mask[1])
        delta = cross - own
        gate = torch.sigmoid(self.fusion_gate(torch.cat((own, cross, delta), dim=-1)))
        return own + gate * self.delta_proj(delta), (own_kv, cross_kv)
