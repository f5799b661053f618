# SPDX-License-Identifier: Apache-2.0
"""The draft head: a few transformer layers whose attention reads the target's KV cache.

A head scores blocks of G = ``draft_block_size`` positions. Row 0 of a block is the anchor (the last sampled token, at
position ``base``); row d predicts the token at position ``base + 1 + d``. Every row attends to a context at positions
before ``base`` and to its own block. A transition bias of low rank makes the logits of a position depend on the token
x before it. ``transition: "table"``: ``lm_head(h_d) + W2 W1[x]``. ``"tied"``: ``lm_head(h_d + Q (P e(x) * (1 + U
h_d)))`` with e(x) the target's embedding of x, normed: what a token changes depends on where it stands, rare tokens
share what frequent ones learned, and no parameter counts tokens. It is served as tables, ``W1 = P e`` and ``W2 =
lm_head Q``, and a gate per row.

``drafting: "block"``: one pass; rows 1.. are learned inputs, every row sees the whole block. ``"autoregressive"``: row
d's input is the embedding of the token at ``base + d``, and it sees rows up to d.

``context: "kv"``: a layer's context is the target's keys and values of one target layer, as they lie in the cache
(normed and rotated). ``"hybrid"``: also, the anchor's row starts from ``context_proj(concat(embedding, target hidden
state))``, the target's last hidden state after its final norm at ``base - 1`` (zeros when ``base`` is 0).
``"hidden"`` (EAGLE-3, arXiv 2503.01840): no target KV; ``fuse_proj`` mixes hidden states of several target layers, and
the context is the head's own keys and values of all tokens before. Autoregressive hybrid and hidden heads feed back
their own normed output as the next row's hidden state. What ``fusion`` adds: ``models/attention.py``.

``fusion: "eagle3"`` is the arithmetic of published EAGLE-3 checkpoints, which other engines serve (``export.py``): the
layer's queries, keys and values come from embedding and hidden state side by side, each normed; attention is added to
the hidden state; what is fed back is not normed; no row stands for the first token, before which there is no state.

The embedding and the LM head are the target's. They are not part of the checkpoint, whose weights are:

    block_embedding                                       [G, H]; row 0 is added to the anchor's; only with "block"
    context_proj.weight                                   [H, 2H], not with context "kv" or "eagle3"
    fuse_proj.weight                                      [H, F*H], only with F aux_hidden_state_layer_ids
    layers.{i}.input_layernorm.weight                     [H]
    layers.{i}.hidden_norm.weight                         [H], only with "eagle3"
    layers.{i}.self_attn.{q,k,v,o}_proj.weight            linear without bias
    layers.{i}.self_attn.{q,k}_norm.weight                [head_dim], only with qk_norm
    layers.{i}.post_attention_layernorm.weight            [H]
    layers.{i}.mlp.{gate,up,down}_proj.weight             linear without bias
    norm.weight                                           [H]
    transition_in.weight                                  [V, r] (W1), only with "table" and r > 0
    transition_out.weight                                 [draft vocabulary, r] (W2), the same
    transition_{token,state}.weight                       [r, H] (P and U), only with "tied" and r > 0
    transition_hidden.weight                              [H, r] (Q), the same
    d2t, t2d                                              only with a reduced draft vocabulary: its i-th token is the
                                                          target's i + d2t[i]; t2d [V] bool marks the tokens in it
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import nn
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.models.qwen3.modeling_qwen3 import Qwen3MLP, Qwen3RMSNorm

from vllm_kvspec.config import KVSpecDraftConfig, target_fingerprint, unsupported_attention
from vllm_kvspec.models.attention import GatedAttention, KVSpecAttention, ZeroLinear
from vllm_kvspec.models.rotary import LayerRotary
from vllm_kvspec.models.target import TargetView, at_positions
from vllm_kvspec.rope import (
    FULL,
    is_interleaved,
    is_per_layer_type,
    layer_heads,
    layer_rope,
    layer_types,
    layer_window,
    owns_kv,
)

# Large beside the usual 0.02: the other factor starts at zero and learns in proportion to this one. On the tiny target,
# 60 steps: KL 1.86 against 1.96 nats at depths 1 to 7.
TRANSITION_IN_STD = 0.3
# Target layers whose KV or hidden states are used together, as in KVShot and EAGLE-3.
NUM_SOURCES = 3


class Previous(NamedTuple):
    """The tokens before the predicted ones: ids int64 [...] and the target's embeddings of them [..., H]."""

    tokens: torch.Tensor
    embeds: torch.Tensor


