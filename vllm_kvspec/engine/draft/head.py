# SPDX-License-Identifier: Apache-2.0
"""The draft head in vLLM's parallel linears. ``models/draft_head.py`` is the definition; the weights are the same.

It owns no vLLM ``Attention`` layer, so vLLM allocates no KV cache for it: context keys and values are the target's,
read in place, and the block's own live only within one call.
"""

import contextlib
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn
from vllm import ir
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.activation import get_act_and_mul_fn
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    MergedColumnParallelLinear,
    QKVParallelLinear,
    ReplicatedLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.model_loader.weight_utils import default_weight_loader
from vllm.platforms import current_platform

from vllm_kvspec.config import KVSpecDraftConfig
from vllm_kvspec.engine import ops
from vllm_kvspec.engine.target_kv import PagedLayer

# (parameter here, its part in the checkpoint, shard id)
STACKED = (
    ("qkv_proj", "q_proj", "q"),
    ("qkv_proj", "k_proj", "k"),
    ("qkv_proj", "v_proj", "v"),
    ("gate_up_proj", "gate_proj", 0),
    ("gate_up_proj", "up_proj", 1),
)
# Both say the same: token i of a reduced draft vocabulary is the target's i + d2t[i], and t2d marks those tokens.
DRAFT_VOCABULARY = ("d2t", "t2d")


class KVSpecAttention(nn.Module):
    """Attention of the block's rows over one target layer's paged KV and over the block itself.

    ``rope``: parameters of the rows' rotation, None for none.
    """

    def __init__(self, config: KVSpecDraftConfig, rope: dict[str, Any] | None, max_position: int, prefix: str):
        super().__init__()
        tp_size = get_tensor_model_parallel_world_size()
        self.head_dim = config.head_dim
        self.num_heads = config.num_attention_heads // tp_size
        self.num_kv_heads = max(1, config.num_key_value_heads // tp_size)
        self.scale = config.head_dim**-0.5
        self.causal = config.drafting == "autoregressive"
        self.qkv_proj = QKVParallelLinear(
            config.hidden_size,
            config.head_dim,
            config.num_attention_heads,
            config.num_key_value_heads,
            bias=False,
            prefix=f"{prefix}.qkv_proj",
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim, config.hidden_size, bias=False, prefix=f"{prefix}.o_proj"
        )
        self.rotary_emb = None
        if rope is not None:
            self.rotary_emb = get_rope(
                config.head_dim, max_position, is_neox_style=not config.rope_interleaved, rope_parameters=rope
            )
        self.q_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None
        self.k_norm = RMSNorm(config.head_dim, eps=config.rms_norm_eps) if config.qk_norm else None

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        target: PagedLayer,
        block_table: torch.Tensor,
        context_lens: torch.Tensor,
    ) -> torch.Tensor:
        """``hidden`` [B*R, H], ``positions`` int64 [B*R], ``block_table`` int32 [>=B, M], ``context_lens`` int32 [B].

        Returns [B*R, H].
        """
        qkv, _ = self.qkv_proj(hidden)
        q_size, kv_size = self.num_heads * self.head_dim, self.num_kv_heads * self.head_dim
        q, k, v = qkv.split([q_size, kv_size, kv_size], dim=-1)
        if self.q_norm is not None:
            q = self.q_norm(q.reshape(-1, self.num_heads, self.head_dim)).view(-1, q_size)
            k = self.k_norm(k.reshape(-1, self.num_kv_heads, self.head_dim)).view(-1, kv_size)
        if self.rotary_emb is not None:
            q, k = cuda_kernel_of(self.rotary_emb)(positions, q, k)
        rows = (len(context_lens), -1)
        q = q.view(*rows, self.num_heads, self.head_dim)
        out = ops.paged_draft_attention(
            q,
            target.k_cache,
            target.v_cache,
            block_table,
            context_lens,
            k.view(*rows, self.num_kv_heads, self.head_dim),
            v.reshape(*rows, self.num_kv_heads, self.head_dim),
            scale=self.scale,
            sliding_window=target.sliding_window,
            causal=self.causal,
            k_scale=target.k_scale,
            v_scale=target.v_scale,
            out=torch.empty_like(q),
        )
        output, _ = self.o_proj(out.view(-1, q_size))
        return output


def cuda_kernel_of(rotary_emb: nn.Module) -> Callable:
    """On CUDA the layer's kernel: its own dispatch takes the torch version wherever compiled models are the default.
    LongRoPE's layer has only the torch version."""
    return getattr(rotary_emb, "forward_cuda", rotary_emb) if current_platform.is_cuda() else rotary_emb


