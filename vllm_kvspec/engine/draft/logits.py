# SPDX-License-Identifier: Apache-2.0
"""The target's LM head over the head's vocabulary."""

import torch
from torch import nn
from torch.nn.functional import linear
from vllm.distributed import get_tensor_model_parallel_world_size
from vllm.logger import init_logger

from vllm_kvspec.engine import ops

logger = init_logger("vllm.kvspec.draft_logits")

# Hidden states of the comparison in ``lm_head_rows``: large, so that a cap on the logits shows.
PROBE_SCALE = 50.0
PROBE_TOLERANCE = 0.02


class DraftLogits:
    """Logits over the whole vocabulary, or over the part that the head was trained on.

    For a part, the rows of an unquantised LM head are copied once: draft_vocab_size * hidden_size values, 256 MiB for
    32k tokens of a model of size 4096 in bf16. Where that is not possible (tensor parallel, quantised, capped or
    scaled logits) all logits are computed and the part is taken from them.
    """

    def __init__(self, target_model: nn.Module, head: nn.Module):
        self.target_model = target_model
        self.vocab_size = head.config.vocab_size
        self.draft_ids = head.draft_ids
        rows = None
        if self.draft_ids is not None:
            rows = lm_head_rows(target_model, self.draft_ids, dtype=head.norm.weight.dtype)
        # A buffer of the head, because sleep at level 2 restores only those of what loading has allocated.
        head.register_buffer("lm_head_rows", rows, persistent=False)
        self.rows = rows
        self.project = None if rows is None else ops.fixed_linear(rows)

    def refresh(self) -> None:
        """Copy the rows again, to where they are: the target has got other weights."""
        if self.rows is not None:
            torch.index_select(lm_head_weight(self.target_model), 0, self.draft_ids, out=self.rows)
            self.project = ops.fixed_linear(self.rows)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` [n, H] -> logits [n, V], or [n, Vd]."""
        if self.project is not None:
            return self.project(hidden)
        logits = self.target_model.compute_logits(hidden)
        return logits[:, : self.vocab_size] if self.draft_ids is None else logits.index_select(1, self.draft_ids)


def language_model(target_model: nn.Module) -> nn.Module:
    """The part of the target that has the text's embedding, layers and LM head."""
    return getattr(target_model, "get_language_model", lambda: target_model)()


def lm_head_weight(target_model: nn.Module) -> torch.Tensor | None:
    """The LM head's weight, [V, H] unless it is quantised; None if there is none by this name."""
    return getattr(getattr(language_model(target_model), "lm_head", None), "weight", None)


def lm_head_rows(target_model: nn.Module, token_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Rows of the target's LM head [Vd, H], or None unless their product with hidden states gives the target's logits.

    Compares both on a few random hidden states, so no kind of LM head has to be known here.
    """
    weight = lm_head_weight(target_model)
    is_plain = torch.is_tensor(weight) and weight.dim() == 2 and weight.dtype == dtype
    if not is_plain or get_tensor_model_parallel_world_size() > 1:
        return None
    rows = weight.detach().index_select(0, token_ids)
    generator = torch.Generator(rows.device).manual_seed(0)
    probe = PROBE_SCALE * torch.randn(4, rows.shape[1], generator=generator, device=rows.device).to(dtype)
    expected = target_model.compute_logits(probe).index_select(1, token_ids).float()
    difference = (linear(probe, rows).float() - expected).abs().max()
    if difference <= PROBE_TOLERANCE * expected.abs().max():
        return rows
    logger.info("kvspec computes all logits for a reduced draft vocabulary: the target's are not a plain product.")
    return None
