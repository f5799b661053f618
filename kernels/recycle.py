# SPDX-License-Identifier: Apache-2.0
"""Trees without a head: what to learn from a step's logits, and a tree grown from it in one launch.

`_update_kernel`: a program per row and kind of key. Of rows that want the same slot only the last writes, so nothing
depends on the order of programs and tensor-parallel ranks stay equal.

`_match_kernel` and `_merge_kernel`: the best matches of every block of a text, then of the text. Only tokens that equal
the last one are compared further, because vLLM keeps the texts in the host's memory.

`_tree_kernel`: a program per request holds the tree and the scores of all children of its nodes in registers and adds
the best child N times. See `reference_recycle` for what a child scores.
"""

import torch
import triton
import triton.language as tl

from vllm_kvspec.kernels import reference_recycle as reference
from vllm_kvspec.kernels.gumbel_noise import gumbel, noise_key, word_hash
from vllm_kvspec.kernels.reference_candidates import Candidates
from vllm_kvspec.kernels.reference_recycle import RecycleTable

WIDTH = tl.constexpr(reference.WIDTH)
MATCHES = tl.constexpr(reference.MATCHES)
# A node's children by source, from these lanes on: the table, the text, guesses (also the table), a head.
FIRST_GUESS = tl.constexpr(reference.WIDTH + reference.MATCHES)
FIRST_HEAD = tl.constexpr(2 * reference.WIDTH + reference.MATCHES)
LANES = tl.constexpr(2 * reference.WIDTH + reference.MATCHES + reference.HEAD_WIDTH)
LONGEST = tl.constexpr(reference.LONGEST)
POSITION_BITS = tl.constexpr(reference.POSITION_BITS)
POSITION = tl.constexpr((1 << reference.POSITION_BITS) - 1)
PAIR_TRUST = tl.constexpr(reference.PAIR_TRUST)
TOKEN_TRUST = tl.constexpr(reference.TOKEN_TRUST)
GUESS_TRUST = tl.constexpr(reference.GUESS_TRUST)
GRAFT_TRUST = tl.constexpr(reference.GRAFT_TRUST)
GRAFT_TRUST_SAMPLED = tl.constexpr(reference.GRAFT_TRUST_SAMPLED)
GREEDY_SCALE = tl.constexpr(reference.GREEDY_SCALE)
MATCH_RATE = tl.constexpr(reference.MATCH_RATE)
LENGTH_RATE = tl.constexpr(reference.LENGTH_RATE)
PLACE_RATE = tl.constexpr(reference.PLACE_RATE)
REST = tl.constexpr(reference.REST)
# Positions of a text that one program compares, and matches of blocks that are merged at once.
MATCH_BLOCK, MERGE_BLOCK = 2048, 256


@triton.jit
def _slot(owner, before, token, HALF: tl.constexpr):
    """The slot of a context; its half of the table by whether it is a pair."""
    h = word_hash(noise_key(owner, before), token).to(tl.int64) & (HALF - 1)
    return h + tl.where(before >= 0, HALF, 0)


@triton.jit
def _context(before, token):
    return (before.to(tl.int64) << 32) + token.to(tl.int64)


@triton.jit
def _row_keys(
    row,
    inside,
    input_ids_ptr,
    positions_ptr,
    logits_indices_ptr,
    idx_mapping_ptr,
    local_pos_ptr,
    parent_ptr,
    owner_ptr,
    text_ptr,
    stride_parent,
    stride_text,
    PAIR: tl.constexpr,
):
    """Owner, token before (-1 without PAIR or where there is none) and token of rows."""
    at = tl.load(logits_indices_ptr + row, mask=inside, other=0)
    request = tl.load(idx_mapping_ptr + row, mask=inside, other=0).to(tl.int64)
    owner = tl.load(owner_ptr + request, mask=inside, other=0)
    token = tl.load(input_ids_ptr + at, mask=inside, other=0).to(tl.int32)
    before = tl.full(token.shape, -1, tl.int32)
    if PAIR:
        node = tl.load(local_pos_ptr + row, mask=inside, other=0).to(tl.int64)
        above = tl.load(parent_ptr + request * stride_parent + node, mask=inside & (node > 0), other=0)
        above_at = tl.load(logits_indices_ptr + row - node + above, mask=inside & (node > 0), other=0)
        position = tl.load(positions_ptr + at, mask=inside, other=0)
        is_root = inside & (node == 0) & (position > 0)
        earlier = tl.load(text_ptr + request * stride_text + position - 1, mask=is_root, other=-1)
        before = tl.load(input_ids_ptr + above_at, mask=inside & (node > 0), other=-1).to(tl.int32)
        before = tl.where(node > 0, before, earlier)
    return owner, before, token


