# SPDX-License-Identifier: Apache-2.0
"""Torch twin of ``tree_candidates``: a head's logits to the candidates of a tree, level by level.

Every level has a fixed number of parents and of children per parent, so an expansion never waits for the device and
fits in a CUDA graph. Words beside those of ``reference``: Vd = entries of the head's vocabulary, P = parents of a
level, K = parents of the next one, M = candidates of all levels.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch

from vllm_kvspec.kernels.reference import gumbel_noise_at


class Level(NamedTuple):
    """Shape of one level of the expansion.

    ``slots`` says which candidates are the next level's parents: None for the ``num_next`` best by score (equal scores
    by index), or int32 [num_parents * width] on the device with each candidate's place among them, -1 for none.
    """

    num_parents: int
    width: int
    num_next: int
    slots: torch.Tensor | None = None


class Parents(NamedTuple):
    """The nodes that a level expands: token int64, cumulative score fp32, candidate index int32 (-1: root); [B, P]."""

    token: torch.Tensor
    score: torch.Tensor
    index: torch.Tensor


class Candidates(NamedTuple):
    """score fp32 (cumulative log-probability), token int64, parent int32 (candidate index, -1: root); [B, M] each."""

    score: torch.Tensor
    token: torch.Tensor
    parent: torch.Tensor


def plan_levels(block_size: int, beam: int, width: int, num_nodes: int | None = None) -> list[Level]:
    """Levels in which the best ``beam`` nodes of a level get ``width`` children each.

    ``num_nodes``: how many the tree will have at most. It then has the same nodes from fewer candidates: a parent at
    depth d that keeps a child has d - 1 ancestors, and whatever ranks above it at its depth is kept as well, so only
    the best ``num_nodes - d`` of a depth can be parents.
    """
    levels, size = [], 1
    for depth in range(block_size):
        num_next = min(beam, size * width) if depth + 1 < block_size else 0
        if num_nodes is not None:
            num_next = max(0, min(num_next, num_nodes - depth - 1))
        levels.append(Level(size, width, num_next))
        size = num_next
        if size == 0:
            break
    return levels


class RankingScales(NamedTuple):
    """What the scores of a drafter are divided by, constants of it: ``greedy`` at temperature 0, ``coupled`` above it,
    with the target's noise added. See ``ranking_scale``."""

    greedy: float
    coupled: float

    @classmethod
    def of(cls, config: Any) -> "RankingScales":
        """Those that a drafter's config says."""
        return cls(config.greedy_scale, config.coupled_scale)


def ranking_scale(temperature: torch.Tensor, coupled: bool, scales: RankingScales) -> torch.Tensor:
    """Divisor [B] fp32 of the scores of requests with ``temperature`` [B].

    Scores must be beliefs about the token that the target will pick, or the tree spends its nodes badly. Sampling picks
    from softmax(l / T), as far as anyone knows who does not know the noise. With it known, the token is the best of l +
    noise, and in greedy decoding the best of l: what is left to doubt is the drafter's l, and the surer that is, the
    smaller its divisor.
    """
    sampled = torch.full_like(temperature, scales.coupled) if coupled else temperature
    return torch.where(temperature > 0, sampled, scales.greedy)


def root_parents(anchor: torch.Tensor) -> Parents:
    """The root alone, of ``anchor`` int64 [B]."""
    token = anchor.contiguous().unsqueeze(1)
    return Parents(token, torch.zeros_like(token, dtype=torch.float32), torch.full_like(token, -1, dtype=torch.int32))


def empty_candidates(batch: int, levels: Sequence[Level], device: torch.device) -> Candidates:
    """Room for the candidates of all ``levels``, to be written by ``tree_level``."""
    shape = (batch, sum(level.num_parents * level.width for level in levels))
    dtypes = (torch.float32, torch.int64, torch.int32)
    return Candidates(*(torch.empty(shape, dtype=dtype, device=device) for dtype in dtypes))


def expand(
    tree_level: Callable[..., Parents | None],
    depth_logits: torch.Tensor,
    anchor: torch.Tensor,
    transition_in: torch.Tensor | None,
    transition_out: torch.Tensor | None,
    *,
    levels: Sequence[Level],
    gate: torch.Tensor | None = None,
    **options,
) -> Candidates:
    """Expand logits [B, G, Vd] that all nodes of a depth share, one ``tree_level`` call per level."""
    if len(levels) > depth_logits.shape[1]:
        raise ValueError(
            f"A tree must not be deeper than the head's block ({depth_logits.shape[1]}), got {len(levels)} levels; use "
            "a shallower tree."
        )
    candidates = empty_candidates(anchor.shape[0], levels, anchor.device)
    parents, offset = root_parents(anchor), 0
    for depth, level in enumerate(levels):
        logits = depth_logits[:, depth, None].expand(-1, level.num_parents, -1)
        here = None if gate is None else gate[:, depth, None].expand(-1, level.num_parents, -1)
        parents = tree_level(
            logits, parents, transition_in, transition_out,
            level=level, depth=depth, gate=here, candidates=candidates, offset=offset, **options,
        )  # fmt: skip
        offset += level.num_parents * level.width
    return candidates


