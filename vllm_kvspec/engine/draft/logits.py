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

    def __init__(self, target_model: nn.Module, vocab_size: int, draft_ids: torch.Tensor | None, dtype: torch.dtype):
        """``dtype``: of the hidden states."""
        self.target_model = target_model
        self.vocab_size = vocab_size
        self.draft_ids = draft_ids
        rows = None if draft_ids is None else lm_head_rows(target_model, draft_ids, dtype)
        self.project = None if rows is None else ops.fixed_linear(rows)

    def __call__(self, hidden: torch.Tensor) -> torch.Tensor:
        """``hidden`` [n, H] -> logits [n, V], or [n, Vd]."""
        if self.project is not None:
            return self.project(hidden)
        logits = self.target_model.compute_logits(hidden)
        return logits[:, : self.vocab_size] if self.draft_ids is None else logits.index_select(1, self.draft_ids)


def lm_head_rows(target_model: nn.Module, token_ids: torch.Tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """Rows of the target's LM head [Vd, H], or None unless their product with hidden states gives the target's logits.

    Compares both on a few random hidden states, so no kind of LM head has to be known here.
    """
    language_model = getattr(target_model, "get_language_model", lambda: target_model)()
    weight = getattr(getattr(language_model, "lm_head", None), "weight", None)
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