def one_kernel_norms():
    """The head is not compiled, and for what is not, vLLM's default on CUDA is a norm of eight small torch kernels.

    In 0.34 the op is gone: look at what its RMSNorm then runs before the bound in ``hooks/compat.py`` is raised.
    """
    if current_platform.is_cuda():
        return ir.ops.rms_norm.set_priority(["vllm_c", "native"])
    return contextlib.nullcontext()


class KVSpecMLP(nn.Module):
    def __init__(self, hidden_size: int, intermediate_size: int, activation: str, prefix: str):
        super().__init__()
        self.gate_up_proj = MergedColumnParallelLinear(
            hidden_size, [intermediate_size] * 2, bias=False, prefix=f"{prefix}.gate_up_proj"
        )
        self.down_proj = RowParallelLinear(intermediate_size, hidden_size, bias=False, prefix=f"{prefix}.down_proj")
        self.act_fn = get_act_and_mul_fn(activation)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        gate_up, _ = self.gate_up_proj(hidden)
        output, _ = self.down_proj(self.act_fn(gate_up))
        return output


class KVSpecLayer(nn.Module):
    def __init__(self, config: KVSpecDraftConfig, rope: dict[str, Any] | None, max_position: int, prefix: str):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = KVSpecAttention(config, rope, max_position, f"{prefix}.self_attn")
        self.post_attention_layernorm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = KVSpecMLP(config.hidden_size, config.intermediate_size, config.hidden_act, f"{prefix}.mlp")

    def forward(self, hidden: torch.Tensor, *attention_inputs) -> torch.Tensor:
        hidden = hidden + self.self_attn(self.input_layernorm(hidden), *attention_inputs)
        return hidden + self.mlp(self.post_attention_layernorm(hidden))


