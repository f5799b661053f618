# SPDX-License-Identifier: Apache-2.0
"""Torch twins of ``recycle``: trees from the target's own earlier logits and the request's own text, without a head.

Whatever the target computed for a row says what may follow that row's last two tokens: the row's best ``WIDTH`` tokens
with their log-probabilities go into a hash table under both of them and, as a fallback, under the last alone (Token
Recycling, arXiv 2408.08696, with longer keys and probabilities). Earlier places of the request's own text that end as
it ends now say it too (prompt lookup), all of the best ``MATCHES`` places at once. And what else could have stood in a
token's place may follow it (the guess of LogitSpec: the next logits resemble the last). A tree grows best node first
from what these say, so its first n nodes are the best tree of n nodes; a head's candidates can take part.

Words beside those of ``reference``: S = slots of the table, W = WIDTH, Lmax = columns of the text.
"""

import math
from typing import NamedTuple

import torch

from vllm_kvspec.kernels.reference import _murmur_finish, _murmur_mix, gumbel_noise_at
from vllm_kvspec.kernels.reference_candidates import Candidates

# Successors of a context, and earlier places of the text that are followed.
WIDTH = 8
MATCHES = 8
# Children of a node that a head may name.
HEAD_WIDTH = 8
# The longest suffix that is told apart, and the bits of a position beside its length in a match.
LONGEST = 15
POSITION_BITS = 27
# How far a source is believed: a table's probabilities by the kind of their key, two tokens or one; what else could
# have stood in a token's place, as a share of what these leave; 1 - exp(-MATCH_RATE * n) after n tokens of the text
# that agree; of several places by exp(LENGTH_RATE * n), and by exp(-PLACE_RATE) less than the one before in the order
# of ``own_matches``.
PAIR_TRUST, TOKEN_TRUST, GUESS_TRUST = 0.98, 0.8, 0.5
# Beside a head, greedy and sampled: a head knows the noise's favourites better. The head is believed as far as the text
# leaves room.
GRAFT_TRUST, GRAFT_TRUST_SAMPLED = 1.0, 0.05
MATCH_RATE, LENGTH_RATE, PLACE_RATE = 0.35, 1.1, 0.05
# The least that is left for tokens which no source knows.
REST = 0.02
# At temperature 0 a broad tree finds more, and verifying it teaches more, than the probabilities alone would have it.
GREEDY_SCALE = 1.5
# Where a child of a node comes from.
HEAD, TWO_TOKENS, ONE_TOKEN, OWN_TEXT, GUESS = SOURCES = ("head", "two tokens", "one token", "own text", "guess")


class RecycleTable(NamedTuple):
    """``owner`` int64 [S], whose entry it is; ``context`` int64 [S], the two tokens as ``before * 2**32 + token``, with
    ``before`` -1 for the last token alone, and -1 as a whole for an empty slot; ``token`` int32 and ``log_prob`` fp32
    [S, W]. Single tokens have the first half of the slots, pairs the second. S is a power of two."""

    owner: torch.Tensor
    context: torch.Tensor
    token: torch.Tensor
    log_prob: torch.Tensor


def empty_table(slots: int, device: torch.device | None = None) -> RecycleTable:
    """A table that knows nothing. Raises ValueError unless ``slots`` is a power of two, at least 2."""
    if slots < 2 or slots & (slots - 1):
        raise ValueError(f"A table must have a power of two of slots, at least 2; got {slots}.")
    return RecycleTable(
        torch.zeros(slots, dtype=torch.int64, device=device),
        torch.full((slots,), -1, dtype=torch.int64, device=device),
        torch.zeros(slots, WIDTH, dtype=torch.int32, device=device),
        torch.full((slots, WIDTH), float("-inf"), device=device),
    )


