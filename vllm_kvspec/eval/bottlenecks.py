# SPDX-License-Identifier: Apache-2.0
"""Why a head that reads the target's KV falls short: KVShot's bottlenecks (arXiv 2604.26412, section 4), measured.

1. Query estimation: do the head's queries attend where the target's own queries would?
2. Sparse gradients: how much of the training signal reaches the projections of the head's own keys and values?
3. Gate starvation: does a gated head's gate let the target's KV through?
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from transformers import PreTrainedModel

from vllm_kvspec.eval.acceptance import anchor_positions
from vllm_kvspec.eval.texts import Text
from vllm_kvspec.models.draft_head import KVSpecDraftModel
from vllm_kvspec.models.drafting import draft_logits
from vllm_kvspec.models.target import view_target
from vllm_kvspec.train.data import collate
from vllm_kvspec.train.trainer import LossSettings, head_loss

# Attention probabilities are [heads, anchors * G, context]: few anchors at a time.
ANCHORS_PER_BATCH = 16
CLOSED_GATE = 0.05


def bottlenecks(head: KVSpecDraftModel, target: PreTrainedModel, texts: list[Text], temperature: float) -> dict:
    """All that applies to this kind of head, over a few ``texts`` written at ``temperature``; plain JSON."""
    found: dict = {"texts": len(texts), "temperature": temperature}
    if head.config.fusion == "direct" and head.config.context != "hidden":
        found["attention_query_error"] = attention_query_error(head, target, texts)
    found["gradient_share"] = gradient_share(head, target, texts, temperature)
    if head.config.fusion == "gated":
        found["gate"] = gate_statistics(head, target, texts)
    return found


@torch.no_grad()
def attention_query_error(head: KVSpecDraftModel, target: PreTrainedModel, texts: list[Text]) -> dict:
    """Total variation (0 to 1) between the head's attention and the target's over the same keys, by layer and depth.

    The same keys: those of target layer ``target_kv_layer_ids[i]`` at positions before ``base``. The head's
    distribution is that of layer i, block row d; the target's is its own at position ``base + d``. Both are
    renormalised over these keys. Returns, averaged over anchors and heads: ``by_layer`` [layers][G] and ``by_depth``
    [G] head by head (head h against head h; nothing in training ties the two, so a head that permutes its heads looks
    worse than it is), ``grouped`` [G] after averaging the query heads of each KV head (blind to such permutations), and
    ``stale`` [G], head by head: the target's own attention at ``base`` in place of the head's, what a perfect query of
    the anchor would give at every depth.
    """
    sums: list[torch.Tensor] = []
    for text in texts:
        ids = torch.tensor([text.input_ids], device=target.device)
        attentions = _target_attentions(target, ids, head.config.target_kv_layer_ids)
        view = view_target(target, head.config, ids)
        for base in anchor_positions(text, head.config.draft_block_size).to(ids.device).split(ANCHORS_PER_BATCH):
            positions = base[:, None] + torch.arange(head.config.draft_block_size, device=ids.device)
            with captured_attention(head, ids.shape[1]) as captured:
                draft_logits(head, target, view, ids, base, ids[0, positions])
            sums.append(_distances(head, captured, attentions, base, positions))
    total = torch.cat(sums, dim=-1).mean(dim=-1)
    by_layer, grouped, stale = total.unbind(1)
    return {
        "by_layer": by_layer.tolist(),
        "by_depth": by_layer.mean(0).tolist(),
        "grouped": grouped.mean(0).tolist(),
        "stale": stale.mean(0).tolist(),
    }


def _distances(head, captured, attentions, base, positions) -> torch.Tensor:
    """[layers, 3, G, A]: head against target, the same with grouped heads, and the target's stale query."""
    layers = []
    visible = torch.arange(attentions[0].shape[-1], device=base.device) < base[:, None, None]
    for own, attention in zip(captured, attentions, strict=True):
        wanted = attention[:, positions] * visible
        wanted = wanted / wanted.sum(-1, keepdim=True)
        group = head.config.num_attention_heads // head.config.num_key_value_heads
        drafted = own.view(wanted.shape)
        by_group = [x.unflatten(0, (-1, group)).mean(1) for x in (drafted, wanted)]
        layers.append(
            torch.stack(
                [
                    total_variation(drafted, wanted).mean(0),
                    total_variation(*by_group).mean(0),
                    total_variation(wanted[:, :, :1], wanted).mean(0),
                ]
            )
        )
    return torch.stack(layers).transpose(-1, -2)


def total_variation(p: torch.Tensor, q: torch.Tensor) -> torch.Tensor:
    """Half the L1 distance over the last dimension."""
    return (p - q).abs().sum(-1) / 2


def _target_attentions(target: PreTrainedModel, ids: torch.Tensor, layers: list[int]) -> list[torch.Tensor]:
    """The target's attention probabilities [Hq, S, S] fp32 of ``layers`` over ``ids`` [1, S]."""
    implementation = target.config._attn_implementation
    target.set_attn_implementation("eager")
    try:
        attentions = target.base_model(input_ids=ids, output_attentions=True, use_cache=False).attentions
    finally:
        target.set_attn_implementation(implementation)
    return [attentions[i][0].float() for i in layers]


