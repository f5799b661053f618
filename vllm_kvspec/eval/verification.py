# SPDX-License-Identifier: Apache-2.0
"""Rules of exact verification that the engine does not use, beside what it does: accepted tokens per verification.

A rule takes K paths that were sampled from the head's distribution q, independently of each other, and returns tokens
that are distributed as the target's p, the first of them drafted ones. Whatever it accepts is a prefix of a text drawn
from p. So along such a text the probability that a rule accepts k tokens at least, given the text, follows from p and q
on the text alone: the survival of ``acceptance``, exact, without a random number and without the target's opinion of
tokens that are not in the text. Its mean over the anchors is what the rule would accept there.

Names: P and Q are the probabilities of a prefix, p and q those of one token given the tokens before it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from transformers import PreTrainedModel

from vllm_kvspec.eval.acceptance import anchor_positions, noise_windows, text_acceptance
from vllm_kvspec.eval.texts import Text
from vllm_kvspec.models.draft_head import KVSpecDraftModel
from vllm_kvspec.models.drafting import draft_logits
from vllm_kvspec.models.target import TargetView, head_logits, view_target

# A batch of anchors holds some ten tensors [A, G, Vd] in float64, each of this many values at most: some 400 MB in all.
VALUES_PER_BATCH = 1 << 22
BISECTIONS = 40


@dataclass
class PathOdds:
    """What the rules need to know of p and q along the text, fp64.

    ``log_p``, ``log_q`` [A, G]: of the text's token at each depth. Of the tokens that the head may draft, put in
    ascending order of p / q, [A, G, Vd]: ``log_ratio`` of p / q, and ``below_p``, ``below_q``, the probabilities of
    each token and those before it. ``below`` [A, G]: the head's probability of the tokens that come before the text's.
    ``k_seq``: what K-SEQ needs for k drafts, once it has been found.
    """

    log_p: torch.Tensor
    log_q: torch.Tensor
    log_ratio: torch.Tensor
    below_p: torch.Tensor
    below_q: torch.Tensor
    below: torch.Tensor
    k_seq: dict[int, tuple[torch.Tensor, torch.Tensor]] = field(default_factory=dict)


def path_odds(
    log_p: torch.Tensor, log_q: torch.Tensor, truth: torch.Tensor, draft_ids: torch.Tensor | None = None
) -> PathOdds:
    """From log-probabilities [A, G, V] along the text ``truth`` [A, G] int64. ``log_q`` may be -inf, ``log_p`` not.

    ``draft_ids`` [Vd] int64, ascending: outside them ``log_q`` is -inf. Such tokens come last in the order, and no rule
    asks for more of them than the text's own p.
    """
    chosen_p, chosen_q = (x.gather(-1, truth.unsqueeze(-1)).squeeze(-1).double() for x in (log_p, log_q))
    entry = truth
    if draft_ids is not None:
        log_p, log_q = log_p[..., draft_ids], log_q[..., draft_ids]
        entry = torch.searchsorted(draft_ids, truth)
        entry = torch.where(chosen_q > float("-inf"), entry, -1)
    log_p, log_q = log_p.double(), log_q.double()
    log_ratio, order = (log_p - log_q).sort(dim=-1, stable=True)
    below_q = log_q.exp().gather(-1, order).cumsum(-1)
    place = (order == entry.unsqueeze(-1)).int().argmax(-1, keepdim=True)
    before = torch.where(place > 0, below_q.gather(-1, (place - 1).clamp(min=0)), 0.0).squeeze(-1)
    before = torch.where(entry < 0, below_q[..., -1], before)
    return PathOdds(chosen_p, chosen_q, log_ratio, log_p.exp().gather(-1, order).cumsum(-1), below_q, before)


def token_survival(odds: PathOdds) -> torch.Tensor:
    """[A, G]; one path, token by token: x is accepted with probability min(1, p / q) (arXiv 2211.17192)."""
    return (odds.log_q - odds.log_p).clamp(max=0).cumsum(-1).exp()


def block_survival(odds: PathOdds) -> torch.Tensor:
    """[A, G]; block verification of one path (arXiv 2403.10444).

    A prefix is accepted with a_i = min(1, a_{i-1} p / q), which is the least P_i Q_j / (Q_i P_j) over j <= i, and so,
    given the text, with the least Q_j / P_j.
    """
    return (odds.log_q - odds.log_p).cumsum(-1).cummin(-1).values.clamp(max=0).exp()


def multipath_block_survival(odds: PathOdds, drafts: int) -> torch.Tensor:
    """[A, G]; greedy multi-path block verification (arXiv 2602.16961).

    Of K paths the last in an order of all paths is verified as a block, against the distribution of being selected. The
    order is that of p / q at each node, the first token first. Its paths before a prefix have the probability B, so
    that the prefix is selected with (B + Q)^K - B^K.
    """
    prefix_q = odds.log_q.cumsum(-1)
    q = prefix_q.exp()
    parent_q = torch.cat((torch.ones_like(q[:, :1]), q[:, :-1]), dim=1)
    before = (parent_q * odds.below).cumsum(-1)
    gain = sum((before + q) ** i * before ** (drafts - 1 - i) for i in range(drafts))
    return (prefix_q + gain.log() - odds.log_p.cumsum(-1)).cummin(-1).values.clamp(max=0).exp()


def accepted_share(odds: PathOdds, factor: torch.Tensor) -> torch.Tensor:
    """Sum over the tokens of min(q, p / factor), [A, G]: how often K-SEQ accepts any one draft; ``factor`` [A, G]."""
    split = torch.searchsorted(odds.log_ratio, factor.log().unsqueeze(-1)) - 1
    low_p, low_q = (
        torch.where(split >= 0, x.gather(-1, split.clamp(min=0)), 0.0).squeeze(-1) for x in (odds.below_p, odds.below_q)
    )
    return (odds.below_q[..., -1] - low_q) + low_p / factor


def k_seq_factor(odds: PathOdds, drafts: int) -> torch.Tensor:
    """K-SEQ's rho [A, G]: where what ``drafts`` drafts accept in all equals rho times what one accepts; 1 to K."""
    low = torch.ones_like(odds.log_p)
    high = low * drafts
    for _ in range(BISECTIONS if drafts > 1 else 0):
        middle = (low + high) / 2
        share = accepted_share(odds, middle)
        more = 1 - (1 - share) ** drafts > middle * share
        low, high = torch.where(more, middle, low), torch.where(more, high, middle)
    return low