class KVSpecLayer(nn.Module):
    """Pre-norm attention and MLP, each with a residual."""

    def __init__(self, config: KVSpecDraftConfig):
        super().__init__()
        self.input_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = GatedAttention(config) if config.fusion == "gated" else KVSpecAttention(config)
        self.post_attention_layernorm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.mlp = Qwen3MLP(config)

    def forward(self, hidden: torch.Tensor, rotary, context: list, mask: torch.Tensor):
        """``hidden`` [B, R, H] -> ([B, R, H], the rows' own keys and values); see ``KVSpecAttention.forward``."""
        normed, residual = self.attention_input(hidden)
        attended, own = self.self_attn(normed, rotary, context, mask)
        hidden = residual + attended
        return hidden + self.mlp(self.post_attention_layernorm(hidden)), own

    def attention_input(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """What queries, keys and values are made of, and what attention is added to."""
        return self.input_layernorm(hidden), hidden

    def keys_values(self, hidden: torch.Tensor, rotary):
        """The rows' own keys and values; see ``KVSpecAttention.keys_values``."""
        return self.self_attn.keys_values(self.attention_input(hidden)[0], rotary)


class Eagle3Layer(KVSpecLayer):
    """EAGLE-3's: takes [B, R, 2H], a token's embedding and the hidden state before it, and gives [B, R, H]."""

    def __init__(self, config: KVSpecDraftConfig):
        super().__init__(config)
        self.hidden_norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.self_attn = KVSpecAttention(config, input_size=2 * config.hidden_size)

    def attention_input(self, hidden: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        embeds, state = hidden.chunk(2, dim=-1)
        return torch.cat((self.input_layernorm(embeds), self.hidden_norm(state)), dim=-1), state


class KVSpecDraftModel(PreTrainedModel):
    """The head. See the module docstring for the computation and the weights."""

    config_class = KVSpecDraftConfig
    base_model_prefix = "model"
    _no_split_modules = ["KVSpecLayer", "Eagle3Layer"]
    _supports_sdpa = True

    def __init__(self, config: KVSpecDraftConfig):
        super().__init__(config)
        if config.drafting == "block":
            self.block_embedding = nn.Parameter(torch.empty(config.draft_block_size, config.hidden_size))
        if config.context != "kv" and not config.is_eagle3:
            self.context_proj = nn.Linear(2 * config.hidden_size, config.hidden_size, bias=False)
        if config.has_own_context:
            fused_size = len(config.aux_hidden_state_layer_ids) * config.hidden_size
            self.fuse_proj = nn.Linear(fused_size, config.hidden_size, bias=False)
        layer_class = Eagle3Layer if config.is_eagle3 else KVSpecLayer
        self.layers = nn.ModuleList(layer_class(config) for _ in range(config.num_hidden_layers))
        self.norm = Qwen3RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
        self.rotary_emb = LayerRotary(config)
        if config.transition_rank and config.transition == "tied":
            self.transition_token = nn.Linear(config.hidden_size, config.transition_rank, bias=False)
            self.transition_state = nn.Linear(config.hidden_size, config.transition_rank, bias=False)
            self.transition_hidden = ZeroLinear(config.transition_rank, config.hidden_size, bias=False)
        elif config.transition_rank:
            self.transition_in = nn.Embedding(config.vocab_size, config.transition_rank)
            self.transition_out = ZeroLinear(config.transition_rank, config.draft_vocab_size, bias=False)
        if config.draft_vocab_size < config.vocab_size:
            self.register_buffer("d2t", torch.zeros(config.draft_vocab_size, dtype=torch.int64))
            self.register_buffer("t2d", torch.arange(config.vocab_size) < config.draft_vocab_size)
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
            if module.config.drafting == "block":
                init.normal_(module.block_embedding, std=self.config.initializer_range)
            if module.config.draft_vocab_size < module.config.vocab_size:
                init.zeros_(module.d2t)
                init.copy_(module.t2d, torch.arange(module.config.vocab_size) < module.config.draft_vocab_size)

    @property
    def draft_token_ids(self) -> torch.Tensor | None:
        """The target's id of every token of a reduced draft vocabulary, int64 [Vd] ascending; None for the whole."""
        if self.config.draft_vocab_size == self.config.vocab_size:
            return None
        return torch.arange(self.config.draft_vocab_size, device=self.d2t.device) + self.d2t

    @torch.no_grad()
    def set_draft_vocabulary(self, token_ids: torch.Tensor) -> None:
        """Score only the target tokens ``token_ids`` [Vd] int64, distinct, in any order."""
        token_ids = token_ids.to(self.d2t.device).sort().values
        self.d2t.copy_(token_ids - torch.arange(len(token_ids), device=token_ids.device))
        self.t2d.zero_()[token_ids] = True

    def block_inputs(self, anchor_embeds: torch.Tensor, state: torch.Tensor | None) -> torch.Tensor:
        """Inputs of a block drafted in one pass: ``anchor_embeds`` [..., H], ``state`` [..., H] -> [..., G, H]."""
        first = anchor_embeds + self.block_embedding[0]
        if state is not None:
            first = self._with_state(first, state)
        rest = self.block_embedding[1:].expand(*first.shape[:-1], -1, -1)
        return torch.cat((first.unsqueeze(-2), rest.to(first.dtype)), dim=-2)

    def _with_state(self, embeds: torch.Tensor, state: torch.Tensor) -> torch.Tensor:
        joined = torch.cat((embeds, state.to(embeds.dtype)), dim=-1)
        return joined if self.config.is_eagle3 else self.context_proj(joined)

    def _target_states(self, view: TargetView, positions: torch.Tensor) -> torch.Tensor | None:
        """What a row at ``positions`` [B, A] learns from the target's hidden states one position earlier, [B, A, H]."""
        if self.config.has_own_context:
            return self.fuse_proj(at_positions(view.fused, positions - 1))
        return at_positions(view.hidden, positions - 1) if self.config.context == "hybrid" else None

    def forward(
        self, view: TargetView, base: torch.Tensor, row_embeds: torch.Tensor, previous: Previous | None = None
    ) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor | None]:
        """Score the blocks of A anchors in each of B sequences.

        ``view``: the target over the sequences. ``base`` [B, A] int64: positions of the anchors; an anchor sees what
        lies before its own. ``row_embeds`` [B, A, R, H]: the target's embeddings of the anchors (block drafting, R = 1)
        or of the tokens at ``base .. base + R - 1`` (autoregressive). Returns the normed hidden states [B, A, G or R,
        H]; row d predicts the token at ``base + 1 + d``. With ``previous``, the true tokens before the predicted ones,
        also returns their ``transition`` (so that a training step is one forward).
        """
        state = self._target_states(view, base)
        rows_of = self._feed_back if self.config.feeds_back else self._one_pass
        hidden = rows_of(view, base, row_embeds, state)
        return hidden if previous is None else (hidden, self.transition(previous, hidden))

    def _one_pass(self, view: TargetView, base: torch.Tensor, row_embeds: torch.Tensor, state) -> torch.Tensor:
        """All rows at once: block drafting, and autoregressive heads whose rows need no output of the row before."""
        contexts = self._contexts(view)
        is_block = self.config.drafting == "block"
        rows = self.block_inputs(row_embeds[..., 0, :], state) if is_block else row_embeds
        (batch, anchors), count = base.shape, rows.shape[2]
        positions = base[..., None] + torch.arange(count, device=base.device)
        rotaries = self.rotary_emb(rows, positions.flatten(1))
        options = (base, _context_len(contexts), count)
        masks = self._masks(view, lambda window: _rows_mask(*options, causal=not is_block, window=window))
        hidden = rows.flatten(1, 2)
        for layer, context, rotary, mask in zip(self.layers, contexts, rotaries, masks, strict=True):
            hidden, _ = layer(hidden, rotary, [context], mask)
        return self.norm(hidden).view(batch, anchors, count, -1)

    def _feed_back(self, view: TargetView, base: torch.Tensor, row_embeds: torch.Tensor, state) -> torch.Tensor:
        """Row after row, each from the token's embedding and the head's own output of the row before."""
        contexts = self._contexts(view)
        past, outputs = [[context] for context in contexts], []
        own = torch.eye(base.shape[1], dtype=torch.bool, device=base.device).expand(base.shape[0], 1, -1, -1)
        for d in range(row_embeds.shape[2]):
            hidden = self._with_state(row_embeds[:, :, d], state)
            rotaries = self.rotary_emb(hidden, base + d)
            masks = self._masks(view, partial(_path_mask, base, d, _context_len(contexts), own, self.config.is_eagle3))
            for layer, keys, rotary, mask in zip(self.layers, past, rotaries, masks, strict=True):
                hidden, kv = layer(hidden, rotary, keys, mask)
                keys.append(kv)
            outputs.append(self.norm(hidden))
            state = hidden if self.config.is_eagle3 else outputs[-1]
        return torch.stack(outputs, dim=2)

    def _contexts(self, view: TargetView) -> list:
        """What each layer's rows attend to before ``base``: keys and values [B, Hkv, S, D] (pairs of them if gated)."""
        config = self.config
        if config.has_own_context:
            own = self._own_context(view)
            return [*zip(own, view.kv, strict=True)] if config.fusion == "gated" else own
        if config.fusion == "direct":
            return view.kv
        if config.fusion == "concat":
            return [tuple(torch.cat([kv[part] for kv in view.kv], dim=1) for part in (0, 1))] * len(self.layers)
        rotaries = self.rotary_emb(view.embeds, torch.arange(view.embeds.shape[1], device=view.embeds.device)[None])
        return [
            layer.self_attn.project_context(view.kv, rotary)
            for layer, rotary in zip(self.layers, rotaries, strict=True)
        ]

    def _masks(self, view: TargetView, make_mask: Callable[[int], torch.Tensor]) -> list:
        """Each layer's mask from ``make_mask(window)``, with the window of the layer it reads (pairs if gated)."""
        layers = len(self.layers)
        windows = view.windows if len(view.windows) == layers else (view.windows or [0])[:1] * layers
        is_gated = self.config.fusion == "gated"
        made = {window: make_mask(window) for window in {*windows, *([0] if is_gated else [])}}
        return [(made[0], made[window]) if is_gated else made[window] for window in windows]

    def _own_context(self, view: TargetView) -> list:
        """Keys and values per layer of a head over the whole sequence, as autoregressive rows would have made them."""
        length, device = view.embeds.shape[1], view.embeds.device
        positions = torch.arange(length, device=device).expand(len(view.embeds), -1)
        hidden = self._with_state(view.embeds, self._target_states(view, positions))
        rotaries, causal = self.rotary_emb(hidden, positions), positions[0, :, None] >= positions[0]
        contexts = []
        for layer, rotary in zip(self.layers[:-1], rotaries, strict=False):
            hidden, kv = layer(hidden, rotary, [], causal[None, None])
            contexts.append(kv)
        last = self.layers[-1]
        return [*contexts, last.keys_values(hidden, rotaries[-1])]

    def transition(self, previous: Previous, hidden: torch.Tensor) -> torch.Tensor | None:
        """What the tokens before the rows ``hidden`` [..., H] add: "table": to the logits, [..., Vd]; "tied": to the
        hidden states, [..., H]; None for a head without a transition bias. ``target.row_logits`` takes it."""
        if not self.config.transition_rank:
            return None
        if self.config.transition == "table":
            return self.transition_out(self.transition_in(previous.tokens))
        return self.transition_hidden(self.token_rows(previous.embeds) * self.gate(hidden))

    def token_rows(self, embeds: torch.Tensor) -> torch.Tensor:
        """What tokens with the target's ``embeds`` [..., H] bring to a tied transition, [..., r]."""
        embeds = embeds.to(self.transition_token.weight.dtype)
        # Every target has embeddings of another size.
        return self.transition_token(embeds * torch.rsqrt(embeds.square().mean(dim=-1, keepdim=True) + 1e-12))

    def gate(self, hidden: torch.Tensor) -> torch.Tensor:
        """What rows ``hidden`` [..., H] make of it, [..., r]."""
        return 1 + self.transition_state(hidden)


def _context_len(contexts: list) -> int:
    """S of keys [B, Hkv, S, D], the first tensor in the nest of tuples."""
    first = contexts[0]
    while not torch.is_tensor(first):
        first = first[0]
    return first.shape[2]


def _context_mask(row_base: torch.Tensor, depth: torch.Tensor | int, context_len: int, window: int) -> torch.Tensor:
    """[B, 1, rows, S] bool: the context before each row's anchor, within a window (unless 0) of the row's position.

    ``row_base`` [B, rows]; a row stands ``depth`` (one number or [rows]) positions after its anchor.
    """
    key, base = torch.arange(context_len, device=row_base.device), row_base[..., None]
    visible = key < base
    if window:
        visible = visible & ((row_base + depth)[..., None] - key < window)
    return visible.unsqueeze(1)


def _path_mask(
    base: torch.Tensor, depth: int, context_len: int, own: torch.Tensor, without_first: bool, window: int
) -> torch.Tensor:
    """[B, 1, A, S + (depth + 1) * A] bool: what rows at ``base + depth`` see, ``own`` [B, 1, A, A] of each depth."""
    context = _context_mask(base, depth, context_len, window)
    if without_first:
        context[..., 0] = False
    return torch.cat((context, *[own] * (depth + 1)), dim=-1)


def _rows_mask(base: torch.Tensor, context_len: int, count: int, causal: bool, window: int) -> torch.Tensor:
    """[B, 1, A*R, S + A*R] bool: the context before the row's anchor (in the window), which hides nothing of its own
    block (up to itself if causal)."""
    row = torch.arange(base.shape[1] * count, device=base.device)
    own = row[:, None] // count == row // count
    if causal:
        own = own & (row[:, None] >= row)
    context = _context_mask(base.repeat_interleave(count, dim=1), row % count, context_len, window)
    return torch.cat((context, own.expand(len(base), 1, -1, -1)), dim=-1)


def evenly_spaced(choices: Sequence[int], count: int) -> list[int]:
    """``count`` of the ``choices``, the last one last; where there are fewer, some come twice."""
    return [choices[max(0, round((i + 1) * len(choices) / count) - 1)] for i in range(count)]


def readable_layers(target_config) -> list[int]:
    """Target layers that one head can read: with keys and values of their own, and key heads of one shape.

    Where layers differ in that, those with full attention, which see the whole context.
    """
    owners = [i for i in range(target_config.num_hidden_layers) if owns_kv(target_config, i)]
    if len({layer_heads(target_config, i) for i in owners}) == 1:
        return owners
    full = [i for i in owners if not layer_window(target_config, i)] or owners
    return [i for i in owners if layer_heads(target_config, i) == layer_heads(target_config, full[-1])]


def head_config_for(target_config, tokenizer=None, **overrides) -> KVSpecDraftConfig:
    """Configuration of a head that fits the target; ``overrides`` are fields of ``KVSpecDraftConfig``.

    ``target_config`` is the target's Hugging Face text config, ``tokenizer`` its tokenizer or None.
    """
    if reason := unsupported_attention(target_config):
        name = getattr(target_config, "name_or_path", "") or target_config.model_type
        raise ValueError(
            f"A kvspec head attends to the target's KV cache as the target does, with rotary positions; {name} has "
            f"{reason}. Use another target, or serve it with another method."
        )
    found = target_fingerprint(target_config, tokenizer)
    fusion = overrides.get("fusion") or "direct"
    fields = {
        "num_hidden_layers": 3,
        "hidden_size": found["hidden_size"],
        "intermediate_size": target_config.intermediate_size,
        "num_attention_heads": found["num_attention_heads"],
        "rms_norm_eps": getattr(target_config, "rms_norm_eps", 1e-6),
        "qk_norm": fusion != "eagle3",
        "vocab_size": found["vocab_size"],
        "max_position_embeddings": target_config.max_position_embeddings,
        "target": found,
    }
    fields.update({key: value for key, value in overrides.items() if value is not None})
    context = fields.get("context")
    sources = fields["num_hidden_layers"] if fusion in ("direct", "gated") else NUM_SOURCES
    if fields.get("target_kv_layer_ids") is None and context != "hidden":
        fields["target_kv_layer_ids"] = evenly_spaced(readable_layers(target_config), sources)
    if fields.get("aux_hidden_state_layer_ids") is None and (context == "hidden" or fusion == "gated"):
        choices = range(found["num_hidden_layers"] - (fusion == "eagle3"))
        fields["aux_hidden_state_layer_ids"] = evenly_spaced(choices, NUM_SOURCES)
    fields = _heads_of(target_config, fields) | fields
    return KVSpecDraftConfig(**fields, **_rope_fields(target_config, fields))


def _heads_of(target_config, fields: dict[str, Any]) -> dict[str, int]:
    """Key heads of a head's layers: those of the target layers that it reads.

    Raises ValueError where they differ, or have no keys of their own.
    """
    ids = fields.get("target_kv_layer_ids") or readable_layers(target_config)[-1:]
    if not all(0 <= i < target_config.num_hidden_layers for i in ids):
        # The configuration's own check says so.
        return {}
    shapes = {layer_heads(target_config, i) for i in ids}
    if len(shapes) > 1 or not all(owns_kv(target_config, i) for i in ids):
        raise ValueError(
            "target_kv_layer_ids must name layers with keys of their own, all with equally many heads of one size; "
            f"found {ids}. Choose among {readable_layers(target_config)}."
        )
    return dict(zip(("num_key_value_heads", "head_dim"), *shapes, strict=True))


def _rope_fields(target_config, fields: dict[str, Any]) -> dict[str, Any]:
    """How a head's rows are rotated: as the target layers that it reads.

    Raises ValueError where a layer would read target layers of several kinds at once.
    """
    rope, ids = fields["target"]["rope_parameters"], fields.get("target_kv_layer_ids") or []
    # A context of the head's own has no window: the positions of layers that have none.
    shared = dict(rope.get(FULL) or next(iter(rope.values()))) if is_per_layer_type(rope) else dict(rope)
    # With keys of its own alone, a head may turn them its own way.
    found = {
        "rope_parameters": shared,
        "rope_interleaved": is_interleaved(target_config) and fields.get("fusion") != "eagle3",
    }
    if not all(0 <= i < target_config.num_hidden_layers for i in ids):
        # The configuration's own check says so.
        return found
    ropes = [layer_rope(target_config, i) for i in ids]
    if fields.get("fusion", "direct") not in ("direct", "gated"):
        windows = [layer_window(target_config, i) for i in ids]
        if any(one != ropes[0] for one in ropes) or len(set(windows)) > 1:
            raise ValueError(
                f"fusion {fields['fusion']!r} must read target layers with the same rotary positions and window; found "
                f"{[layer_types(target_config)[i] for i in ids]} in target_kv_layer_ids {ids}. Name layers of one type."
            )
        ropes = ropes[:1] * fields["num_hidden_layers"]
    return found | ({"layer_rope_parameters": ropes} if any(one != shared for one in ropes) else {})