@contextmanager
def captured_attention(head: KVSpecDraftModel, context_len: int) -> Iterator[list[torch.Tensor]]:
    """While open, the list fills (on exit) with each layer's attention over the context, [Hq, A, G, S] fp32.

    Renormalised over the ``context_len`` keys of the context that a row sees. Rows computed one after the other
    (autoregressive heads) are put back together.
    """
    calls: list[list[torch.Tensor]] = [[] for _ in head.layers]
    modules = [layer.self_attn for layer in head.layers]

    def wrapped(attend, found):
        def capture(q, k, v, mask):
            keys = k[0, :, None, :context_len]
            scores = q[0].unflatten(0, (len(keys), -1)).float() @ keys.float().transpose(-1, -2) * q.shape[-1] ** -0.5
            seen = mask[0, :, :, :context_len].unsqueeze(1)
            found.append(scores.masked_fill(~seen, float("-inf")).softmax(dim=-1).flatten(0, 1))
            return attend(q, k, v, mask)

        return capture

    captured: list[torch.Tensor] = []
    for module, found in zip(modules, calls, strict=True):
        module.attend = wrapped(module.attend, found)
    try:
        yield captured
    finally:
        for module in modules:
            del module.attend
    for found in calls:
        captured.append(found[0] if len(found) == 1 else torch.stack(found, dim=2))


def gradient_share(
    head: KVSpecDraftModel,
    target: PreTrainedModel,
    texts: list[Text],
    temperature: float,
    *,
    batch_size: int = 8,
    seed: int = 0,
) -> dict:
    """Share of the squared gradient norm that the projections of the head's own keys and values get.

    The training loss (default ``LossSettings``) of ``texts`` in batches, anchors drawn with ``seed``; squared norms are
    averaged over the batches. ``gradient`` and ``parameters`` are the projections' shares among all trainable
    parameters; ``*_of_layers`` among those of the transformer layers, which the size of the vocabulary leaves alone.
    """
    squared = {name: 0.0 for name, _ in head.named_parameters()}
    trainable = [parameter.requires_grad for parameter in head.parameters()]
    head.requires_grad_(True)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for first in range(0, len(texts), batch_size):
            rows = [_training_row(text, temperature) for text in texts[first : first + batch_size]]
            batch = {key: value.to(target.device) for key, value in collate(rows).items()}
            head.zero_grad()
            with torch.enable_grad():
                head_loss(head, head.config, target, batch, LossSettings()).backward()
            for name, parameter in head.named_parameters():
                if parameter.grad is not None:
                    squared[name] += parameter.grad.double().square().sum().item()
    head.zero_grad()
    for parameter, before in zip(head.parameters(), trainable, strict=True):
        parameter.requires_grad_(before)
    sizes = {name: float(parameter.numel()) for name, parameter in head.named_parameters()}
    return {
        "gradient": _kv_share(squared, ""),
        "parameters": _kv_share(sizes, ""),
        "gradient_of_layers": _kv_share(squared, "layers."),
        "parameters_of_layers": _kv_share(sizes, "layers."),
    }


def _kv_share(amounts: dict[str, float], prefix: str) -> float:
    inside = {name: amount for name, amount in amounts.items() if name.startswith(prefix)}
    projections = sum(amount for name, amount in inside.items() if name.endswith(("k_proj.weight", "v_proj.weight")))
    return projections / max(sum(inside.values()), 1e-30)


def _training_row(text: Text, temperature: float) -> dict:
    mask = [0] * text.prompt_length + [1] * (len(text.input_ids) - text.prompt_length)
    return {"input_ids": text.input_ids, "loss_mask": mask, "temperature": temperature}


@torch.no_grad()
def gate_statistics(head: KVSpecDraftModel, target: PreTrainedModel, texts: list[Text]) -> dict:
    """Mean of a gated head's gates over the drafts at all anchors, and the share of gates below 0.05."""
    count, total, closed = 0, 0.0, 0

    def read(module, inputs, output):
        nonlocal count, total, closed
        gate = torch.sigmoid(output.float())
        count, total = count + gate.numel(), total + gate.sum().item()
        closed += (gate < CLOSED_GATE).sum().item()

    gates = [module for name, module in head.named_modules() if name.endswith("fusion_gate")]
    hooks = [gate.register_forward_hook(read) for gate in gates]
    try:
        for text in texts:
            ids = torch.tensor([text.input_ids], device=target.device)
            view = view_target(target, head.config, ids)
            for base in anchor_positions(text, head.config.draft_block_size).to(ids.device).split(ANCHORS_PER_BATCH):
                path = ids[0, base[:, None] + torch.arange(head.config.draft_block_size, device=ids.device)]
                draft_logits(head, target, view, ids, base, path)
    finally:
        for hook in hooks:
            hook.remove()
    return {"mean": total / max(count, 1), "closed": closed / max(count, 1)}