def k_seq_survival(odds: PathOdds, drafts: int) -> torch.Tensor:
    """[A, G]; SpecTr's K-SEQ (arXiv 2310.15141), token by token among the paths that agree so far.

    Of k such paths the first whose token passes with probability min(1, p / (rho q)) is followed, with all that have
    the same token. Given the text this is a chain over the number of paths left, ``left`` [A, drafts + 1].
    """
    p, q = odds.log_p.exp(), odds.log_q.exp()
    left = torch.zeros(len(p), drafts + 1, dtype=p.dtype, device=p.device)
    left[:, drafts] = 1
    for k in range(1, drafts + 1):
        if k not in odds.k_seq:
            factor = k_seq_factor(odds, k)
            odds.k_seq[k] = factor, accepted_share(odds, factor)
    survival = []
    for depth in range(p.shape[1]):
        here, following = (p[:, depth], q[:, depth]), torch.zeros_like(left)
        for k in range(1, drafts + 1):
            factor, share = odds.k_seq[k]
            step = _agreeing(*here, factor[:, depth], share[:, depth], k)
            following[:, : k + 1] += left[:, k : k + 1] * step
        left = following
        survival.append(left.sum(-1))
    return torch.stack(survival, dim=1).clamp(max=1)


def _agreeing(p, q, factor, share, drafts: int) -> torch.Tensor:
    """[A, drafts + 1]: probability, given that the text goes on with this token, that it is accepted and that so many
    of the drafts have it."""
    passes = torch.where(q > 0, (p / (factor * q)).clamp(max=1), 0.0)
    waiting = torch.zeros(len(p), drafts + 1, dtype=p.dtype, device=p.device)
    accepted = torch.zeros_like(waiting)
    waiting[:, 0] = 1
    q, passes = q[:, None], passes[:, None]
    others = (1 - share[:, None] - q * (1 - passes)).clamp(min=0)
    for _ in range(drafts):
        once_more = torch.nn.functional.pad(waiting, (1, 0))[:, :-1]
        accepted = accepted * (1 - q) + torch.nn.functional.pad(accepted, (1, 0))[:, :-1] * q + once_more * q * passes
        waiting = waiting * others + once_more * q * (1 - passes)
    return accepted / p[:, None]


def claimed_survival(odds: PathOdds, drafts: int) -> torch.Tensor:
    """[A, G]; what SpecTr-GBV (arXiv 2604.25925) is said to accept: 1 - (1 - min(1, Q / P))^K.

    A claim, not a rule that runs here: for one path it is more than block verification, which is optimal; the
    difference must be paid back in later verifications.
    """
    ratio = (odds.log_q - odds.log_p).cumsum(-1).clamp(max=0).exp()
    return 1 - (1 - ratio) ** drafts


def bound_survival(odds: PathOdds, drafts: int) -> torch.Tensor:
    """[A, G]; more no rule accepts of independent paths: one of them must have the prefix, and the text too."""
    drafted = -torch.expm1(drafts * torch.log1p(-odds.log_q.cumsum(-1).exp().clamp(max=1)))
    return (drafted.log() - odds.log_p.cumsum(-1)).clamp(max=0).exp()


def optimal_first(odds: PathOdds, drafts: int) -> torch.Tensor:
    """[A]; the most that any rule accepts of the first tokens of K independent drafts (arXiv 2502.18779).

    1 + min over sets H of p(H) - q(H)^K; the least is a set of the first tokens in the order of p / q.
    """
    return 1 + (odds.below_p[:, 0] - odds.below_q[:, 0] ** drafts).amin(-1).clamp(max=0)


