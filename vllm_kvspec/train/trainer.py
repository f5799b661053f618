# SPDX-License-Identifier: Apache-2.0
"""Distillation of a head from its frozen target, online: many random anchors per sequence, every depth of every block.

Row d of a block at ``base`` learns the target's distribution after position ``base + d``. The transition bias sees the
true token at ``base + d`` (teacher forcing), the rest of the row only what the head will have when it drafts. For
autoregressive heads that is test-time training (EAGLE-3, arXiv 2503.01840, section 3.2): the tokens of a row's input
are the text's, its hidden state is the head's own of the row before, and gradients flow through all rows.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel, Trainer

from vllm_kvspec.models.draft_head import KVSpecDraftModel, Previous
from vllm_kvspec.models.target import head_logits, row_logits, view_target
from vllm_kvspec.train.losses import row_losses
from vllm_kvspec.train.target_cache import unpack

# What the norm before the LM head is called in the models of transformers.
FINAL_NORMS = ("norm", "final_layernorm", "final_layer_norm", "ln_f")


@dataclass
class LossSettings:
    """How a batch becomes a loss. ``loss_fn``: see ``losses.row_losses``; the others: ``arguments.DataArguments``."""

    anchors_per_sequence: int = 32
    depth_decay: float = 6.0
    min_teacher_temperature: float = 1.0
    loss_fn: str = "kl_div"


def sample_anchors(loss_mask: torch.Tensor, count: int) -> torch.Tensor:
    """Positions [B, count] int64 drawn uniformly where ``loss_mask`` [B, S] bool is set, repeats possible.

    A stratified draw: one anchor in each of ``count`` equal parts of the masked tokens.
    """
    cumulative = loss_mask.long().cumsum(dim=1)
    total = cumulative[:, -1:]
    part = torch.rand(len(loss_mask), count, device=loss_mask.device) + torch.arange(count, device=loss_mask.device)
    ordinal = (part * total / count).long().clamp(max=total - 1)
    return torch.searchsorted(cumulative, ordinal + 1).clamp(max=loss_mask.shape[1] - 1)


def supervised_rows(base: torch.Tensor, block: int, loss_mask: torch.Tensor, lengths: torch.Tensor):
    """(positions, valid), both [B, A, G]: where each row of each block stands, and whether it may be learned from.

    A row counts while all tokens from the anchor to its own are the target's text, and so is the token it predicts
    (or the text ends there). Positions beyond the text are clamped into it.
    """
    last = loss_mask.shape[1] - 1
    positions = base[..., None] + torch.arange(block, device=base.device)
    rows = torch.arange(len(base), device=base.device)[:, None, None]
    clamped, following = positions.clamp(max=last), (positions + 1).clamp(max=last)
    cumulative = loss_mask.long().cumsum(dim=1)
    before = cumulative[rows, base[..., None]] - 1
    unbroken = cumulative[rows, clamped] - before == torch.arange(1, block + 1, device=base.device)
    at_end = positions + 1 >= lengths[:, None, None]
    return clamped, unbroken & (positions < lengths[:, None, None]) & (at_end | loss_mask[rows, following])


def head_loss(
    head: torch.nn.Module, config, target: PreTrainedModel, batch: dict[str, torch.Tensor], settings: LossSettings
) -> torch.Tensor:
    """Mean loss of one batch of ``data.collate``, rows weighted by exp(-depth / depth_decay). Scalar.

    ``head``: a ``KVSpecDraftModel`` (or its data-parallel wrapper) with ``config``. The target's forward runs here,
    without gradients, unless the batch brings its ``records``.
    """
    input_ids, lengths, loss_mask = batch["input_ids"], batch["lengths"], batch["loss_mask"]
    base = sample_anchors(loss_mask, settings.anchors_per_sequence)
    positions, valid = supervised_rows(base, config.draft_block_size, loss_mask, lengths)
    rows = torch.arange(len(base), device=base.device)[:, None, None]
    if "records" in batch:
        view = unpack(batch["records"], config, target, input_ids)
    else:
        view = view_target(target, config, input_ids)
    draft_ids = _draft_ids(head, config)
    with torch.no_grad():
        # The distribution that the row's text was drawn from; greedy text would make it infinitely sharp.
        temperature = batch["temperatures"].clamp(min=settings.min_teacher_temperature)
        teacher = head_logits(target, view.hidden[rows, positions], draft_ids) / temperature[:, None, None, None]
        following = (positions + 1).clamp(max=input_ids.shape[1] - 1)
        labels, in_text = input_ids[rows, following], positions + 1 < lengths[:, None, None]
        if draft_ids is not None:
            index = torch.searchsorted(draft_ids, labels).clamp(max=len(draft_ids) - 1)
            labels, in_text = index, in_text & (draft_ids[index] == labels)
    inputs = positions if config.drafting == "autoregressive" else base[..., None]
    previous = Previous(input_ids[rows, positions], view.embeds[rows, positions])
    hidden, transition = head(view, base, view.embeds[rows, inputs], previous)
    logits = row_logits(target, hidden, transition, config, draft_ids)
    losses, counted = row_losses(logits, teacher, labels, in_text, settings.loss_fn)
    depth = torch.arange(config.draft_block_size, device=base.device)
    weight = (valid & counted) * torch.exp(-depth / settings.depth_decay)
    return (weight * losses).sum() / weight.sum().clamp(min=1e-6)


def _draft_ids(head: torch.nn.Module, config) -> torch.Tensor | None:
    """The reduced draft vocabulary of a head or of what wraps it."""
    if config.draft_vocab_size == config.vocab_size:
        return None
    return getattr(head, "module", head).draft_token_ids


class KVSpecTrainer(Trainer):
    """transformers' Trainer for a head; ``target`` is the frozen causal LM the head is trained for."""

    def __init__(self, *args, target: PreTrainedModel, settings: LossSettings, **kwargs):
        super().__init__(*args, **kwargs)
        self.target = target.eval().requires_grad_(False).to(self.args.device)
        self.settings = settings
        # The loss is a mean already, whatever the number of tokens in a batch.
        self.model_accepts_loss_kwargs = False

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """Loss of one batch of ``data.collate``."""
        loss = head_loss(model, self.model.config, self.target, inputs, self.settings)
        return (loss, {}) if return_outputs else loss

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """Loss only: a head has no labels of its own."""
        with torch.no_grad():
            return self.compute_loss(model, self._prepare_inputs(inputs)).detach(), None, None


