# SPDX-License-Identifier: Apache-2.0
"""A Gemma 4 assistant in vLLM's parallel linears, loaded from its published checkpoint.

Its layers have queries alone. A layer of sliding or of full attention reads, in place, the keys and values of the last
target layer of that type that has its own. Every row of a draft stands at the position before the anchor's, the last
one in the cache, as in vLLM's own ``mtp`` (transformers rotates the queries one position further). What a row knows of
the path to it is the token and the hidden state of the row before: so rows never see each other, and all nodes of a
tree's level are more rows over the same prefix.
"""

from collections.abc import Iterable

import torch
from torch import nn
from vllm.config import VllmConfig
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import ColumnParallelLinear, ReplicatedLinear, RowParallelLinear
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import ParallelLMHead
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from vllm_kvspec.engine import ops
from vllm_kvspec.engine.draft.head import KVSpecMLP, cuda_kernel_of, one_kernel_norms
from vllm_kvspec.engine.target_kv import PagedLayer
from vllm_kvspec.rope import layer_heads, layer_rope

# Checkpoint's prefix -> ours.
RENAMED = (("model.layers.", "layers."), ("model.norm.", "norm."), ("masked_embedding.", "clusters."))
LOADED_BUFFERS = ("layer_scalar", "token_ordering")
# (part here, its part in the checkpoint, shard id)
STACKED = (("gate_up_proj", "gate_proj", 0), ("gate_up_proj", "up_proj", 1))


class AssistantAttention(nn.Module):
    """Queries over one target layer's paged KV. ``config`` is the assistant's text config."""

    def __init__(self, config, layer: int, max_position: int, prefix: str):
        super().__init__()
        tp_size = get_tensor_model_parallel_world_size()
        kv_heads, self.head_dim = layer_heads(config, layer)
        self.num_heads = config.num_attention_heads // tp_size
        self.num_kv_heads = max(1, kv_heads // tp_size)
        size = config.num_attention_heads * self.head_dim
        options = dict(bias=config.attention_bias, return_bias=False)
        self.q_proj = ColumnParallelLinear(config.hidden_size, size, prefix=f"{prefix}.q_proj", **options)
        self.o_proj = RowParallelLinear(size, config.hidden_size, prefix=f"{prefix}.o_proj", **options)
        self.q_norm = RMSNorm(self.head_dim, eps=config.rms_norm_eps)
        self.rotary_emb = get_rope(self.head_dim, max_position, rope_parameters=layer_rope(config, layer))

    def forward(
        self,
        hidden: torch.Tensor,
        positions: torch.Tensor,
        target: PagedLayer,
        block_table: torch.Tensor,
        context_lens: torch.Tensor,
    ) -> torch.Tensor:
        """``hidden`` [B*P, H], ``positions`` int64 [B*P], ``block_table`` int32 [>=B, M], ``context_lens`` int32 [B].

        Returns [B*P, H].
        """
        q = self.q_norm(self.q_proj(hidden).view(-1, self.num_heads, self.head_dim)).flatten(1)
        q, _ = cuda_kernel_of(self.rotary_emb)(positions, q, None)
        q = q.view(len(context_lens), -1, self.num_heads, self.head_dim)
        out = ops.paged_draft_attention(
            q,
            target.k_cache,
            target.v_cache,
            block_table,
            context_lens,
            None,
            None,
            scale=1.0,
            sliding_window=target.sliding_window,
            k_scale=target.k_scale,
            v_scale=target.v_scale,
            out=torch.empty_like(q),
        )
        return self.o_proj(out.view(len(hidden), -1))


class AssistantLayer(nn.Module):
    """Attention and MLP between norms on both sides, each with a residual; then the layer's factor."""

    def __init__(self, config, layer: int, max_position: int, prefix: str):
        super().__init__()
        norms = ("input", "post_attention", "pre_feedforward", "post_feedforward")
        for name in norms:
            setattr(self, f"{name}_layernorm", RMSNorm(config.hidden_size, eps=config.rms_norm_eps))
        self.self_attn = AssistantAttention(config, layer, max_position, f"{prefix}.self_attn")
        self.mlp = KVSpecMLP(config.hidden_size, config.intermediate_size, config.hidden_activation, f"{prefix}.mlp")
        self.register_buffer("layer_scalar", torch.ones(1))

    def forward(self, hidden: torch.Tensor, *attention_inputs) -> torch.Tensor:
        attended = self.self_attn(self.input_layernorm(hidden), *attention_inputs)
        hidden = hidden + self.post_attention_layernorm(attended)
        hidden = hidden + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(hidden)))
        return hidden * self.layer_scalar