def tree_candidates(
    depth_logits: torch.Tensor,
    anchor: torch.Tensor,
    transition_in: torch.Tensor | None,
    transition_out: torch.Tensor | None,
    *,
    levels: Sequence[Level],
    base: torch.Tensor,
    idx_mapping: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    coupled: bool,
    scales: RankingScales,
    chain: torch.Tensor | None = None,
    draft_ids: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> Candidates:
    """Candidates of a tree per request from one pass of a head: see ``tree_level`` for what happens at each depth.

    Args:
        depth_logits: ``[B, G, Vd]``, any float dtype; row d scores the token at position ``base + d + 1``.
        anchor: int64 ``[B]``, the root's token.
        transition_in: ``[V, r]``, or None for a head without transition bias.
        transition_out: ``[Vd, r]``, or None.
        levels: at most G of them, from ``plan_levels`` or a fixed shape.
        base: int ``[B]``, the anchor's position.
        idx_mapping: int ``[B]``.
        temperature: fp32 ``[R]``.
        seeds: int64 ``[R]``.
        coupled: rank under the noise the target will sample with.
        scales: see ``ranking_scale``.
        chain: int or bool ``[R]``, nonzero for requests that want a chain: all but the first candidate of a level get
            score -inf.
        draft_ids: int64 ``[Vd]``, target token of each entry of the head's vocabulary; None when they are equal.
        gate: ``[B, G, r]``, what rows of ``transition_in`` are multiplied by at each depth, in their dtype; or None.

    Returns:
        Candidates in level order, within a level by parent, children of one parent by score.

    Raises:
        ValueError: more levels than rows.
    """
    depths = torch.arange(len(levels), device=base.device)
    noise = _noise(base, depths, idx_mapping, temperature, seeds, coupled, draft_ids, depth_logits.shape[-1])
    return expand_tree(
        depth_logits, anchor, transition_in, transition_out, noise,
        ranking_scale(temperature[idx_mapping], coupled, scales),
        levels=levels, chain=None if chain is None else chain[idx_mapping] != 0, draft_ids=draft_ids, gate=gate,
    )  # fmt: skip


def expand_tree(
    depth_logits: torch.Tensor,
    anchor: torch.Tensor,
    transition_in: torch.Tensor | None,
    transition_out: torch.Tensor | None,
    noise: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    levels: Sequence[Level],
    chain: torch.Tensor | None = None,
    draft_ids: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> Candidates:
    """``tree_candidates`` with ``noise`` [B, G, Vd], ``scale`` [B] (None: none, 1) and ``chain`` bool [B] given."""

    def given_level(logits, parents, *transition, depth, **options):
        here = None if noise is None else noise[:, depth, None]
        return expand_level(logits, parents, *transition, here, scale, **options)

    return expand(
        given_level, depth_logits, anchor, transition_in, transition_out,
        levels=levels, chain=chain, draft_ids=draft_ids, gate=gate,
    )  # fmt: skip


def _noise(base, depths, idx_mapping, temperature, seeds, coupled, draft_ids, num_entries) -> torch.Tensor | None:
    """fp32 [B, len(depths), num_entries], or None when no request is to have any. With tokens for every row
    (``draft_ids`` [B, P, Vd]) there is a depth for each."""
    if not coupled or not temperature[idx_mapping].any():
        return None
    tokens = torch.arange(num_entries, device=base.device) if draft_ids is None else draft_ids
    return gumbel_noise_at(seeds, temperature, base.long()[:, None] + depths, idx_mapping, tokens)


def tree_level(
    logits: torch.Tensor,
    parents: Parents,
    transition_in: torch.Tensor | None,
    transition_out: torch.Tensor | None,
    *,
    level: Level,
    depth: int,
    base: torch.Tensor,
    idx_mapping: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    coupled: bool,
    scales: RankingScales,
    chain: torch.Tensor | None = None,
    draft_ids: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    candidates: Candidates,
    offset: int,
) -> Parents | None:
    """Write the candidates of one level and return the next level's parents (None when ``level.num_next`` is 0).

    A child v of a parent gets the parent's score plus the log-softmax over v of ``(logits[v] + (transition_in[parent
    token] * gate) . transition_out[v] + noise[v]) / scale``; each parent keeps its ``level.width`` best.
    With ``coupled`` and a temperature above 0, noise is the temperature times the Gumbel noise that the target will
    draw at position ``base + depth`` for the child's target token (see ``gumbel_noise``). For scale see
    ``ranking_scale``. Of children with equal scores the one with the lowest entry comes first in the kernel; the twin
    leaves it to torch.

    Args:
        logits: ``[B, P, Vd]`` per parent; stride 0 over P when all parents of a request share them.
        draft_ids: as in ``tree_candidates``, or int64 ``[B, P, Vd]``, different tokens for the entries of every parent;
            then without transition bias.
        parents: P of them.
        depth: of the parents, 0 for the root.
        gate: ``[B, P, r]`` per parent, or None for 1; stride 0 over P when all parents of a request share it.
        candidates: written at ``[:, offset : offset + P * width]``.
        others: as in ``tree_candidates``.

    Scores of entries with logit -inf are -inf, their tokens any valid ones. Logits must not be NaN or +inf.
    """
    per_row = draft_ids is not None and draft_ids.dim() == 3
    depths = torch.full((logits.shape[1] if per_row else 1,), depth, device=base.device)
    noise = _noise(base, depths, idx_mapping, temperature, seeds, coupled, draft_ids, logits.shape[-1])
    return expand_level(
        logits, parents, transition_in, transition_out, noise,
        ranking_scale(temperature[idx_mapping], coupled, scales),
        level=level, chain=None if chain is None else chain[idx_mapping] != 0, draft_ids=draft_ids, gate=gate,
        candidates=candidates, offset=offset,
    )  # fmt: skip


def expand_level(
    logits: torch.Tensor,
    parents: Parents,
    transition_in: torch.Tensor | None,
    transition_out: torch.Tensor | None,
    noise: torch.Tensor | None,
    scale: torch.Tensor | None,
    *,
    level: Level,
    chain: torch.Tensor | None = None,
    draft_ids: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    candidates: Candidates,
    offset: int,
) -> Parents | None:
    """``tree_level`` with ``noise`` [B, 1 or P, Vd], ``scale`` [B] (None: none, 1) and ``chain`` bool [B] given."""
    if transition_in is None:
        scores = logits.float()
    else:
        rows = transition_in[parents.token]
        rows = rows if gate is None else rows * gate
        scores = (rows @ transition_out.T).float() + logits
    if noise is not None:
        scores = scores + noise
    if scale is not None:
        scores = scores / scale.view(-1, 1, 1)
    log_prob, entry = scores.log_softmax(dim=-1).topk(level.width, dim=-1)
    # Without any finite score they are NaN, which sorts first.
    log_prob = log_prob.masked_fill(log_prob.isnan(), float("-inf"))
    if draft_ids is not None and draft_ids.dim() == 3:
        entry, draft_ids = draft_ids.gather(2, entry), None
    return place_children(
        log_prob, entry, parents, level=level, chain=chain, draft_ids=draft_ids, candidates=candidates, offset=offset
    )


def place_children(
    log_prob: torch.Tensor,
    entry: torch.Tensor,
    parents: Parents,
    *,
    level: Level,
    chain: torch.Tensor | None,
    draft_ids: torch.Tensor | None,
    candidates: Candidates,
    offset: int,
) -> Parents | None:
    """Write a level's candidates from each parent's best children, log_prob fp32 and entry int64 [B, P, width]; return
    the next level's parents."""
    score = (parents.score.unsqueeze(-1) + log_prob).flatten(1)
    token = (entry if draft_ids is None else draft_ids[entry]).flatten(1)
    if chain is not None:
        off_chain = chain.unsqueeze(1) & (torch.arange(score.shape[1], device=score.device) > 0)
        score = score.masked_fill(off_chain, float("-inf"))
    here = slice(offset, offset + score.shape[1])
    candidates.score[:, here], candidates.token[:, here] = score, token
    candidates.parent[:, here] = parents.index.repeat_interleave(level.width, dim=1)
    if level.num_next == 0:
        return None
    if level.slots is None:
        chosen = score.argsort(dim=-1, descending=True, stable=True)[:, : level.num_next]
    else:
        # Sorting the places puts -1 first and the next parents last, in order.
        chosen = level.slots.argsort()[-level.num_next :].expand(score.shape[0], -1)
    return Parents(token.gather(1, chosen), score.gather(1, chosen), (chosen + offset).int())