class KVSpecDraftModel(nn.Module):
    """Built and loaded by vLLM's model loader from the head's checkpoint.

    ``draft_ids``: target ids int64 [Vd] of a reduced draft vocabulary, or None.
    """

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        config: KVSpecDraftConfig = vllm_config.speculative_config.draft_model_config.hf_config
        self.config = config
        # A tree node may sit a block beyond the last position the target will ever decode.
        max_position = vllm_config.model_config.max_model_len + config.draft_block_size
        hidden = config.hidden_size
        if config.drafting == "block":
            self.block_embedding = nn.Parameter(torch.empty(config.draft_block_size, hidden))
        if config.context == "hybrid":
            self.context_proj = ReplicatedLinear(
                2 * hidden, hidden, bias=False, return_bias=False, prefix=f"{prefix}.context_proj"
            )
        self.layers = nn.ModuleList(
            KVSpecLayer(config, config.layer_rope(i), max_position, f"{prefix}.layers.{i}")
            for i in range(config.num_hidden_layers)
        )
        # Some tables (YaRN's, dynamic ones) have the model's own length whatever is asked for, and nothing checks reads
        # beyond it. Rows there are never accepted, so any position serves.
        tables = [getattr(layer.self_attn.rotary_emb, "cos_sin_cache", None) for layer in self.layers]
        shortest = min((len(table) for table in tables if table is not None), default=max_position)
        self.last_position = shortest - 1 if shortest < max_position else None
        self.norm = RMSNorm(hidden, eps=config.rms_norm_eps)
        if config.has_tied_transition:
            self.transition_token = nn.Linear(hidden, config.transition_rank, bias=False)
            self.transition_state = nn.Linear(hidden, config.transition_rank, bias=False)
            self.transition_hidden = nn.Linear(config.transition_rank, hidden, bias=False)
        elif config.transition_rank:
            self.transition_in = nn.Embedding(config.vocab_size, config.transition_rank)
            self.transition_out = nn.Linear(config.transition_rank, config.draft_vocab_size, bias=False)
        self._is_loaded = False
        is_reduced = config.draft_vocab_size < config.vocab_size
        self.register_buffer("draft_ids", torch.arange(config.draft_vocab_size) if is_reduced else None)

    def token_rows(self, embeds: torch.Tensor) -> torch.Tensor:
        """What tokens with the target's ``embeds`` [n, H] bring to a tied transition, [n, r]."""
        normed = embeds.float() * torch.rsqrt(embeds.float().square().mean(dim=-1, keepdim=True) + 1e-12)
        return self.transition_token(normed.to(self.transition_token.weight.dtype))

    def gate(self, hidden: torch.Tensor) -> torch.Tensor:
        """What rows ``hidden`` [..., H] make of it, [..., r]."""
        return 1 + self.transition_state(hidden)

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """vLLM's registry asks every generation model for it; the head's embedding is the target's."""
        raise NotImplementedError("a kvspec head uses its target's embedding")

    def block_rows(self, anchor_embeds: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Inputs of a block drafted in one pass: ``anchor_embeds``, ``state`` [B, H] -> [B, G, H]."""
        first = self.path_row(anchor_embeds + self.block_embedding[0], state)
        rest = self.block_embedding[1:].expand(first.shape[0], -1, -1)
        return torch.cat((first.unsqueeze(1), rest), dim=1)

    def path_row(self, embeds: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        """Input of a row: its embedding and, with context "hybrid", a hidden state of one position earlier; [..., H].

        ``state`` is the target's (after the final norm) for the anchor, and the head's own output for later rows.
        """
        if self.config.context == "kv":
            return embeds
        return self.context_proj(torch.cat((embeds, state), dim=-1))

    def forward(
        self,
        rows: torch.Tensor,
        base: torch.Tensor,
        context: list[PagedLayer],
        block_tables: list[torch.Tensor],
    ) -> torch.Tensor:
        """Score one block of rows per request (or per path of one).

        rows: [B, R, H], the rows' inputs. base: int32 [B], position of the first row, which is also how many positions
        of target KV the rows see. context: one PagedLayer per head layer. block_tables: int32 [>=B, M] per KV cache
        group. Returns normed hidden states [B, R, H]; row d predicts the token at base + 1 + d. Rows see their whole
        block, or with autoregressive drafting the rows up to themselves.
        """
        positions = (base.long()[:, None] + torch.arange(rows.shape[1], device=base.device)).flatten()
        if self.last_position is not None:
            positions = positions.clamp(max=self.last_position)
        hidden = rows.flatten(0, 1)
        with one_kernel_norms():
            for layer, target in zip(self.layers, context, strict=True):
                hidden = layer(hidden, positions, target, block_tables[target.group], base)
            return self.norm(hidden).view(rows.shape)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the checkpoint's tensors; raises ValueError for a tensor the head lacks or one it does not get.

        Only the first call must bring all: weights may be updated in chunks (vLLM's layerwise reload).
        """
        parameters = dict(self.named_parameters())
        loaded: set[str] = set()
        parts: set[str] = set()
        for name, tensor in weights:
            parts.add(name)
            if name in DRAFT_VOCABULARY and self.draft_ids is not None:
                if name == "d2t":
                    self._set_draft_ids(tensor)
                continue
            target, shard = name, None
            for ours, theirs, shard_id in STACKED:
                if f".{theirs}." in name:
                    target, shard = name.replace(theirs, ours), shard_id
            if target not in parameters:
                raise ValueError(
                    f"The draft head's checkpoint has a tensor {name} that this head ({self.config.context} context, "
                    f"{self.config.drafting} drafting) does not have. Use a config.json and model.safetensors from the "
                    "same training run."
                )
            parameter = parameters[target]
            loader = getattr(parameter, "weight_loader", default_weight_loader)
            loader(parameter, tensor, *(() if shard is None else (shard,)))
            loaded.add(target)
        if not self._is_loaded:
            self._require_all(parameters, parts)
        self._is_loaded = True
        return loaded

    def _set_draft_ids(self, offsets: torch.Tensor) -> None:
        ids = torch.arange(len(offsets), device="cpu") + offsets.cpu()
        if ids.shape != self.draft_ids.shape or ids.min() < 0 or ids.max() >= self.config.vocab_size:
            raise ValueError(
                f"The draft head's d2t must map {len(self.draft_ids)} draft tokens to target ids below "
                f"{self.config.vocab_size}; found {len(ids)} that map to {int(ids.min())}..{int(ids.max())}. Use a "
                "config.json and model.safetensors from the same training run."
            )
        self.draft_ids.copy_(ids)

    def _require_all(self, parameters: dict[str, torch.Tensor], parts: set[str]) -> None:
        expected = set() if self.draft_ids is None else {"d2t"}
        for name in parameters:
            stacked = [name.replace(ours, theirs) for ours, theirs, _ in STACKED if f".{ours}." in name]
            expected.update(stacked or [name])
        if missing := sorted(expected - parts):
            raise ValueError(
                f"The draft head's checkpoint lacks {len(missing)} tensors, first {missing[0]}. "
                "Use a config.json and model.safetensors from the same training run."
            )