def slot_of(owner: torch.Tensor, before: torch.Tensor, token: torch.Tensor, slots: int) -> torch.Tensor:
    """The only slot int64 where the entry of a context can be; arguments int, of one shape."""
    owner = owner.long()
    h = _murmur_mix(torch.zeros_like(owner, dtype=torch.int32), owner.int())
    h = _murmur_mix(h, (owner >> 32).int())
    h = _murmur_mix(_murmur_mix(h, before.int()), token.int())
    return (_murmur_finish(h ^ 16).long() & (slots // 2 - 1)) + (before >= 0) * (slots // 2)


def context_of(before: torch.Tensor, token: torch.Tensor) -> torch.Tensor:
    """The key int64 of a context; arguments int."""
    return (before.long() << 32) + token.long()


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
    """Learn what the target said may follow each of L rows, accepted or not.

    A slot that several rows want gets the last one's entry, so all ranks of a tensor-parallel target have equal tables.

    Args:
        token, log_prob: int64 and fp32 ``[L, W]``, the best successors of each row.
        input_ids: int ``[T]``, the step's tokens.
        positions: int64 ``[T]``, of tree rows their depth positions.
        logits_indices: int64 ``[L]``, where in the step a row is.
        idx_mapping: int ``[L]``, each row's request.
        local_pos: int ``[L]``, each row's node, 0 for a root or a request without a tree.
        parent: int32 ``[R, N1]``.
        owner: int64 ``[R]``.
        text: int32 ``[R, Lmax]``, each request's tokens.
    """
    rows = torch.arange(len(logits_indices), device=token.device)
    request, node = idx_mapping.long(), local_pos.long()
    last = input_ids[logits_indices].long()
    above = (rows - node + parent[request, node]).clamp(min=0)
    is_root = (node == 0) & (positions[logits_indices] > 0)
    earlier = text[request, torch.where(is_root, positions[logits_indices] - 1, 0)].long()
    pair = torch.where(node > 0, last[above], torch.where(is_root, earlier, -1))
    for before in (torch.full_like(last, -1), pair):
        slot = slot_of(owner[request], before, last, len(table.owner))
        valid = (before >= 0) | (before is not pair)
        later = (slot[None, :] == slot[:, None]) & (rows[None, :] > rows[:, None]) & valid[None, :]
        kept = valid & ~later.any(1)
        where = slot[kept]
        table.owner[where] = owner[request][kept]
        table.context[where] = context_of(before, last)[kept]
        table.token[where] = token[kept].int()
        table.log_prob[where] = log_prob[kept]


def own_matches(text: torch.Tensor, request: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Earlier places of each request's text that end as it does: int32 ``[B, MATCHES]``, best first, 0 for none.

    A match is ``length << POSITION_BITS | position``: the tokens up to ``position`` and those up to ``base`` agree in
    their last ``length`` tokens, at most LONGEST. Longer ones are better, then later ones.

    Args:
        text: int32 ``[R, Lmax]``.
        request: int64 ``[B]``; R or more: padding, without matches.
        base: int32 ``[B]``, position of the last token.
    """
    found = torch.zeros(len(request), MATCHES, dtype=torch.int32, device=text.device)
    for b, (r, end) in enumerate(zip(request.tolist(), base.tolist(), strict=True)):
        if r >= len(text):
            continue
        tokens = text[r, : end + 1].tolist()
        keys = []
        for position in range(end):
            length = 0
            while length < LONGEST and length <= position and tokens[position - length] == tokens[end - length]:
                length += 1
            if length:
                keys.append(length << POSITION_BITS | position)
        for k, key in enumerate(sorted(keys, reverse=True)[:MATCHES]):
            found[b, k] = key
    return found


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
    """Trees of ``num_nodes`` nodes at most, in the shape of trees of N = ``size``.

    The best child so far, of any node of the tree, becomes the next node, until there are enough; equal scores: the
    lowest node, then the table before the matches. A child v of a node scores the node's score plus the log-softmax
    over all that is known of ``log p(v) / scale + noise(v)``; p mixes the sources, which is why a token that several
    name is one child, and what is left of 1 counts as one more token. With ``coupled`` and a temperature above 0 the
    noise is the target's at ``base + depth`` of the node; the scale is the temperature, GREEDY_SCALE when that is 0.

    With ``head`` its candidates take part: a child that it names too has the higher of both scores, where those of the
    other sources count by GRAFT_TRUST, or GRAFT_TRUST_SAMPLED, and the head's by what the text is not believed.

    Args:
        matches: int32 ``[B, MATCHES]`` of ``own_matches``.
        request: int64 ``[B]``; R or more: padding, whose tree is empty.
        base: int32 ``[B]``; the root is the text's token there.
        temperature: fp32 ``[B]``; seed: int64 ``[B]``.
        chain: int32 ``[B]``, nonzero: only the last node gets a child.
        owner: int64 ``[R]``; text: int32 ``[R, Lmax]``.
        head: candidates ``[B, M]`` in level order, each node's ``head_width`` children side by side; None for none.

    Returns:
        As ``reference.tree_build``; unused nodes continue as a chain of token 0.
    """
    trees = []
    for b, r in enumerate(request.tolist()):
        tree = _Tree([], 0, [])
        if r < len(text):
            tree = _Tree(text[r, : int(base[b]) + 1].tolist(), owner[r].item(), matches[b].tolist())
            tree.of_request(temperature[b].item(), seed[b : b + 1], coupled, head and [c[b].tolist() for c in head])
            tree.grow(table, num_nodes, bool(chain[b]))
        trees.append(tree.columns(size))
    dtypes = (torch.int64, torch.int32, torch.int32, torch.int64)
    columns = zip(*trees, strict=True)
    return tuple(torch.tensor(c, dtype=d, device=text.device) for c, d in zip(columns, dtypes, strict=True))


def path_sources(
    table: RecycleTable,
    matches: torch.Tensor,
    path: list[int],
    *,
    request: torch.Tensor,
    base: torch.Tensor,
    temperature: torch.Tensor,
    seed: torch.Tensor,
    owner: torch.Tensor,
    text: torch.Tensor,
    coupled: bool,
    head: Candidates | None = None,
) -> list[str]:
    """Where each token of a path below the root of a tree that ``recycle_tree`` grew comes from, one of SOURCES.

    Of several sources that name a token it is the one that gives it most of its probability, and a head where its score
    is the higher. Arguments as for ``recycle_tree``, of one request (B = 1) and before the step's rows are learned.
    """
    r = int(request[0])
    tree = _Tree(text[r, : int(base[0]) + 1].tolist(), owner[r].item(), matches[0].tolist())
    tree.of_request(temperature[0].item(), seed, coupled, head and [column[0].tolist() for column in head])
    found = []
    for node, token in enumerate(path):
        named = tree.children(table, node)
        # A text can agree with what fills a tree's unused nodes.
        if token not in named:
            break
        found.append(named[token][1])
        tree.add(token, node, 0.0)
    return found


class _Tree:
    """One request's tree while it grows; node 0 is the last token of ``text``. ``matches``: of ``own_matches``."""

    def __init__(self, text: list[int], owner: int, matches: list[int]):
        last = (1 << POSITION_BITS) - 1
        self.text, self.owner = text, owner
        self.matches = [(place, key >> POSITION_BITS, key & last) for place, key in enumerate(matches) if key]
        self.token, self.parent, self.depth, self.score = text[-1:] or [0], [0], [0], [0.0]
        # Of each node: the matches that its path agrees with, as (place in their order, length, end).
        self.alive: list[list[tuple[int, int, int]]] = []
        # A head's candidates (score, token, parent), and which of them each node is: -1 the root, -2 none.
        self.head: list[tuple[float, int, int]] = []
        self.origin: list[int] = []

    def of_request(self, temperature: float, seed: torch.Tensor, coupled: bool, head: list[list] | None) -> None:
        """How children are ranked, and a head's columns."""
        self.temperature, self.seed, self.coupled = temperature, seed, coupled
        self.trust = GRAFT_TRUST_SAMPLED if temperature > 0 else GRAFT_TRUST
        self.head = list(zip(*head, strict=True)) if head else []

    def grow(self, table: RecycleTable, num_nodes: int, chain: bool) -> None:
        frontier: list[tuple[float, int, int, int]] = []
        for node in range(num_nodes):
            children = self.children(table, node)
            # The minus sorts by the highest score, then by the lowest node and the first child.
            found = [(-self.score[node] - s, node, i, child) for i, (child, (s, _)) in enumerate(children.items())]
            frontier = [entry for entry in found + ([] if chain else frontier) if entry[0] < math.inf]
            if not frontier:
                return
            best = min(frontier)
            frontier.remove(best)
            self.add(best[3], best[1], -best[0])

    def add(self, token: int, parent: int, score: float) -> None:
        """A node, whose parent's children are known."""
        self.token.append(token)
        self.parent.append(parent)
        self.depth.append(self.depth[parent] + 1)
        self.score.append(score)

    def children(self, table: RecycleTable, node: int) -> dict[int, tuple[float, str]]:
        """Children of the newest node: token -> (score given the node, source)."""
        share: dict[int, float] = {}
        most: dict[int, tuple[float, str]] = {}
        confidence, shares = self._shares(table, node)
        for source, child, part in shares:
            if part > 0:
                share[child] = share.get(child, 0.0) + part
                most[child] = max(most.get(child, (0.0, "")), (part, source), key=lambda entry: entry[0])
        position = len(self.text) - 1 + self.depth[node]
        scores = _scores(share, position, self.temperature, self.seed, self.coupled)
        found = {child: (score, most[child][1]) for child, score in scores.items()}
        return self._grafted(found, node, 1 - confidence) if self.head else found

    def _grafted(self, children: dict[int, tuple[float, str]], node: int, left: float) -> dict[int, tuple[float, str]]:
        """The children's scores, or the head's where those are higher, and the head's own children. ``left``: how far
        the head is believed."""
        named = self._of_head(self.origin[self.parent[node]]) if node else {}
        self.origin.append(named.get(self.token[node], (-2, 0.0))[0] if node else -1)
        merged = {child: (score + math.log(self.trust), source) for child, (score, source) in children.items()}
        for child, (_, score) in self._of_head(self.origin[node]).items():
            score += math.log(left)
            if score >= merged.get(child, (-math.inf, ""))[0]:
                merged[child] = score, HEAD
        return merged

    def _of_head(self, origin: int) -> dict[int, tuple[int, float]]:
        """Children of a candidate: token -> (candidate, score given the parent)."""
        own = self.head[origin][0] if origin >= 0 else 0.0
        return {
            token: (i, score - own)
            for i, (score, token, parent) in enumerate(self.head)
            if parent == origin and score > -math.inf
        }

    def _before(self, node: int) -> tuple[int, int]:
        """Two ancestors of a node's token: the token before it, and the one before that; -1 where there is none."""
        path = []
        while node:
            node = self.parent[node]
            path.append(self.token[node])
        path += self.text[:-1][::-1][:2]
        return tuple((path + [-1, -1])[:2])

    def _shares(self, table: RecycleTable, node: int) -> tuple[float, list[tuple[str, int, float]]]:
        """How far the text is believed, and what each source names after a node: (source, child, probability)."""
        token, depth, base = self.token[node], self.depth[node], len(self.text) - 1
        above = self.alive[self.parent[node]] if node else self.matches
        alive = [match for match in above if match[2] + depth < base and self.text[match[2] + depth] == token]
        self.alive.append(alive)
        longest = max((n + depth for _, n, _ in alive), default=0)
        confidence = 1 - math.exp(-MATCH_RATE * min(longest, LONGEST))
        weights = [math.exp(LENGTH_RATE * (n + depth - longest) - PLACE_RATE * place) for place, n, _ in alive]
        before, earlier = self._before(node)
        keys = [(before, token), (-1, token), (earlier, before), (-1, before)]
        pair, alone, over, other = self._entries(table, keys)
        entries, trust, key = alone, TOKEN_TRUST, ONE_TOKEN
        if before >= 0 and pair:
            entries, trust, key = pair, PAIR_TRUST, TWO_TOKENS
        guesses = over or other
        left = GUESS_TRUST * (1 - trust if entries else 1)
        found = [(key, child, (1 - confidence) * trust * math.exp(log_prob)) for child, log_prob in entries]
        found += [
            (OWN_TEXT, self.text[end + depth + 1], confidence * weight / sum(weights))
            for (_, _, end), weight in zip(alive, weights, strict=True)
        ]
        found += [(GUESS, child, (1 - confidence) * left * math.exp(lp)) for child, lp in guesses if child != token]
        return confidence, found

    def _entries(self, table: RecycleTable, keys: list[tuple[int, int]]) -> list[list[tuple[int, float]]]:
        """What the table has for each (token before, token), the first -1 for keys of one token, the second -1 for
        none: (successor, log-probability)."""
        before, token = torch.tensor(keys, device=table.owner.device).T
        owner = torch.full_like(token, self.owner)
        slots = slot_of(owner, before, token, len(table.owner))
        known = (token >= 0) & (table.owner[slots] == owner) & (table.context[slots] == context_of(before, token))
        found = zip(table.token[slots].tolist(), table.log_prob[slots].tolist(), known.tolist(), strict=True)
        return [list(zip(tokens, log_probs, strict=True)) if there else [] for tokens, log_probs, there in found]

    def columns(self, size: int) -> tuple[list[int], list[int], list[int], list[int]]:
        """Tokens, parents, depths and ancestor masks; unused nodes continue as a chain."""
        while len(self.token) <= size:
            last = len(self.token) - 1
            self.token.append(0)
            self.parent.append(last)
            self.depth.append(self.depth[last] + 1)
        masks = [1]
        for node in range(1, size + 1):
            masks.append(masks[self.parent[node]] | (1 << node if node < 63 else -(1 << 63)))
        return self.token[1:], self.parent, self.depth, masks


def _scores(children: dict[int, float], position, temperature, seed, coupled) -> dict[int, float]:
    """Log-softmax of the children of a node at ``position``, beside one for the tokens that no source knows."""
    if not children:
        return {}
    p = torch.tensor(list(children.values()), dtype=torch.float32)
    scale = temperature if temperature > 0 else GREEDY_SCALE
    values = torch.cat((p, (1 - p.sum()).clamp(min=REST)[None])).log() / scale
    if coupled and temperature > 0:
        where = torch.tensor([[position]]), torch.zeros(1, dtype=torch.int64), torch.tensor(list(children))
        values[:-1] += gumbel_noise_at(seed.cpu(), torch.ones(1), *where)[0, 0]
    return dict(zip(children, values.log_softmax(0)[:-1].tolist(), strict=True))