@triton.jit(do_not_specialize=["num_rows", "stride_text"], do_not_specialize_on_alignment=["input_ids_ptr"])
def _update_kernel(
    owner_out_ptr,
    context_ptr,
    token_ptr,
    log_prob_ptr,
    best_ptr,
    best_log_prob_ptr,
    input_ids_ptr,
    positions_ptr,
    logits_indices_ptr,
    idx_mapping_ptr,
    local_pos_ptr,
    parent_ptr,
    owner_ptr,
    text_ptr,
    stride_parent,
    stride_text,
    num_rows,
    HALF: tl.constexpr,
    BLOCK: tl.constexpr,
    PAIR: tl.constexpr,
):
    row = tl.program_id(0)
    # One row as a block of one.
    mine = row + tl.arange(0, 1)
    owner, before, token = _row_keys(
        mine, mine < num_rows, input_ids_ptr, positions_ptr, logits_indices_ptr, idx_mapping_ptr, local_pos_ptr,
        parent_ptr, owner_ptr, text_ptr, stride_parent, stride_text, PAIR,
    )  # fmt: skip
    slot = _slot(owner, before, token, HALF)
    later = tl.zeros([], tl.int32)
    for j0 in range(row // BLOCK * BLOCK, num_rows, BLOCK):
        j = j0 + tl.arange(0, BLOCK)
        inside = (j > row) & (j < num_rows)
        other_owner, other_before, other_token = _row_keys(
            j, inside, input_ids_ptr, positions_ptr, logits_indices_ptr, idx_mapping_ptr, local_pos_ptr, parent_ptr,
            owner_ptr, text_ptr, stride_parent, stride_text, PAIR,
        )  # fmt: skip
        same = inside & (_slot(other_owner, other_before, other_token, HALF) == slot)
        later = tl.maximum(later, tl.max(same.to(tl.int32), 0))
    writes = later == 0
    if PAIR:
        writes = writes & (tl.max(before, 0) >= 0)
    tl.store(owner_out_ptr + slot, owner, mask=writes)
    tl.store(context_ptr + slot, _context(before, token), mask=writes)
    k = tl.arange(0, WIDTH)
    at = tl.max(slot, 0) * WIDTH + k
    best = row.to(tl.int64) * WIDTH + k
    tl.store(token_ptr + at, tl.load(best_ptr + best).to(tl.int32), mask=writes)
    tl.store(log_prob_ptr + at, tl.load(best_log_prob_ptr + best), mask=writes)


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
    """Learn the successors of each row; see `reference_recycle.recycle_update`. Two launches.

    token and log_prob int64 and fp32 ``[L, W]`` contiguous; input_ids, idx_mapping, local_pos int; positions and
    logits_indices int64; parent int32 ``[R, N1]`` and text int32 ``[R, Lmax]`` with contiguous rows; owner int64
    ``[R]``.
    """
    num_rows = len(logits_indices)
    if num_rows == 0:
        return
    for pair in (False, True):
        _update_kernel[(num_rows,)](
            *table,
            token,
            log_prob,
            input_ids,
            positions,
            logits_indices,
            idx_mapping,
            local_pos,
            parent,
            owner,
            text,
            parent.stride(0),
            text.stride(0),
            num_rows,
            HALF=len(table.owner) // 2,
            BLOCK=128,
            PAIR=pair,
            num_warps=4,
        )


@triton.jit
def _best(keys, count: tl.constexpr, SIZE: tl.constexpr):
    """The `count` largest of distinct keys [SIZE] in order, 0 where there are no more."""
    place = tl.arange(0, count)
    found = tl.zeros([count], tl.int32)
    for i in range(count):
        top = tl.max(keys, 0)
        found = tl.where(place == i, top, found)
        keys = tl.where(keys == top, 0, keys)
    return found


@triton.jit(do_not_specialize=["stride_text", "num_requests"])
def _match_kernel(
    text_ptr, request_ptr, base_ptr, found_ptr, stride_text, num_requests, BLOCK: tl.constexpr
):  # fmt: skip
    b = tl.program_id(0).to(tl.int64)
    block = tl.program_id(1)
    out = found_ptr + (b * tl.num_programs(1) + block) * MATCHES + tl.arange(0, MATCHES)
    request = tl.load(request_ptr + b)
    base = tl.load(base_ptr + b).to(tl.int32)
    position = block * BLOCK + tl.arange(0, BLOCK)
    inside = (position < base) & (request < num_requests)
    text_ptr += request * stride_text
    last = tl.load(text_ptr + base, mask=request < num_requests, other=-1)
    equal = inside & (tl.load(text_ptr + position, mask=inside, other=-2) == last)
    if tl.max(equal.to(tl.int32), 0) == 0:
        tl.store(out, tl.zeros([MATCHES], tl.int32))
        return
    length = equal.to(tl.int32)
    for i in range(1, LONGEST):
        equal = equal & (position >= i) & (base >= i)
        wanted = tl.load(text_ptr + base - i, mask=base >= i, other=-1)
        equal = equal & (tl.load(text_ptr + position - i, mask=equal, other=-2) == wanted)
        length += equal.to(tl.int32)
    keys = tl.where(length > 0, (length << POSITION_BITS) | position, 0)
    tl.store(out, _best(keys, MATCHES, BLOCK))


@triton.jit(do_not_specialize=["num_keys"])
def _merge_kernel(key_ptr, found_ptr, num_keys, BLOCK: tl.constexpr):
    b = tl.program_id(0).to(tl.int64)
    lane = tl.arange(0, BLOCK)
    # The first lanes carry the best so far from block to block.
    best = tl.zeros([MATCHES], tl.int32)
    for k0 in range(0, num_keys, BLOCK):
        keys = tl.load(key_ptr + b * num_keys + k0 + lane, mask=k0 + lane < num_keys, other=0)
        top = tl.max(keys, 0)
        worst = tl.min(best, 0)
        while top > worst:
            # Zeros are equal: the first of the worst goes.
            slot = tl.min(tl.where(best == worst, tl.arange(0, MATCHES), MATCHES), 0)
            best = tl.where(tl.arange(0, MATCHES) == slot, top, best)
            keys = tl.where(keys == top, 0, keys)
            top = tl.max(keys, 0)
            worst = tl.min(best, 0)
    tl.store(found_ptr + b * MATCHES + tl.arange(0, MATCHES), _best(best, MATCHES, MATCHES))


def own_matches(text: torch.Tensor, request: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
    """Earlier places of each text that end as it does, int32 ``[B, MATCHES]``; see `reference_recycle.own_matches`.

    text int32 ``[R, Lmax]`` with contiguous rows, request int64 ``[B]``, base int32 ``[B]``. Two launches.
    """
    batch = len(request)
    found = torch.empty((batch, reference.MATCHES), dtype=torch.int32, device=request.device)
    if batch == 0:
        return found
    blocks = triton.cdiv(text.shape[1], MATCH_BLOCK)
    of_blocks = torch.empty((batch, blocks, reference.MATCHES), dtype=torch.int32, device=request.device)
    _match_kernel[(batch, blocks)](text, request, base, of_blocks, text.stride(0), len(text), BLOCK=MATCH_BLOCK)
    _merge_kernel[(batch,)](of_blocks, found, blocks * reference.MATCHES, BLOCK=MERGE_BLOCK, num_warps=1)
    return found


@triton.jit
def _at(values, index, place):
    """The element of a register array [n] at ``place``; ``index`` is 0 .. n - 1."""
    return tl.sum(tl.where(index == place, values, 0), 0)


@triton.jit
def _find(owner_ptr, context_ptr, owner, before, token, known, HALF: tl.constexpr):
    """The slot of a context, and whether its entry is there."""
    known = known & (token >= 0)
    slot = _slot(owner, before, token, HALF)
    found = tl.load(owner_ptr + slot, mask=known, other=0) == owner
    found = found & (tl.load(context_ptr + slot, mask=known, other=-1) == _context(before, token))
    return slot, known & found


@triton.jit
def _first_child(parents, candidate, origin, count):
    """The first candidate whose parent is ``origin``, ``count`` if there is none."""
    return tl.min(tl.where(parents == origin, candidate, count), 0)


@triton.jit(do_not_specialize=["stride_text", "num_requests", "num_nodes", "num_candidates", "head_width"])
def _tree_kernel(
    table_owner_ptr,
    context_ptr,
    table_token_ptr,
    log_prob_ptr,
    match_ptr,
    request_ptr,
    base_ptr,
    temperature_ptr,
    seed_ptr,
    chain_ptr,
    owner_ptr,
    text_ptr,
    head_score_ptr,
    head_token_ptr,
    head_parent_ptr,
    tokens_out_ptr,
    parent_out_ptr,
    depth_out_ptr,
    mask_out_ptr,
    stride_text,
    num_requests,
    num_nodes,
    num_candidates,
    head_width,
    COUPLED: tl.constexpr,
    HAS_HEAD: tl.constexpr,
    HALF: tl.constexpr,
    SIZE: tl.constexpr,
    BLOCK_NODES: tl.constexpr,
    BLOCK_HEAD: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    request = tl.load(request_ptr + b)
    # Padding belongs to no request: its tree stays empty.
    is_real = request < num_requests
    base = tl.load(base_ptr + b).to(tl.int32)
    owner = tl.load(owner_ptr + request, mask=is_real, other=0)
    text_ptr += request * stride_text
    first = tl.load(text_ptr + base, mask=is_real, other=0)
    second = tl.load(text_ptr + base - 1, mask=is_real & (base > 0), other=-1)
    third = tl.load(text_ptr + base - 2, mask=is_real & (base > 1), other=-1)
    temperature = tl.load(temperature_ptr + b)
    seed = tl.load(seed_ptr + b)
    is_chain = tl.load(chain_ptr + b) != 0
    is_noisy = temperature > 0.0
    scale = tl.where(is_noisy, temperature, GREEDY_SCALE)

    lane = tl.arange(0, LANES)
    of_table, of_text = lane < WIDTH, (lane >= WIDTH) & (lane < FIRST_GUESS)
    of_guess, of_head = (lane >= FIRST_GUESS) & (lane < FIRST_HEAD), lane >= FIRST_HEAD
    match = tl.load(match_ptr + b * MATCHES + lane - WIDTH, mask=of_text & is_real, other=0)
    length, end = match >> POSITION_BITS, match & POSITION
    node = tl.arange(0, BLOCK_NODES)
    token = tl.where(node == 0, first, 0)
    parent = tl.zeros([BLOCK_NODES], tl.int32)
    depth = tl.zeros([BLOCK_NODES], tl.int32)
    mask = tl.full([BLOCK_NODES], 1, tl.int64)
    score = tl.zeros([BLOCK_NODES], tl.float32)
    # Of each node, one bit a lane: the matches that its path agrees with.
    alive_bits = tl.full([BLOCK_NODES], -1, tl.int32)
    frontier_score = tl.full([BLOCK_NODES, LANES], float("-inf"), tl.float32)
    frontier_token = tl.zeros([BLOCK_NODES, LANES], tl.int32)
    place = node[:, None] * LANES + lane[None, :]
    # Which of the head's candidates a node is: -1 the root, -2 none.
    origin = tl.where(node == 0, -1, -2)
    candidate = tl.arange(0, BLOCK_HEAD)
    if HAS_HEAD:
        head_score_ptr += b * num_candidates
        head_token_ptr += b * num_candidates
        inside = candidate < num_candidates
        parents = tl.load(head_parent_ptr + b * num_candidates + candidate, mask=inside, other=-3)
    # As soon as no child is left, the others are unused.
    num_used = tl.where(is_real, 1, 0)

    for current in range(num_nodes):
        x = _at(token, node, current)
        above = _at(parent, node, current)
        d = _at(depth, node, current)
        node_score = _at(score, node, current)
        before = tl.where(d == 0, second, _at(token, node, above))
        earlier = tl.where(d == 0, third, tl.where(d == 1, second, _at(token, node, _at(parent, node, above))))
        is_used = current < num_used

        pair, has_pair = _find(table_owner_ptr, context_ptr, owner, before, x, is_used & (before >= 0), HALF)
        alone, has_alone = _find(table_owner_ptr, context_ptr, owner, -1 + 0 * before, x, is_used, HALF)
        over, has_over = _find(table_owner_ptr, context_ptr, owner, earlier, before, is_used & (earlier >= 0), HALF)
        other, has_other = _find(table_owner_ptr, context_ptr, owner, -1 + 0 * before, before, is_used, HALF)
        trust = tl.where(has_pair, PAIR_TRUST, tl.where(has_alone, TOKEN_TRUST, 0.0))
        slot = tl.where(of_guess, tl.where(has_over, over, other), tl.where(has_pair, pair, alone))
        in_table = (of_table & (has_pair | has_alone)) | (of_guess & (has_over | has_other))
        log_prob = tl.load(log_prob_ptr + slot * WIDTH + lane % WIDTH, mask=in_table, other=float("-inf"))
        named = tl.load(table_token_ptr + slot * WIDTH + lane % WIDTH, mask=in_table, other=-1)
        in_table = in_table & (of_table | (named != x)) & (log_prob > float("-inf"))
        weight = tl.where(of_table, trust, (1.0 - trust) * GUESS_TRUST)

        was_alive = (_at(alive_bits, node, above) >> lane) & 1
        alive = (match > 0) & (was_alive != 0) & (end + d < base) & is_used
        alive = alive & (tl.load(text_ptr + end + d, mask=alive, other=-1) == x)
        alive_bits = tl.where(node == current, tl.sum(tl.where(alive, 1 << lane, 0), 0), alive_bits)
        followed = tl.load(text_ptr + end + d + 1, mask=alive, other=-1)
        longest = tl.max(tl.where(alive, length + d, 0), 0)
        excess = (length + d - longest).to(tl.float32) * LENGTH_RATE - (lane - WIDTH).to(tl.float32) * PLACE_RATE
        share = tl.where(alive, tl.exp(excess), 0.0)
        total = tl.sum(share, 0)
        confidence = 1.0 - tl.exp(tl.minimum(longest, LONGEST).to(tl.float32) * -MATCH_RATE)
        share = share * (confidence / tl.where(total > 0.0, total, 1.0))
        share = tl.where(in_table, (1.0 - confidence) * (weight * tl.exp(log_prob)), share)
        child = tl.where(in_table, named, followed)
        has_child = in_table | alive

        believed = tl.full([LANES], float("-inf"), tl.float32)
        if HAS_HEAD:
            # The candidate that this node is, then its children.
            at = _first_child(parents, candidate, _at(origin, node, above), num_candidates) + lane - FIRST_HEAD
            near = of_head & (lane - FIRST_HEAD < head_width) & (at < num_candidates) & is_used
            is_mine = near & (tl.load(head_token_ptr + at, mask=near, other=-1) == x)
            mine = tl.where(d == 0, -1, tl.max(tl.where(is_mine, at, -2), 0))
            origin = tl.where(node == current, mine, origin)
            at = _first_child(parents, candidate, mine, num_candidates) + lane - FIRST_HEAD
            near = of_head & (lane - FIRST_HEAD < head_width) & (at < num_candidates) & is_used
            own = tl.load(head_score_ptr + mine, mask=mine >= 0, other=0.0)
            believed = tl.load(head_score_ptr + at, mask=near, other=float("-inf")) - own + tl.log(1.0 - confidence)
            near = near & (believed > float("-inf"))
            child = tl.where(near, tl.load(head_token_ptr + at, mask=near, other=-1).to(tl.int32), child)
            has_child = has_child | near

        # A token that several lanes name is the first one's child, with the shares of all.
        same = (child[:, None] == child[None, :]) & has_child[:, None] & has_child[None, :]
        p = tl.sum(tl.where(same, share[None, :], 0.0), 1)
        is_first = has_child & (tl.min(tl.where(same, lane[None, :], LANES), 1) == lane)
        p = tl.where(is_first & (p > 0.0), p, 0.0)
        is_child = p > 0.0
        rest = tl.log(tl.maximum(1.0 - tl.sum(p, 0), REST)) / scale
        value = tl.log(tl.where(is_child, p, 1.0)) / scale
        if COUPLED:
            value += tl.where(is_noisy, gumbel(noise_key(seed, base + d), child), 0.0)
        value = tl.where(is_child, value, float("-inf"))
        top = tl.maximum(tl.max(value, 0), rest)
        log_sum = top + tl.log(tl.exp(rest - top) + tl.sum(tl.exp(value - top), 0))
        value = tl.where(is_child, value - log_sum, float("-inf"))
        if HAS_HEAD:
            value = tl.where(is_child, value + tl.log(tl.where(is_noisy, GRAFT_TRUST_SAMPLED, GRAFT_TRUST)), value)
            of_any = tl.max(tl.where(same, believed[None, :], float("-inf")), 1)
            value = tl.where(is_first, tl.maximum(value, of_any), float("-inf"))
        value += node_score

        here = (node == current)[:, None]
        frontier_token = tl.where(here, child[None, :], frontier_token)
        frontier_score = tl.where(here, value[None, :], tl.where(is_chain, float("-inf"), frontier_score))
        best = tl.max(tl.max(frontier_score, 1), 0)
        at = tl.min(tl.min(tl.where(frontier_score == best, place, BLOCK_NODES * LANES), 1), 0)
        is_found = best > float("-inf")
        won = place == at
        new_token = tl.sum(tl.sum(tl.where(won, frontier_token, 0), 1), 0)
        new_parent = tl.where(is_found, at // LANES, current)
        is_new = node == current + 1
        token = tl.where(is_new, tl.where(is_found, new_token, 0), token)
        score = tl.where(is_new, tl.where(is_found, best, 0.0), score)
        num_used = tl.where(is_found, current + 2, num_used)
        depth = tl.where(is_new, _at(depth, node, new_parent) + 1, depth)
        parent = tl.where(is_new, new_parent, parent)
        mask = tl.where(is_new, _at(mask, node, new_parent) | (tl.full([], 1, tl.int64) << (current + 1)), mask)
        frontier_score = tl.where(won, float("-inf"), frontier_score)

    # The nodes that were not asked for continue as a chain.
    beyond = node > num_nodes
    token = tl.where(beyond, 0, token)
    parent = tl.where(beyond, node - 1, parent)
    depth = tl.where(beyond, _at(depth, node, num_nodes) + node - num_nodes, depth)
    bits = ((tl.full([BLOCK_NODES], 1, tl.int64) << tl.maximum(node - num_nodes, 0)) - 1) << (num_nodes + 1)
    mask = tl.where(beyond, _at(mask, node, num_nodes) | bits, mask)
    inside = node <= SIZE
    row = b * (SIZE + 1)
    tl.store(tokens_out_ptr + b * SIZE + node - 1, token.to(tl.int64), mask=inside & (node >= 1))
    tl.store(parent_out_ptr + row + node, parent, mask=inside)
    tl.store(depth_out_ptr + row + node, depth, mask=inside)
    tl.store(mask_out_ptr + row + node, mask, mask=inside)


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
    """Return tokens int64 ``[B, N]``, parent int32, depth int32, ancestor_mask int64 ``[B, N1]`` of grown trees.

    matches int32 ``[B, MATCHES]``; request int64, base int32, temperature fp32, seed int64, chain int32 ``[B]``; owner
    int64 ``[R]``, text int32 ``[R, Lmax]`` with contiguous rows; N = size; head's candidates contiguous, or None. See
    `reference_recycle.recycle_tree`.
    """
    batch, device = len(request), request.device
    tokens = torch.empty((batch, size), dtype=torch.int64, device=device)
    parent = torch.empty((batch, size + 1), dtype=torch.int32, device=device)
    depth = torch.empty_like(parent)
    mask = torch.empty((batch, size + 1), dtype=torch.int64, device=device)
    if batch > 0:
        block_nodes = triton.next_power_of_2(size + 1)
        _tree_kernel[(batch,)](
            *table,
            matches,
            request,
            base,
            temperature,
            seed,
            chain,
            owner,
            text,
            *(head or (None, None, None)),
            tokens,
            parent,
            depth,
            mask,
            text.stride(0),
            len(text),
            num_nodes,
            head.score.shape[1] if head else 0,
            head_width,
            COUPLED=coupled,
            HAS_HEAD=head is not None,
            HALF=len(table.owner) // 2,
            SIZE=size,
            BLOCK_NODES=block_nodes,
            BLOCK_HEAD=triton.next_power_of_2(head.score.shape[1]) if head else 1,
            num_warps=2 if block_nodes <= 32 else 4,
            # Unless told so, ptxas spills a few registers to fit one more block on a multiprocessor.
            maxnreg=255,
        )
    return tokens, parent, depth, mask