@torch.no_grad()
def init_from_target(head: KVSpecDraftModel, target: PreTrainedModel) -> None:
    """Start the final norm with the target's direction, and let both inputs of ``context_proj`` be heard.

    The norm is scaled so that a random output gives logits of standard deviation 1 at most: with SmolLM2's own it is
    4.4, and the first loss 20 nats. An embedding may be far smaller than a hidden state (SmolLM2: 0.14 and 1.9, root
    mean square), so its columns start larger by that ratio. Together, SmolLM2, 60 steps: KL 5.2 against 6.5 nats;
    the tiny target, steps 121 to 160: loss 1.26 against 1.29 (one seed each).

    Only that: layers that start as copies of the target's learn more slowly than random ones (on the tiny target, 60
    steps: KL 1.73 against 1.13 nats at the first depth), for they expect the residual stream of a deeper layer.
    """
    names = [name for name in FINAL_NORMS if hasattr(target.base_model, name)]
    if not names:
        return
    module, lm_head = getattr(target.base_model, names[0]), target.get_output_embeddings().weight.float()
    norm = norm_scale(module, head.norm.weight.to(target.device, target.dtype)).float()
    spread = (lm_head.square() @ norm.square()).mean().sqrt()
    head.norm.weight.copy_(norm / spread.clamp(min=1))
    if head.config.context == "hybrid":
        embedding = target.get_input_embeddings()
        # Gemma's are scaled as they are looked up.
        embeds = embedding.weight.float() * getattr(embedding, "embed_scale", 1.0)
        ratio = norm.square().mean().sqrt() / embeds.square().mean().sqrt()
        head.context_proj.weight[:, : head.config.hidden_size] *= ratio.clamp(min=1).to(head.device)


def norm_scale(norm: torch.nn.Module, like: torch.Tensor) -> torch.Tensor:
    """What ``norm`` multiplies each element by, [H] as ``like``: its weight, or as in Gemma one more than that."""
    alternating = torch.ones_like(like)
    # Of mean 0 and mean square 1; without a bias of the norm it would do to look at one sign.
    alternating[1::2] = -1
    return (norm(alternating) - norm(-alternating)) / 2 * alternating
