# SPDX-License-Identifier: Apache-2.0
"""What a token adds to the logits of the rows after it, as ``ops.tree_candidates`` takes it."""

from collections.abc import Callable

import torch
from torch import nn

from vllm_kvspec.engine import ops
from vllm_kvspec.engine.draft.logits import language_model

# Tokens whose embeddings, and columns whose logits, are computed at a time.
TOKENS, COLUMNS = 8192, 64
# Logits so small that a cap (30 and more) leaves them as they are; a power of two.
SMALL = 2.0**-6


class DraftTransition:
    """Both factors of the bias, and the gate of every row.

    "table": the checkpoint's own factors. "tied": ``W1 = P e`` and ``W2 = lm_head Q`` are made once of the target's
    embedding and LM head, (V + Vd) * r values (90 MB for 152k tokens, 32k of them scored, rank 256 in bf16), whatever
    kind of layers these are, and on every tensor-parallel rank.
    """

    def __init__(self, target_model: nn.Module, head: nn.Module):
        self.target_model, self.head = target_model, head
        self.has_tied_transition = head.config.has_tied_transition
        rows = columns = None
        if self.has_tied_transition:
            like, rank = head.norm.weight, head.config.transition_rank
            rows = like.new_empty(head.config.vocab_size, rank)
            columns = like.new_empty(head.config.draft_vocab_size, rank)
        # Buffers of the head, because sleep at level 2 restores only those of what loading has allocated.
        head.register_buffer("transition_rows", rows, persistent=False)
        head.register_buffer("transition_columns", columns, persistent=False)
        self.refresh()

    @torch.inference_mode()
    def refresh(self) -> None:
        """Make the factors again, where they are: the target or the head has got other weights."""
        self._packed: Callable[[torch.Tensor], torch.Tensor] | None = None
        if not self.has_tied_transition:
            return
        head, rows, columns = self.head, self.head.transition_rows, self.head.transition_columns
        for tokens in torch.arange(len(rows), device=rows.device).split(TOKENS):
            rows[tokens] = head.token_rows(language_model(self.target_model).embed_input_ids(tokens))
        weight = head.transition_hidden.weight.T.contiguous()
        constant = self.target_model.compute_logits(torch.zeros_like(weight[:1]))
        for index in torch.arange(len(weight), device=rows.device).split(COLUMNS):
            logits = (self.target_model.compute_logits(weight[index] * SMALL) - constant) / SMALL
            logits = logits[:, : head.config.vocab_size] if head.draft_ids is None else logits[:, head.draft_ids]
            columns[:, index] = logits.T.to(columns.dtype)

    @property
    def factors(self) -> tuple:
        """Both factors of the bias, or (None, None)."""
        head = self.head
        if not head.config.transition_rank:
            return None, None
        rows = head.transition_rows if self.has_tied_transition else head.transition_in.weight
        columns = head.transition_columns if self.has_tied_transition else head.transition_out.weight
        if not ops.USE_COMPILED:
            return rows, columns
        if self._packed is None:
            self._packed = ops.fixed_linear(columns)
        return rows, self._packed

    def gate(self, hidden: torch.Tensor) -> torch.Tensor | None:
        """``hidden`` [..., H] -> [..., r], or None."""
        return self.head.gate(hidden) if self.has_tied_transition else None
