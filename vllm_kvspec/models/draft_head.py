# SPDX-License-Identifier: Apache-2.0
"""The draft head: a few transformer layers whose attention reads the target's KV cache.

One pass scores a block of G = ``draft_block_size`` positions. Row 0 of the block is the anchor (the last sampled token,
at position ``base``), rows 1.. are learned mask inputs; row d predicts the token at position ``base + 1 + d``. Every
row attends to the target's keys and values of one target layer at positions before ``base`` (as they lie in the cache:
normed and rotated) and to the keys and values of all G rows of its own block. A low-rank transition bias makes the
logits of a position depend on the token before it: ``lm_head(h_d) + W2 W1[previous token]``.

The embedding and the LM head are the target's. They are not part of the checkpoint, whose weights are:

    block_embedding                                       [G, H]; row 0 is added to the anchor's embedding
    context_proj.weight                                   [H, 2H], only with context "hybrid"
    layers.{i}.input_layernorm.weight                     [H]
    layers.{i}.self_attn.{q,k,v,o}_proj.weight            linear without bias
    layers.{i}.self_attn.{q,k}_norm.weight                [head_dim], only with qk_norm
    layers.{i}.post_attention_layernorm.weight            [H]
    layers.{i}.mlp.{gate,up,down}_proj.weight             linear without bias
    norm.weight                                           [H]
    transition_in.weight                                  [V, r] (W1)
    transition_out.weight                                 [V, r] (W2)

With context "hybrid", row 0 is ``context_proj(concat(anchor embedding + block_embedding[0], target hidden state))``,
where the hidden state is the target's after its final norm, at position ``base - 1`` (zeros when ``base`` is 0).
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.qwen3.modeling_qwen3 import (
    Qwen3MLP,
    Qwen3RMSNorm,
    Qwen3RotaryEmbedding,
    apply_rotary_pos_emb,
)

from vllm_kvspec.config import KVSpecDraftConfig, target_fingerprint

# Large beside the usual 0.02: the other factor starts at zero and learns in proportion to this one. On the tiny target,
# 60 steps: KL 1.86 against 1.96 nats at depths 1 to 7.
TRANSITION_IN_STD = 0.3


class ZeroLinear(nn.Linear):
    """A linear layer that starts at zero."""


class KVSpecAttention(nn.Module):
    """Attention of the block's rows over the target's KV and the block's own."""

    def __init__(self, config: KVSpecDraftConfig):
        super().__init__()
        self.head_dim = config.head_dim
        q_size, kv_size = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, q_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_size, bias=False)
        self.o_proj = ZeroLinear(q_size, config.hidden_size, bias=False)
        if config.qk_norm:
            self.q_norm = Qwen3RMSNorm(config.head_dim, eps=config.rms_norm_eps)
            self.k_norm = Qwen3RMSNorm(config.head_dim, eps=config.rms_norm_eps)
        else:
            self.q_norm = self.k_norm = nn.Identity()

    def forward(
        self,
        hidden: torch.Tensor,
        rotary: tuple[torch.Tensor, torch.Tensor],
        context: tuple[torch.Tensor, torch.Tensor],
        mask: torch.Tensor,
    ) -> torch.Tensor:
        """``hidden`` [B, A*G, H] -> [B, A*G, H].

        ``rotary``: cos and sin [B, A*G, D]. ``context``: the target's keys and values [B, Hkv, S, D]. ``mask``
        [B, 1, A*G, S + A*G] bool: which keys (context, then blocks) a row sees.
        """
        shape = (*hidden.shape[:-1], -1, self.head_dim)
        q = self.q_norm(self.q_proj(hidden).view(shape)).transpose(1, 2)
        k = self.k_norm(self.k_proj(hidden).view(shape)).transpose(1, 2)
        v = self.v_proj(hidden).view(shape).transpose(1, 2)
        q, k = apply_rotary_pos_emb(q, k, *rotary)
        k, v = (torch.cat((past.to(own.dtype), own), dim=2) for past, own in zip(context, (k, v), strict=True))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


class KVSpecLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, config: KVSpecDraftConfig):
        super().__init__()
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = KVSpecAttention(config)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Qwen3MLP(config)

    def forward(self, hidden: torch.Tensor, rotary, context, mask: torch.Tensor) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), rotary, context, mask)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class KVSpecDraftModel(PreTrainedModel):
    """The head. See the module docstring for the computation and the weights."""

    config_class = KVSpecDraftConfig
    base_model_prefix = "model"
    _no_split_modules = ["KVSpecLayer"]
    _supports_sdpa = True

    def __init__(self, config: KVSpecDraftConfig):
        super().__init__(config)
        self.block_embedding = nn.Parameter(torch.empty(config.draft_block_size, config.hidden_size))
        if config.context == "hybrid":
            self.context_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        self.layers = nn.ModuleList(KVSpecLayer(config) for _ in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = Qwen3RotaryEmbedding(config)
        self.transition_in = nn.Embedding(config.vocab_size, config.transition_rank)
        self.transition_out = ZeroLinear(config.transition_rank, config.vocab_size, bias=False)
        self.post_init()

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        if isinstance(module, ZeroLinear):
            init.zeros_(module.weight)
            return
        if isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=TRANSITION_IN_STD)
            return
        super()._init_weights(module)
        if isinstance(module, KVSpecDraftModel):
            init.normal_(module.block_embedding, std=self.config.initializer_range)

    def block_inputs(self, anchor_embeds: torch.Tensor, target_hidden: torch.Tensor | None) -> torch.Tensor:
        """Inputs of a block: ``anchor_embeds`` [..., H], ``target_hidden`` [..., H] (hybrid) -> [..., G, H]."""
        first = anchor_embeds + self.block_embedding[0]
        if self.config.context == "hybrid":
            first = self.context_proj(torch.cat((first, target_hidden.to(first.dtype)), dim=-1))
        rest = self.block_embedding[1:].expand(*first.shape[:-1], -1, -1)
        return torch.cat((first.unsqueeze(-2), rest.to(first.dtype)), dim=-2)

    def forward(
        self,
        anchor_embeds: torch.Tensor,
        base: torch.Tensor,
        context: list[tuple[torch.Tensor, torch.Tensor]],
        target_hidden: torch.Tensor | None = None,
        previous: torch.Tensor | None = None,
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
        """Score the blocks of A anchors in each of B sequences.

        ``anchor_embeds`` [B, A, H]: the target's embedding of the anchors. ``base`` [B, A] int64: their positions.
        ``context``: per head layer the target's keys and values [B, Hkv, S, D] of layer ``target_kv_layer_ids[i]``;
        an anchor sees positions before its own. ``target_hidden`` [B, A, H]: the target's last hidden states at
        ``base - 1``, for context "hybrid". Returns the normed hidden states [B, A, G, H]; row d predicts the token at
        ``base + 1 + d``. With ``previous`` [B, A, G] int64, the true token before each predicted one, also returns the
        transition bias [B, A, G, V] (so that a training step is one forward).
        """
        (batch, anchors), block = base.shape, self.config.draft_block_size
        hidden = self.block_inputs(anchor_embeds, target_hidden).flatten(1, 2)
        positions = (base[..., None] + torch.arange(block, device=base.device)).flatten(1)
        rotary = self.rotary_emb(hidden, positions)
        mask = _block_mask(base, context[0][0].shape[2], block)
        for layer, layer_context in zip(self.layers, context, strict=True):
            hidden = layer(hidden, rotary, layer_context, mask)
        hidden = self.norm(hidden).view(batch, anchors, block, -1)
        return hidden if previous is None else (hidden, self.transition_bias(previous))

    def transition_bias(self, previous: torch.Tensor) -> torch.Tensor:
        """Logit bias after the tokens ``previous`` [...] int64 -> [..., V]."""
        return self.transition_out(self.transition_in(previous))


def _block_mask(base: torch.Tensor, context_len: int, block: int) -> torch.Tensor:
    """[B, 1, A*G, S + A*G] bool: context before the row's anchor, and every row of the same block."""
    anchors = base.shape[1]
    row_base = base.repeat_interleave(block, dim=1)
    context = torch.arange(context_len, device=base.device) < row_base[..., None]
    owner = torch.arange(anchors, device=base.device).repeat_interleave(block)
    own = (owner[:, None] == owner).expand(base.shape[0], -1, -1)
    return torch.cat((context, own), dim=-1).unsqueeze(1)


def default_kv_layer_ids(num_target_layers: int, num_layers: int) -> list[int]:
    """Target layers for a head of ``num_layers``: evenly spaced, the target's last layer last."""
    return [round((i + 1) * num_target_layers / num_layers) - 1 for i in range(num_layers)]


def head_config_for(target_config, tokenizer=None, **overrides) -> KVSpecDraftConfig:
    """Configuration of a head that fits the target; ``overrides`` are fields of ``KVSpecDraftConfig``.

    ``target_config`` is the target's Hugging Face text config, ``tokenizer`` its tokenizer or None.
    """
    found = target_fingerprint(target_config, tokenizer)
    fields = {
        "num_hidden_layers": 3,
        "hidden_size": found["hidden_size"],
        "intermediate_size": target_config.intermediate_size,
        "num_attention_heads": found["num_attention_heads"],
        "num_key_value_heads": found["num_key_value_heads"],
        "head_dim": found["head_dim"],
        "rms_norm_eps": getattr(target_config, "rms_norm_eps", 1e-6),
        "hidden_act": getattr(target_config, "hidden_act", "silu"),
        "rope_parameters": found["rope_parameters"],
        "qk_norm": True,
        "vocab_size": found["vocab_size"],
        "max_position_embeddings": target_config.max_position_embeddings,
        "target": found,
    }
    fields.update({key: value for key, value in overrides.items() if value is not None})
    if fields.get("target_kv_layer_ids") is None:
        fields["target_kv_layer_ids"] = default_kv_layer_ids(found["num_hidden_layers"], fields["num_hidden_layers"])
    return KVSpecDraftConfig(**fields)
