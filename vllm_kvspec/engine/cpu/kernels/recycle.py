# SPDX-License-Identifier: Apache-2.0
"""Trees without a head on CPU, compiled: ``recycle_update``, ``own_matches`` and ``recycle_tree``."""

import numba
import numpy as np
import torch

from vllm_kvspec.engine.cpu.kernels.compiled import BOOL, F32, I32, I64, INT, compiled, flat, integers
from vllm_kvspec.engine.cpu.kernels.gumbel import _finish, _key, _mix, _noise
from vllm_kvspec.kernels.reference_candidates import Candidates
from vllm_kvspec.kernels.reference_recycle import (
    GRAFT_TRUST,
    GRAFT_TRUST_SAMPLED,
    GREEDY_SCALE,
    GUESS_TRUST,
    HEAD_WIDTH,
    LENGTH_RATE,
    LONGEST,
    MATCH_RATE,
    MATCHES,
    PAIR_TRUST,
    PLACE_RATE,
    POSITION_BITS,
    REST,
    TOKEN_TRUST,
    WIDTH,
    RecycleTable,
)

_F = np.float32
_inlined = numba.njit(forceinline=True, error_model="numpy")
# Children by source: the table, the text, guesses (also the table), a head.
GUESS, HEAD = WIDTH + MATCHES, WIDTH + MATCHES + WIDTH
LANES = HEAD + HEAD_WIDTH
_POSITION = (1 << POSITION_BITS) - 1


