# SPDX-License-Identifier: Apache-2.0
"""A Gemma 4 assistant without a server: transformers' own model, drafting as it is served.

Evaluation asks of it what it asks of a head: a config, ``candidates`` and the ``logits`` along a path.
"""

from collections.abc import Sequence
from types import SimpleNamespace

import torch
from torch import nn
from transformers import AutoConfig, Gemma4AssistantForCausalLM, PreTrainedModel

from vllm_kvspec.assistant import DEFAULT_DEPTH, scales, source_layers
from vllm_kvspec.kernels.reference_candidates import (
    Candidates,
    empty_candidates,
    expand_level,
    plan_levels,
    root_parents,
)
from vllm_kvspec.models.target import TargetView
from vllm_kvspec.rope import layer_types


class AssistantHead(nn.Module):
    """An assistant in the place of a ``KVSpecDraftModel``; every level of its trees, at most ``depth``, is a pass."""

    def __init__(self, model: Gemma4AssistantForCausalLM, target: PreTrainedModel, depth: int = DEFAULT_DEPTH):
        super().__init__()
        self.model, self.target = model, [target]
        text = model.config.get_text_config()
        self.kinds = layer_types(text)
        self.config = SimpleNamespace(
            draft_block_size=depth,
            drafting="assistant",
            **scales(model.config),
            vocab_size=text.vocab_size,
            num_hidden_layers=text.num_hidden_layers,
            target_kv_layer_ids=source_layers(model.config, target.config.get_text_config()),
            aux_hidden_state_layer_ids=[],
        )
        self.suppressed = getattr(model.generation_config, "suppress_tokens", None) or []

    @classmethod
    def load(cls, path: str, target: PreTrainedModel, depth: int | None = None) -> "AssistantHead":
        """The assistant at ``path``, a directory or repository. Raises ValueError where it is another target's."""
        source_layers(AutoConfig.from_pretrained(path), target.config.get_text_config())
        model = Gemma4AssistantForCausalLM.from_pretrained(path, dtype=target.dtype).eval().to(target.device)
        return cls(model, target, depth or DEFAULT_DEPTH)

    def candidates(
        self,
        view: TargetView,
        input_ids: torch.Tensor,
        base: torch.Tensor,
        *,
        noise: torch.Tensor | None,
        scale: torch.Tensor | None,
        beam: int,
        width: int,
        num_nodes: int | None,
        chain: torch.Tensor | None,
    ) -> Candidates:
        """Candidates of a tree at each of the anchors ``base`` int64 [A] of the sequence ``input_ids`` [1, S].

        ``noise`` [A, G, V], ``scale`` [A] and ``chain`` bool [A] as in ``tree.expand_tree``.
        """
        levels = plan_levels(self.config.draft_block_size, beam, width, num_nodes)
        found = empty_candidates(len(base), levels, base.device)
        parents, state, offset = root_parents(input_ids[0, base]), view.hidden[0, base - 1, None], 0
        for depth, level in enumerate(levels):
            logits, state = self._pass(view, base, parents.token, state)
            parents = expand_level(
                logits, parents, None, None, None if noise is None else noise[:, depth, None], scale,
                level=level, chain=chain, candidates=found, offset=offset,
            )  # fmt: skip
            if parents is None:
                break
            path = (parents.index.long() - offset) // level.width
            state = state.gather(1, path.unsqueeze(-1).expand(-1, -1, state.shape[-1]))
            offset += level.num_parents * level.width
        return found

    def logits(self, view: TargetView, base: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        """Logits [A, R, V] of the tokens at ``base + 1 ..`` along the paths ``tokens`` int64 [A, R] at ``base ..``."""
        state, found = view.hidden[0, base - 1, None], []
        for column in tokens.split(1, dim=1):
            logits, state = self._pass(view, base, column, state)
            found.append(logits)
        return torch.cat(found, dim=1)

    def _pass(
        self, view: TargetView, base: torch.Tensor, tokens: torch.Tensor, state: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One level: ``tokens`` int64 [A, P] after ``state`` [A, P, Ht] -> logits [A, P, V], the next state."""
        embeds = self.target[0].get_input_embeddings()(tokens)
        inputs = self.model.pre_projection(torch.cat((embeds, state), dim=-1))
        # Every row is a query of its own at the last position before its anchor, over the keys up to there.
        place = (base - 1).repeat_interleave(tokens.shape[1])
        hidden = self.model.model(
            inputs_embeds=inputs.flatten(0, 1)[None],
            attention_mask=self._by_kind(_mask(place, view.hidden.shape[1], window) for window in view.windows),
            position_ids=place[None],
            shared_kv_states=self._by_kind(view.kv),
            use_cache=False,
        ).last_hidden_state
        logits = self._scores(hidden).view(*tokens.shape, -1)
        return logits, self.model.post_projection(hidden).view_as(state.expand(*tokens.shape, -1))

    def _by_kind(self, of_layers: Sequence) -> dict:
        """What belongs to each layer, which is the same for layers of one type."""
        return dict(zip(self.kinds, of_layers, strict=True))

    def _scores(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` [1, n, H] -> logits [1, n, V], -inf where the assistant has no score."""
        model = self.model
        cap = model.config.get_text_config().final_logit_softcapping
        if model.masked_embedding is not None:
            logits = model.masked_embedding(hidden, model.lm_head.weight)
            # All that is in no chosen cluster has the least.
            logits = logits.masked_fill(logits == logits.min(), float("-inf"))
        else:
            logits = model.lm_head(hidden)
            logits = logits if cap is None else cap * torch.tanh(logits / cap)
        logits[..., self.suppressed] = float("-inf")
        return logits


def _mask(place: torch.Tensor, length: int, window: int) -> torch.Tensor:
    """Which of ``length`` keys a query at each ``place`` [n] sees, bool [1, 1, n, length]; ``window`` 0: all before."""
    distance = place[:, None] - torch.arange(length, device=place.device)
    visible = distance >= 0
    return (visible & (distance < window) if window else visible)[None, None]