def first_tokens(
    log_p: torch.Tensor, log_q: torch.Tensor, noise: torch.Tensor, truth: torch.Tensor, width: int
) -> dict[str, torch.Tensor]:
    """How often one of ``width`` first tokens is accepted, [A, 1] fp64 each, by how they are chosen.

    ``log_p``, ``log_q`` and ``noise`` (standard Gumbel, with which the target draws ``truth`` [A]) [A, V]. "best": the
    head's best tokens. "best, one sampled": the last of them drawn from the rest (2502.18779's greedy draft set).
    "coupled": the best under the noise.
    """
    p, q = log_p.double().exp(), log_q.double().exp()
    best = log_q.topk(width, dim=-1).indices
    rest = q.scatter(-1, best[:, : width - 1], 0.0)
    sampled = torch.minimum(p, rest / rest.sum(-1, keepdim=True)).scatter(-1, best[:, : width - 1], 0.0)
    coupled = (log_q + noise).topk(width, dim=-1).indices
    found = {
        "best": p.gather(-1, best).sum(-1),
        "best, one sampled": p.gather(-1, best[:, : width - 1]).sum(-1) + sampled.sum(-1),
        "coupled": (coupled == truth[:, None]).any(-1).double(),
    }
    return {name: accepted[:, None] for name, accepted in found.items()}


SINGLE: dict[str, Callable] = {"token": token_survival, "block": block_survival}
MULTI: dict[str, Callable] = {
    "k-seq": k_seq_survival,
    "multi-path block": multipath_block_survival,
    "spectr-gbv, claimed": claimed_survival,
    "bound": bound_survival,
}
WALKS = {"walk": False, "walk, coupled": True}


@torch.no_grad()
def rule_survival(
    head: KVSpecDraftModel, target: PreTrainedModel, text: Text, drafts: list[int], *, temperature: float,
    view: TargetView | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Survival [P, G] fp64 of every rule at every anchor of one text: "token", "block", "k-seq 2", ...

    Also [P, 1], for the first token alone: "first: optimum 2" and those of ``first_tokens``, "first: best 2", ...
    ``view``: of the text, if there is one already.
    """
    config, device = head.config, target.device
    ids = torch.tensor([text.input_ids], device=device)
    view = view or view_target(target, config, ids)
    offsets = torch.arange(config.draft_block_size, device=device)
    base_positions = anchor_positions(text, config.draft_block_size).to(device)
    size = max(1, VALUES_PER_BATCH // (len(offsets) * config.draft_vocab_size))
    found: dict[str, list[torch.Tensor]] = {}
    for base in base_positions.split(size):
        positions = base[:, None] + offsets
        log_q = (draft_logits(head, target, view, ids, base, ids[0, positions]).float() / temperature).log_softmax(-1)
        # Neighbours share most of their positions.
        span = torch.arange(int(base[0]), int(base[-1]) + len(offsets), device=device)
        log_p = (head_logits(target, view.hidden[0, span]).float() / temperature).log_softmax(-1)[positions - base[0]]
        truth = ids[0, positions + 1]
        odds = path_odds(log_p, log_q, truth, head.draft_token_ids)
        noise = noise_windows(text.seed, temperature, base, 1, config.vocab_size)[:, 0] / temperature
        parts = {name: rule(odds) for name, rule in SINGLE.items()}
        parts |= {f"{name} {k}": rule(odds, k) for name, rule in MULTI.items() for k in drafts}
        for k in (1, *drafts):
            parts[f"first: optimum {k}"] = optimal_first(odds, k)[:, None]
            first = first_tokens(log_p[:, 0], log_q[:, 0], noise, truth[:, 0], k)
            parts |= {f"first: {name} {k}": accepted for name, accepted in first.items()}
        for name, part in parts.items():
            found.setdefault(name, []).append(part.cpu())
    return {name: torch.cat(parts) for name, parts in found.items()}


def walk_survival(
    head: KVSpecDraftModel, target: PreTrainedModel, text: Text, nodes: list[int], *, temperature: float,
    view: TargetView | None = None,
) -> dict[str, torch.Tensor]:  # fmt: skip
    """Survival [P, G] fp64 of the engine's rule: "walk 16" over the best 16 nodes, "walk, coupled 16" under the noise,
    "walk, chain" and "walk, coupled, chain" along a block. ``view``: of the text, if there is one already."""
    depths = torch.arange(head.config.draft_block_size)
    found = {}
    for name, coupled in WALKS.items():
        accepted = text_acceptance(head, target, text, nodes, temperature=temperature, coupled=coupled, view=view)
        accepted = {f"{name} {n}": accepted[str(n)] for n in nodes} | {f"{name}, chain": accepted["chain"]}
        found |= {key: (value[:, None] > depths).double() for key, value in accepted.items()}
    return found