@_inlined
def _slot(owner, before, token, slots):
    h = np.int64(_finish(_mix(_key(owner, before, 0), np.uint32(token & 0xFFFFFFFF))))
    return (h & (slots // 2 - 1)) + (slots // 2 if before >= 0 else 0)


@_inlined
def _context(before, token):
    return (np.int64(before) << np.int64(32)) + np.int64(token)


@_inlined
def _find(owners, contexts, owner, before, token):
    """The slot of a context's entry, -1 if there is none."""
    if token < 0:
        return -1
    slot = _slot(owner, before, token, len(owners))
    return slot if owners[slot] == owner and contexts[slot] == _context(before, token) else -1


@compiled(I64, I64, I32, F32, I64, F32, I64, I64, I64, I64, I64, I32, INT, I64, I32, INT)
def _update(
    owners, contexts, tokens, log_probs, token, log_prob, input_ids, positions, rows, requests, nodes, parent,
    parent_stride, owner, text, text_stride,
):  # fmt: skip
    for i in range(len(rows)):
        request, node, last = requests[i], nodes[i], input_ids[rows[i]]
        if node > 0:
            before = input_ids[rows[i - node + parent[request * parent_stride + node]]]
        else:
            position = positions[rows[i]]
            before = np.int64(text[request * text_stride + position - 1]) if position > 0 else np.int64(-1)
        for pair in range(2):
            if pair == 1 and before < 0:
                continue
            key = before if pair == 1 else np.int64(-1)
            slot = _slot(owner[request], key, last, len(owners))
            owners[slot], contexts[slot] = owner[request], _context(key, last)
            for k in range(WIDTH):
                tokens[slot * WIDTH + k] = token[i * WIDTH + k]
                log_probs[slot * WIDTH + k] = log_prob[i * WIDTH + k]


def recycle_update(
    table: RecycleTable,
    token: torch.Tensor,
    log_prob: torch.Tensor,
    *,
    input_ids: torch.Tensor,
    positions: torch.Tensor,
    logits_indices: torch.Tensor,
    idx_mapping: torch.Tensor,
    local_pos: torch.Tensor,
    parent: torch.Tensor,
    owner: torch.Tensor,
    text: torch.Tensor,
) -> None:
    """``reference_recycle.recycle_update``."""
    _update(
        *map(flat, table), flat(token), flat(log_prob), integers(input_ids), integers(positions),
        integers(logits_indices), integers(idx_mapping), integers(local_pos), flat(parent), parent.stride(0),
        flat(owner), flat(text), text.stride(0),
    )  # fmt: skip


@compiled(I32, INT, INT, I64, I64, I32)
def _match(text, stride, num_requests, requests, bases, found):
    for b in range(len(requests)):
        best = found[b * MATCHES : (b + 1) * MATCHES]
        best[:] = 0
        if requests[b] >= num_requests:
            continue
        tokens = text[requests[b] * stride : requests[b] * stride + bases[b] + 1]
        last = tokens[bases[b]]
        # From the end, so that an equally long match never goes before one that was found earlier.
        for position in range(bases[b] - 1, -1, -1):
            if tokens[position] != last:
                continue
            length = 1
            while length < LONGEST and length <= position and tokens[position - length] == tokens[bases[b] - length]:
                length += 1
            key = np.int32(length << POSITION_BITS | position)
            if key <= best[MATCHES - 1]:
                continue
            k = MATCHES - 1
            while k > 0 and key > best[k - 1]:
                best[k] = best[k - 1]
                k -= 1
            best[k] = key


def own_matches(text: torch.Tensor, request: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """``reference_recycle.own_matches``."""
    found = torch.empty(len(request), MATCHES, dtype=torch.int32)
    _match(flat(text), text.stride(0), len(text), integers(request), integers(base), flat(found))
    return found


@_inlined
def _named(tokens, log_probs, slot, trust, but, child, share):
    """What a slot of the table names, without ``but``, as children with shares of ``trust``; -1 where there is none."""
    for k in range(WIDTH):
        child[k], share[k] = -1, _F(0)
        if slot >= 0 and log_probs[slot * WIDTH + k] > _F(-np.inf):
            token = np.int64(tokens[slot * WIDTH + k])
            if token != but:
                child[k], share[k] = token, trust * np.exp(log_probs[slot * WIDTH + k])


@_inlined
def _recycled(owners, contexts, tokens, log_probs, owner, before, last, earlier, child, share):
    """Children of ``last`` that the table names, and those it names in its place."""
    slot, trust = -1, _F(PAIR_TRUST)
    if before >= 0:
        slot = _find(owners, contexts, owner, before, last)
    if slot < 0:
        slot, trust = _find(owners, contexts, owner, np.int64(-1), last), _F(TOKEN_TRUST)
    _named(tokens, log_probs, slot, trust, -1, child[:WIDTH], share[:WIDTH])
    left = _F(GUESS_TRUST) * (_F(1) - trust if slot >= 0 else _F(1))
    slot = -1
    if earlier >= 0:
        slot = _find(owners, contexts, owner, earlier, before)
    if slot < 0:
        slot = _find(owners, contexts, owner, np.int64(-1), before)
    _named(tokens, log_probs, slot, left, last, child[GUESS:HEAD], share[GUESS:HEAD])


@_inlined
def _followed(text, base, depth, last, matches, alive, alive_above, child, share):
    """What follows at the matches that the path agrees with, into the other lanes; returns how far they are believed.
    ``alive_above`` becomes those of this node."""
    longest = 0
    for i in range(MATCHES):
        position = (matches[i] & _POSITION) + depth
        length = (matches[i] >> POSITION_BITS) + depth
        alive[i] = matches[i] > 0 and alive_above[i] and position < base and text[position] == last
        if alive[i]:
            longest = max(longest, length)
    total = _F(0)
    for i in range(MATCHES):
        child[WIDTH + i], share[WIDTH + i] = -1, _F(0)
        if alive[i]:
            length = (matches[i] >> POSITION_BITS) + depth
            child[WIDTH + i] = np.int64(text[(matches[i] & _POSITION) + depth + 1])
            share[WIDTH + i] = np.exp(_F(LENGTH_RATE) * _F(length - longest) - _F(PLACE_RATE) * _F(i))
            total += share[WIDTH + i]
    confidence = _F(1) - np.exp(_F(-MATCH_RATE) * _F(min(longest, LONGEST)))
    for i in range(HEAD):
        share[i] *= (confidence / max(total, _F(1e-30))) if WIDTH <= i < GUESS else _F(1) - confidence
    return confidence


@_inlined
def _of_head(score, token, parent, width, origin, child, believed):
    """What the head believes of the children of its candidate ``origin`` (-1: the root, -2: none)."""
    first = len(parent)
    if origin >= -1:
        for i in range(len(parent)):
            if parent[i] == origin:
                first = i
                break
    for k in range(HEAD_WIDTH):
        child[HEAD + k], believed[k] = -1, _F(-np.inf)
        i = first + k
        if k < width and i < len(parent) and parent[i] == origin and score[i] > _F(-np.inf):
            child[HEAD + k] = token[i]
            believed[k] = score[i] - (score[origin] if origin >= 0 else _F(0))
    return first


@_inlined
def _graft(child, believed, score, trust, out):
    """Of what the head and the others believe of a token, the more counts; the others are trusted less. ``score``: that
    of the head's children, given their parent."""
    for i in range(HEAD):
        out[i] += np.log(trust)
    for k in range(HEAD_WIDTH):
        lane = HEAD + k
        if child[lane] < 0:
            continue
        for i in range(HEAD):
            if child[i] == child[lane]:
                out[i] = max(out[i], score + believed[k])
                child[lane] = -1
                break
        if child[lane] >= 0:
            out[lane] = score + believed[k]


@_inlined
def _score(child, share, score, scale, coupled, key, out):
    """Scores of the children of a node, -inf in lanes that repeat another's token or have none."""
    rest = _F(1)
    for i in range(HEAD):
        for j in range(i):
            if child[i] >= 0 and child[j] == child[i]:
                share[j] += share[i]
                child[i] = -1
    for i in range(HEAD):
        if child[i] >= 0:
            rest -= share[i]
    rest_value = np.log(max(rest, _F(REST))) / scale
    top = rest_value
    out[:] = _F(-np.inf)
    for i in range(HEAD):
        if child[i] >= 0 and share[i] > _F(0):
            out[i] = np.log(share[i]) / scale
            if coupled:
                out[i] += _noise(_finish(_mix(key, np.uint32(child[i]))))
            top = max(top, out[i])
    total = np.exp(rest_value - top)
    for i in range(HEAD):
        total += np.exp(out[i] - top)
    for i in range(HEAD):
        out[i] = score + (out[i] - top - np.log(total))


@compiled(
    I64, I64, I32, F32, I32, I32, INT, INT, I64, I64, F32, I64, I64, I64, INT, INT, BOOL, F32, I64, I32, INT, INT,
    I64, I32, I32, I64
)  # fmt: skip
def _grow(
    owners, contexts, tokens, log_probs, matches, text, stride, num_requests, requests, bases, temperatures, seeds,
    chains, owner, size, num_nodes, coupled, head_score, head_token, head_parent, candidates, head_width, out_token,
    out_parent, out_depth, out_mask,
):  # fmt: skip
    token = np.empty(size + 1, np.int64)
    score = np.empty(size + 1, np.float32)
    alive = np.empty((size + 1, MATCHES), np.bool_)
    frontier_score = np.empty((size + 1, LANES), np.float32)
    frontier_token = np.empty((size + 1, LANES), np.int64)
    share = np.empty(LANES, np.float32)
    believed = np.empty(HEAD_WIDTH, np.float32)
    origin = np.empty(size + 1, np.int64)
    for b in range(len(requests)):
        parent = out_parent[b * (size + 1) : (b + 1) * (size + 1)]
        depth = out_depth[b * (size + 1) : (b + 1) * (size + 1)]
        mask = out_mask[b * (size + 1) : (b + 1) * (size + 1)]
        parent[0], depth[0], mask[0], score[0] = 0, 0, 1, _F(0)
        used, base = 1, bases[b]
        if requests[b] < num_requests:
            mine = text[requests[b] * stride : (requests[b] + 1) * stride]
            token[0] = mine[base]
            alive[0] = True
            for node in range(num_nodes):
                # The two tokens before this node's.
                before = earlier = np.int64(-1)
                steps = depth[node]
                if steps > 0:
                    before = token[parent[node]]
                elif base > 0:
                    before = np.int64(mine[base - 1])
                if steps > 1:
                    earlier = token[parent[parent[node]]]
                elif base - 1 + steps > 0:
                    earlier = np.int64(mine[base - 2 + steps])
                child = frontier_token[node]
                _recycled(
                    owners, contexts, tokens, log_probs, owner[requests[b]], before, token[node], earlier, child, share
                )
                confidence = _followed(
                    mine, base, steps, token[node], matches[b * MATCHES : (b + 1) * MATCHES], alive[node],
                    alive[parent[node]], child, share,
                )  # fmt: skip
                mine_of_head = slice(b * candidates, (b + 1) * candidates)
                if head_width > 0:
                    if node == 0:
                        origin[0] = -1
                    else:
                        origin[node] = -2
                        above = origin[parent[node]]
                        if above >= -1:
                            first = _of_head(
                                head_score[mine_of_head], head_token[mine_of_head], head_parent[mine_of_head],
                                head_width, above, child, believed,
                            )  # fmt: skip
                            for k in range(HEAD_WIDTH):
                                if child[HEAD + k] == token[node]:
                                    origin[node] = first + k
                temperature = temperatures[b]
                _score(
                    child, share, score[node], temperature if temperature > _F(0) else _F(GREEDY_SCALE),
                    coupled and temperature > _F(0), _key(seeds[b], base + steps, 0), frontier_score[node],
                )  # fmt: skip
                if head_width > 0:
                    _of_head(
                        head_score[mine_of_head], head_token[mine_of_head], head_parent[mine_of_head], head_width,
                        origin[node], child, believed,
                    )  # fmt: skip
                    trust = _F(GRAFT_TRUST_SAMPLED) if temperature > _F(0) else _F(GRAFT_TRUST)
                    left = score[node] + np.log(_F(1) - confidence)
                    _graft(child, believed, left, trust, frontier_score[node])
                best, above, lane = _F(-np.inf), -1, -1
                for n in range(node if chains[b] != 0 else 0, node + 1):
                    for i in range(LANES):
                        if frontier_score[n, i] > best:
                            best, above, lane = frontier_score[n, i], n, i
                if above < 0:
                    break
                frontier_score[above, lane] = _F(-np.inf)
                token[used], score[used] = frontier_token[above, lane], best
                parent[used], depth[used] = above, depth[above] + 1
                mask[used] = mask[above] | np.int64(1) << np.int64(used)
                used += 1
        for node in range(used, size + 1):
            token[node], parent[node], depth[node] = 0, node - 1, depth[node - 1] + 1
            mask[node] = mask[node - 1] | np.int64(1) << np.int64(node)
        out_token[b * size : (b + 1) * size] = token[1 : size + 1]


def recycle_tree(
    table: RecycleTable,
    matches: torch.Tensor,
    *,
    request: torch.Tensor,
    base: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    chain: torch.Tensor,
    owner: torch.Tensor,
    text: torch.Tensor,
    size: int,
    num_nodes: int,
    coupled: bool,
    head: Candidates | None = None,
    head_width: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``reference_recycle.recycle_tree``."""
    batch = len(request)
    tokens = torch.empty(batch, size, dtype=torch.int64)
    parents, depths = (torch.empty(batch, size + 1, dtype=torch.int32) for _ in range(2))
    masks = torch.empty(batch, size + 1, dtype=torch.int64)
    if head is None:
        head = Candidates(table.log_prob[:0], request[:0], matches[:0])
    _grow(
        *map(flat, table), flat(matches), flat(text), text.stride(0), len(text), integers(request), integers(base),
        flat(temperature), flat(seed), integers(chain), flat(owner), size, num_nodes, coupled,
        *(flat(column.contiguous()) for column in head), head.score.shape[1] if head_width else 0, head_width,
        flat(tokens),
        flat(parents), flat(depths), flat(masks),
    )  # fmt: skip
    return tokens, parents, depths, masks