class Clusters(nn.Module):
    """An LM head that scores the tokens of the best clusters only, of the ``num_centroids`` with equally many tokens.

    Every tensor-parallel rank holds it whole: what a row scores may lie anywhere in it.
    """

    def __init__(self, config, text):
        super().__init__()
        self.shape = (config.num_centroids, text.vocab_size // config.num_centroids)
        self.count = config.centroid_intermediate_top_k
        self.centroids = nn.Linear(text.hidden_size, config.num_centroids, bias=False)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)
        self.register_buffer("token_ordering", torch.zeros(text.vocab_size, dtype=torch.int64))

    def forward(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """``hidden`` [n, H] -> logits [n, Vd] of some tokens, and these tokens int64 [n, Vd], cluster by cluster."""
        best = self.centroids(hidden).topk(self.count, dim=-1).indices
        tokens = self.token_ordering.view(self.shape)[best].flatten(1)
        return (self.lm_head.weight[tokens] @ hidden.unsqueeze(-1)).squeeze(-1), tokens


class Gemma4Assistant(nn.Module):
    """Built and loaded by vLLM's model loader. Its embedding is the target's; its LM head is its own."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = ""):
        super().__init__()
        draft_model = vllm_config.speculative_config.draft_model_config
        self.config = draft_model.hf_config
        text = self.config.get_text_config()
        backbone, hidden = self.config.backbone_hidden_size, text.hidden_size
        options = dict(bias=False, return_bias=False)
        self.pre_projection = ReplicatedLinear(2 * backbone, hidden, prefix=f"{prefix}.pre_projection", **options)
        self.post_projection = ReplicatedLinear(hidden, backbone, prefix=f"{prefix}.post_projection", **options)
        max_position = vllm_config.model_config.max_model_len
        self.layers = nn.ModuleList(
            AssistantLayer(text, i, max_position, f"{prefix}.layers.{i}") for i in range(text.num_hidden_layers)
        )
        self.norm = RMSNorm(hidden, eps=text.rms_norm_eps)
        self.clusters = None
        if self.config.use_ordered_embeddings:
            self.clusters = Clusters(self.config, text)
        else:
            self.lm_head = ParallelLMHead(text.vocab_size, hidden, prefix=f"{prefix}.lm_head")
            self.logits_processor = LogitsProcessor(text.vocab_size, soft_cap=text.final_logit_softcapping)
        generation = draft_model.try_get_generation_config() or {}
        suppressed = None
        if ids := generation.get("suppress_tokens"):
            suppressed = torch.zeros(text.vocab_size, dtype=torch.bool)
            suppressed[torch.tensor(ids, device=suppressed.device)] = True
        # Tokens that are never drafted.
        self.register_buffer("suppressed", suppressed, persistent=False)
        self._is_loaded = False

    def embed_input_ids(self, input_ids: torch.Tensor) -> torch.Tensor:
        """vLLM's registry asks every generation model for it; the assistant's embedding is the target's."""
        raise NotImplementedError("an assistant uses its target's embedding")

    def forward(
        self,
        embeds: torch.Tensor,
        state: torch.Tensor,
        base: torch.Tensor,
        context: list[PagedLayer],
        block_tables: list[torch.Tensor],
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Score P rows for each of B requests.

        embeds: [B, P, Ht], the target's embeddings of the rows' tokens. state: [B, P, Ht], the target's last hidden
        state (after the final norm) at base - 1 for the anchor, for later rows what the row before returned. base:
        int32 [B], the anchor's position. context: one PagedLayer per layer. block_tables: int32 [>=B, M] per KV cache
        group. Returns normed hidden states [B, P, H], for ``logits`` of the next token, and the state of the next rows
        [B, P, Ht].
        """
        batch, paths = embeds.shape[:2]
        # Padding has base 0; it reads some key then, for nobody.
        context_lens = base.clamp(min=1)
        # Contiguous: of a single request it would be a view with stride 0.
        positions = (context_lens.long() - 1)[:, None].expand(-1, paths).flatten().contiguous()
        hidden = self.pre_projection(torch.cat((embeds, state), dim=-1).flatten(0, 1))
        with one_kernel_norms():
            for layer, target in zip(self.layers, context, strict=True):
                hidden = layer(hidden, positions, target, block_tables[target.group], context_lens)
            hidden = self.norm(hidden)
        return hidden.view(batch, paths, -1), self.post_projection(hidden).view(batch, paths, -1)

    def logits(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """``hidden`` [B, P, H] -> logits [B, P, V] of all tokens and None, or [B, P, Vd] and their tokens int64."""
        rows = hidden.flatten(0, 1)
        logits, tokens = (
            (self.logits_processor(self.lm_head, rows), None) if self.clusters is None else self.clusters(rows)
        )
        if self.suppressed is not None:
            logits = logits.masked_fill(self.suppressed if tokens is None else self.suppressed[tokens], float("-inf"))
        shape = (*hidden.shape[:2], -1)
        return logits.view(shape), None if tokens is None else tokens.view(shape)

    def load_weights(self, weights: Iterable[tuple[str, torch.Tensor]]) -> set[str]:
        """Load the checkpoint's tensors; raises ValueError for a tensor the assistant lacks or one it does not get.

        Only the first call must bring all: weights may be updated in chunks (vLLM's layerwise reload).
        """
        buffers = {name: buffer for name, buffer in self.named_buffers() if name.endswith(LOADED_BUFFERS)}
        places = dict(self.named_parameters()) | buffers
        loaded: set[str] = set()
        parts: set[str] = set()
        for name, tensor in weights:
            place, shard = self._place(name)
            if place is None:
                continue
            if place not in places:
                raise ValueError(f"The assistant's checkpoint has a tensor {name}, which no Gemma 4 assistant has.")
            loader = getattr(places[place], "weight_loader", default_weight_loader)
            loader(places[place], tensor, *(() if shard is None else (shard,)))
            loaded.add(place)
            parts.add(f"{place}.{shard}" if shard is not None else place)
        if not self._is_loaded:
            wanted = {
                part
                for place in places
                for part in ([f"{place}.0", f"{place}.1"] if "gate_up_proj" in place else [place])
            }
            if missing := sorted(wanted - parts):
                raise ValueError(f"The assistant's checkpoint lacks {len(missing)} tensors, first {missing[0]}.")
        self._is_loaded = True
        return loaded

    def _place(self, name: str) -> tuple[str | None, int | None]:
        """Where a tensor of the checkpoint goes, None for nowhere, and its shard there."""
        if name == "model.embed_tokens.weight":
            if not self.config.tie_word_embeddings:
                return None, None
            name = "lm_head.weight"
        if name == "lm_head.weight" and self.clusters is not None:
            name = "clusters.lm_head.weight"
        for theirs, ours in RENAMED:
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
        for ours, theirs, shard in STACKED:
            if f".{theirs}." in name:
                return name.replace(theirs, ours), shard
        return name, None
