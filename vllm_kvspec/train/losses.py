# SPDX-License-Identifier: Apache-2.0
"""Losses of one drafted row against the target: p the target's distribution, q the head's."""

import torch

LOSSES = ("kl_div", "ce", "tv", "lk")


def parse_loss(loss_fn: str) -> dict[str, float]:
    """``"kl_div"`` or a mix such as ``"ce=0.1,tv=0.9"`` -> weight per loss. Raises ValueError."""
    weights = {}
    for part in loss_fn.split(","):
        name, _, weight = part.partition("=")
        try:
            weights[name.strip()] = float(weight or 1)
        except ValueError:
            weights[part] = 1.0
    if unknown := set(weights) - set(LOSSES):
        raise ValueError(
            f"loss_fn must name losses of {list(LOSSES)}, alone or as a mix such as ce=0.1,tv=0.9; got {loss_fn!r} "
            f"({', '.join(sorted(unknown))} unknown)."
        )
    return weights


def row_losses(
    draft_logits: torch.Tensor, target_logits: torch.Tensor, labels: torch.Tensor, has_label: torch.Tensor, loss_fn: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Loss of each row, fp32 [...], and which rows it is defined for, bool [...].

    Logits [..., V]; ``labels`` int64 [...]: the text's next token, where ``has_label`` bool [...]. ``loss_fn``, alone
    or as a weighted mix (``parse_loss``):

    - ``kl_div``: KL(p || q) in nats, the head learns the target's distribution;
    - ``ce``: -log q(label), it learns the text (rows without a label do not count);
    - ``tv``: 1 - sum min(p, q), the probability that rejection sampling rejects q's token (arXiv 2211.17192);
    - ``lk``: -log sum min(p, q), the logarithm of its acceptance (in the spirit of LK losses, arXiv 2602.23881).
    """
    weights = parse_loss(loss_fn)
    log_q, log_p = draft_logits.float().log_softmax(dim=-1), target_logits.float().log_softmax(dim=-1)
    total, defined = 0.0, torch.ones_like(has_label)
    if "kl_div" in weights:
        total = total + weights["kl_div"] * (log_p.exp() * (log_p - log_q)).sum(dim=-1)
    if "ce" in weights:
        total = total - weights["ce"] * log_q.gather(-1, labels[..., None])[..., 0]
        defined = has_label
    if "tv" in weights or "lk" in weights:
        accepted = torch.minimum(log_p, log_q).exp().sum(dim=-1)
        total = total + weights.get("tv", 0.0) * (1 - accepted) - weights.get("lk", 0.0) * accepted.log()
    return total, defined
