# SPDX-License-Identifier: Apache-2.0
"""The candidates of a tree on CPU: ``tree_candidates`` and ``tree_level``, compiled.

The twin's softmax and top-k each go over all scores of a level several times. Here one pass makes the scores of a
parent and the maximum of every tile, one sums their exponentials, and only tiles that can hold a child are searched.
"""

from collections.abc import Sequence

import numpy as np
import torch

from vllm_kvspec.engine.cpu.kernels.attention import exp
from vllm_kvspec.engine.cpu.kernels.compiled import F32, I32, I64, INT, compiled, flat
from vllm_kvspec.engine.cpu.kernels.gumbel import gumbel_noise_at
from vllm_kvspec.engine.cpu.kernels.linear import PackedLinear
from vllm_kvspec.kernels import reference_candidates as reference

TILE = 256
_F = np.float32
# No "ninf": a masked token has logit -inf.
_FAST = {"reassoc", "contract", "arcp", "nsz", "nnan"}


@compiled(F32, INT, INT, F32, INT, F32, INT, F32, INT, INT, INT, INT, F32, I64, fastmath=_FAST)
def _best_children(
    logits, stride_b, stride_p, bias, has_bias, noise, has_noise, scale, num_reqs, num_parents, vocab_size, width,
    out_score, out_entry,
):  # fmt: skip
    """The ``width`` best entries of softmax((logits + bias + noise) / scale) for every parent of every request."""
    scores = np.empty(vocab_size, np.float32)
    num_tiles = (vocab_size + TILE - 1) // TILE
    tile_best = np.empty(num_tiles, np.float32)
    for b in range(num_reqs):
        for p in range(num_parents):
            row = b * num_parents + p
            start = b * stride_b + p * stride_p
            logit = logits[start : start + vocab_size]
            for t in range(num_tiles):
                n = min(TILE, vocab_size - t * TILE)
                tile = scores[t * TILE : t * TILE + n]
                part = logit[t * TILE : t * TILE + n]
                for i in range(n):
                    tile[i] = part[i]
                if has_bias:
                    part = bias[row * vocab_size + t * TILE : row * vocab_size + t * TILE + n]
                    for i in range(n):
                        tile[i] += part[i]
                if has_noise:
                    part = noise[b * vocab_size + t * TILE : b * vocab_size + t * TILE + n]
                    for i in range(n):
                        tile[i] += part[i]
                best = _F(-np.inf)
                for i in range(n):
                    tile[i] /= scale[b]
                    best = max(best, tile[i])
                tile_best[t] = best
            top = tile_best[0]
            for t in range(num_tiles):
                top = max(top, tile_best[t])
            total = _F(0)
            if top > -np.inf:
                for i in range(vocab_size):
                    total += exp(scores[i] - top)
            children = out_score[row * width : (row + 1) * width]
            entries = out_entry[row * width : (row + 1) * width]
            children[:] = -np.inf
            for k in range(width):
                entries[k] = k
            for t in range(num_tiles):
                if tile_best[t] <= children[width - 1]:
                    continue
                for i in range(t * TILE, min(vocab_size, (t + 1) * TILE)):
                    if scores[i] <= children[width - 1]:
                        continue
                    k = width - 1
                    while k > 0 and scores[i] > children[k - 1]:
                        children[k], entries[k] = children[k - 1], entries[k - 1]
                        k -= 1
                    children[k], entries[k] = scores[i], i
            for k in range(width):
                if children[k] > -np.inf:
                    children[k] -= top + np.log(total)


@compiled(F32, I64, F32, I32, INT, INT, INT, I64, INT, I64, INT, F32, I64, I32, INT, I64, F32, I32, INT)
def _place_children(
    log_prob, entry, parent_score, parent_index, num_reqs, num_parents, width, draft_ids, has_draft_ids, chain,
    has_chain, score, token, parent, stride, next_token, next_score, next_index, num_next,
):  # fmt: skip
    """``reference_candidates.place_children``; ``score``, ``token`` and ``parent`` begin at the level's first
    candidate, which is ``next_index[0]``."""
    count = num_parents * width
    offset = next_index[0]
    for b in range(num_reqs):
        scores = score[b * stride : b * stride + count]
        tokens = token[b * stride : b * stride + count]
        for i in range(count):
            above = b * num_parents + i // width
            on_path = i == 0 or not (has_chain and chain[b] != 0)
            scores[i] = parent_score[above] + log_prob[b * count + i] if on_path else _F(-np.inf)
            child = entry[b * count + i]
            tokens[i] = draft_ids[child] if has_draft_ids else child
            parent[b * stride + i] = parent_index[above]
        taken = np.zeros(count, np.bool_)
        for k in range(num_next):
            best = -1
            for i in range(count):
                if not taken[i] and (best < 0 or scores[i] > scores[best]):
                    best = i
            taken[best] = True
            next_token[b * num_next + k] = tokens[best]
            next_score[b * num_next + k] = scores[best]
            next_index[b * num_next + k] = best + offset


def _expand_level(
    logits: torch.Tensor,
    parents: reference.Parents,
    transition_in: torch.Tensor | None,
    transition_out: PackedLinear | torch.Tensor | None,
    noise: torch.Tensor | None,
    scale: torch.Tensor,
    *,
    level: reference.Level,
    chain: torch.Tensor | None,
    draft_ids: torch.Tensor | None,
    gate: torch.Tensor | None,
    candidates: reference.Candidates,
    offset: int,
) -> reference.Parents | None:
    """``reference_candidates.expand_level``: ``noise`` [B, Vd], ``scale`` [B] and ``chain`` int64 [B] are given."""
    batch, num_parents, vocab_size = logits.shape
    if logits.dtype != torch.float32:
        logits = logits.float()
    bias = None
    if transition_in is not None:
        rows = transition_in[parents.token]
        rows = (rows if gate is None else rows * gate).flatten(0, 1)
        product = rows @ transition_out.T if torch.is_tensor(transition_out) else transition_out(rows)
        bias = product.float().contiguous()
    score = torch.empty(batch, num_parents, level.width)
    entry = torch.empty(batch, num_parents, level.width, dtype=torch.int64)
    _best_children(
        flat(logits), logits.stride(0), logits.stride(1), _or(bias, logits), bias is not None, _or(noise, logits),
        noise is not None, flat(scale), batch, num_parents, vocab_size, level.width, flat(score), flat(entry),
    )  # fmt: skip
    if level.slots is not None:
        return reference.place_children(
            score, entry, parents, level=level, chain=None if chain is None else chain != 0, draft_ids=draft_ids,
            candidates=candidates, offset=offset,
        )  # fmt: skip
    following = reference.Parents(
        torch.empty(batch, level.num_next, dtype=torch.int64),
        torch.empty(batch, level.num_next),
        torch.full((batch, max(1, level.num_next)), offset, dtype=torch.int32),
    )
    _place_children(
        flat(score), flat(entry), flat(parents.score.contiguous()), flat(parents.index.contiguous()), batch,
        num_parents, level.width, _or(draft_ids, entry), draft_ids is not None, _or(chain, entry), chain is not None,
        *(flat(column[:, offset:]) for column in candidates), candidates.score.stride(0),
        *(flat(column) for column in following), level.num_next,
    )  # fmt: skip
    return following if level.num_next else None


def _or(tensor: torch.Tensor | None, stand_in: torch.Tensor) -> np.ndarray:
    """Compiled code takes an array where there is none, and does not read it."""
    return flat(stand_in if tensor is None else tensor)


def _given(base, depths, idx_mapping, temperature, seeds, coupled, scales, chain, draft_ids, vocab_size):
    """What does not change from level to level: noise [B, len(depths), Vd] or None, scale [B], chain int64 [B]."""
    temperatures, noise = temperature[idx_mapping], None
    if coupled and temperatures.any():
        tokens = torch.arange(vocab_size) if draft_ids is None else draft_ids
        noise = gumbel_noise_at(seeds, temperature, base.long()[:, None] + depths, idx_mapping, tokens)
    scale = reference.ranking_scale(temperatures, coupled, scales)
    return noise, scale, None if chain is None else chain[idx_mapping].long()


def tree_level(
    logits: torch.Tensor,
    parents: reference.Parents,
    transition_in: torch.Tensor | None,
    transition_out: PackedLinear | torch.Tensor | None,
    *,
    level: reference.Level,
    depth: int,
    base: torch.Tensor,
    idx_mapping: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    coupled: bool,
    scales: reference.RankingScales,
    chain: torch.Tensor | None = None,
    draft_ids: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
    candidates: reference.Candidates,
    offset: int,
) -> reference.Parents | None:
    """``reference_candidates.tree_level``, also with a packed ``transition_out``. Parents with tokens of their own, a
    small part of the vocabulary, take the twin."""
    if draft_ids is not None and draft_ids.dim() == 3:
        return reference.tree_level(
            logits, parents, transition_in, transition_out, level=level, depth=depth, base=base,
            idx_mapping=idx_mapping, temperature=temperature, seeds=seeds, coupled=coupled, scales=scales,
            chain=chain, draft_ids=draft_ids, candidates=candidates, offset=offset,
        )  # fmt: skip
    noise, scale, chains = _given(
        base, torch.tensor([depth]), idx_mapping, temperature, seeds, coupled, scales, chain, draft_ids,
        logits.shape[-1],
    )  # fmt: skip
    return _expand_level(
        logits, parents, transition_in, transition_out, None if noise is None else noise[:, 0].contiguous(), scale,
        level=level, chain=chains, draft_ids=draft_ids, gate=gate, candidates=candidates, offset=offset,
    )  # fmt: skip


def tree_candidates(
    depth_logits: torch.Tensor,
    anchor: torch.Tensor,
    transition_in: torch.Tensor | None,
    transition_out: PackedLinear | torch.Tensor | None,
    *,
    levels: Sequence[reference.Level],
    base: torch.Tensor,
    idx_mapping: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    coupled: bool,
    scales: reference.RankingScales,
    chain: torch.Tensor | None = None,
    draft_ids: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> reference.Candidates:
    """``reference_candidates.tree_candidates``, also with a packed ``transition_out``."""
    noise, scale, chains = _given(
        base, torch.arange(len(levels)), idx_mapping, temperature, seeds, coupled, scales, chain, draft_ids,
        depth_logits.shape[-1],
    )  # fmt: skip

    def given_level(logits, parents, *transition, depth, **options):
        here = None if noise is None else noise[:, depth].contiguous()
        return _expand_level(logits, parents, *transition, here, scale, **options)

    return reference.expand(
        given_level, depth_logits, anchor, transition_in, transition_out,
        levels=levels, chain=chains, draft_ids=draft_ids, gate=gate,
    )  # fmt: skip
