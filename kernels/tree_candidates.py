# SPDX-License-Identifier: Apache-2.0
"""A head's logits to the candidates of a tree, two launches per level, nothing of the vocabulary's size written.

`_child_scores_kernel`: a program holds the scores of 16 or 32 (request, parent) rows for 256 or more entries of the
vocabulary in registers: logits, plus the transition bias as one small matrix product, plus the target's noise, computed
on the spot, over the scale. It leaves per row and split the best `width` entries in order and the sum for the softmax.
Rows of several requests share a tile, so that a tile of transition_out is read once for all of them, and parents of one
request share its noise.

`_select_kernel`: a program per request merges the splits: the best entry of a row is the best of the splits' heads, and
a split whose head is taken moves to its next. The children's scores become the level's candidates; the best, or those
at fixed places, become the next level's parents.

Equal scores: lowest entry first, then lowest candidate.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from vllm_kvspec.kernels.gumbel_noise import gumbel, noise_key
from vllm_kvspec.kernels.reference_candidates import Candidates, Level, Parents, RankingScales, expand

# More heads of splits than this (times parents) would not fit in the second kernel's registers.
MAX_SPLITS = 512
# Parents per program of the second kernel, and the most that can be ranked.
MAX_BEAM = 8


@triton.jit
def _bias(
    transition_in_ptr,
    transition_out_ptr,
    gate_ptr,
    token,
    entry,
    inside,
    in_rows,
    stride_in,
    stride_out,
    HAS_GATE: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    ROWS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """(transition_in[token] * gate) . transition_out[entry] as fp32 [ROWS, SPLIT]; `gate_ptr` [ROWS, 1]."""
    bias = tl.zeros([ROWS, SPLIT], tl.float32)
    for k0 in range(0, RANK, BLOCK_RANK):
        k = k0 + tl.arange(0, BLOCK_RANK)
        in_rank = k < RANK
        rows = tl.load(transition_in_ptr + token[:, None] * stride_in + k[None, :], mask=in_rank[None, :], other=0.0)
        if HAS_GATE:
            gate = tl.load(gate_ptr + k[None, :], mask=in_rows[:, None] & in_rank[None, :], other=0.0)
            rows = (rows.to(tl.float32) * gate.to(tl.float32)).to(rows.dtype)
        columns = tl.load(
            transition_out_ptr + entry[None, :].to(tl.int64) * stride_out + k[:, None],
            mask=inside[None, :] & in_rank[:, None],
            other=0.0,
        )
        # fp32 factors as three products on the tensor cores: fp32's accuracy, and the plain cores would spill.
        bias = tl.dot(rows, columns.to(rows.dtype), bias, input_precision="tf32x3")
    return bias


@triton.jit(do_not_specialize=["depth", "num_parents", "batch"])
def _child_scores_kernel(
    logits_ptr,
    parent_token_ptr,
    transition_in_ptr,
    transition_out_ptr,
    gate_ptr,
    draft_ids_ptr,
    base_ptr,
    idx_mapping_ptr,
    temperature_ptr,
    seeds_ptr,
    value_ptr,
    entry_ptr,
    sum_ptr,
    stride_logits_b,
    stride_logits_p,
    stride_logits_v,
    stride_in,
    stride_out,
    stride_gate_b,
    stride_gate_p,
    stride_ids,
    batch,
    num_parents,
    depth,
    greedy_scale,
    coupled_scale,
    num_entries,
    num_splits,
    COUPLED: tl.constexpr,
    SHARED_LOGITS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_GATE: tl.constexpr,
    HAS_DRAFT_IDS: tl.constexpr,
    IDS_BY_REQUEST: tl.constexpr,
    RANK: tl.constexpr,
    BLOCK_RANK: tl.constexpr,
    WIDTH: tl.constexpr,
    ROWS: tl.constexpr,
    PARENTS: tl.constexpr,
    SPLIT: tl.constexpr,
):
    """A tile has ROWS = REQUESTS x PARENTS rows; a level with more parents than that takes several tiles."""
    REQUESTS: tl.constexpr = ROWS // PARENTS
    parent_tiles = tl.cdiv(num_parents, PARENTS)
    first_request = tl.program_id(0) // parent_tiles * REQUESTS
    first_parent = tl.program_id(0) % parent_tiles * PARENTS
    split = tl.program_id(1)
    row = tl.arange(0, ROWS)
    request = first_request + row // PARENTS
    parent = first_parent + row % PARENTS
    in_rows = (request < batch) & (parent < num_parents)
    flat_row = request.to(tl.int64) * num_parents + parent
    column = tl.arange(0, SPLIT)
    entry = split * SPLIT + column
    inside = entry < num_entries

    # What the parents of a request have in common, [REQUESTS, SPLIT].
    owner = first_request + tl.arange(0, REQUESTS)
    in_batch = owner < batch
    state = tl.load(idx_mapping_ptr + owner, mask=in_batch, other=0).to(tl.int64)
    temperature = tl.load(temperature_ptr + state, mask=in_batch, other=0.0)
    common = tl.zeros([REQUESTS, SPLIT], tl.float32)
    if SHARED_LOGITS:
        offset = owner[:, None].to(tl.int64) * stride_logits_b + entry[None, :].to(tl.int64) * stride_logits_v
        common = tl.load(logits_ptr + offset, mask=in_batch[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if COUPLED:
        if tl.max(temperature, 0) > 0.0:
            token = entry[None, :]
            if IDS_BY_REQUEST:
                offset = owner[:, None].to(tl.int64) * stride_ids + entry[None, :]
                token = tl.load(draft_ids_ptr + offset, mask=in_batch[:, None] & inside[None, :], other=0)
            elif HAS_DRAFT_IDS:
                token = tl.load(draft_ids_ptr + entry, mask=inside, other=0)[None, :]
            seed = tl.load(seeds_ptr + state, mask=in_batch, other=0)
            position = tl.load(base_ptr + owner, mask=in_batch, other=0) + depth
            noise = gumbel(noise_key(seed, position)[:, None], token)
            common += tl.where(temperature[:, None] > 0.0, temperature[:, None] * noise, 0.0)
        inverse_scale = 1.0 / tl.where(temperature > 0.0, coupled_scale, greedy_scale)
    else:
        inverse_scale = 1.0 / tl.where(temperature > 0.0, temperature, greedy_scale)

    score = tl.reshape(tl.broadcast_to(common[:, None, :], [REQUESTS, PARENTS, SPLIT]), [ROWS, SPLIT])
    if not SHARED_LOGITS:
        row_offset = request.to(tl.int64) * stride_logits_b + parent.to(tl.int64) * stride_logits_p
        offset = row_offset[:, None] + entry[None, :].to(tl.int64) * stride_logits_v
        score += tl.load(logits_ptr + offset, mask=in_rows[:, None] & inside[None, :], other=0.0).to(tl.float32)
    if HAS_BIAS:
        token = tl.load(parent_token_ptr + flat_row, mask=in_rows, other=0)
        gates = gate_ptr
        if HAS_GATE:
            gates += (request.to(tl.int64) * stride_gate_b + parent.to(tl.int64) * stride_gate_p)[:, None]
        score += _bias(
            transition_in_ptr, transition_out_ptr, gates, token, entry, inside, in_rows, stride_in, stride_out,
            HAS_GATE, RANK, BLOCK_RANK, ROWS, SPLIT,
        )  # fmt: skip
    score *= tl.reshape(tl.broadcast_to(inverse_scale[:, None], [REQUESTS, PARENTS]), [ROWS])[:, None]
    # NaN counts as -inf: the comparisons below must not meet it.
    score = tl.where(inside[None, :] & (score == score), score, float("-inf"))

    top = tl.max(score, 1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    tl.store(sum_ptr + flat_row * num_splits + split, tl.sum(tl.exp(score - shift[:, None]), 1), mask=in_rows)
    out = flat_row * WIDTH * num_splits + split
    for _ in range(WIDTH):
        best, at = tl.max(score, 1, return_indices=True)
        tl.store(value_ptr + out, best, mask=in_rows)
        tl.store(entry_ptr + out, split * SPLIT + at, mask=in_rows)
        score = tl.where(column[None, :] == at[:, None], float("-inf"), score)
        out += num_splits


@triton.jit(do_not_specialize=["num_parents", "offset", "num_candidates", "num_next", "stride_rows_b", "stride_rows_p"])
def _select_kernel(
    value_ptr,
    entry_ptr,
    sum_ptr,
    draft_ids_ptr,
    idx_mapping_ptr,
    chain_ptr,
    slots_ptr,
    parent_score_ptr,
    parent_index_ptr,
    score_out_ptr,
    token_out_ptr,
    parent_out_ptr,
    next_token_ptr,
    next_score_ptr,
    next_index_ptr,
    stride_rows_b,
    stride_rows_p,
    stride_ids,
    num_parents,
    num_splits,
    num_candidates,
    offset,
    num_next,
    HAS_DRAFT_IDS: tl.constexpr,
    IDS_BY_PARENT: tl.constexpr,
    HAS_CHAIN: tl.constexpr,
    HAS_SLOTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
    PARENTS: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Row ``b * stride_rows_b + p * stride_rows_p`` of the splits' results belongs to parent p of request b."""
    b = tl.program_id(0).to(tl.int64)
    parent = tl.program_id(1) * PARENTS + tl.arange(0, PARENTS)
    in_parents = parent < num_parents
    row = b * stride_rows_b + parent * stride_rows_p
    split = tl.arange(0, SPLITS)
    inside = in_parents[:, None] & (split[None, :] < num_splits)
    # Of each row and split: its best entry not taken yet.
    first = value_ptr + row[:, None] * WIDTH * num_splits + split[None, :]
    head = tl.load(first, mask=inside, other=float("-inf"))
    sums = tl.load(sum_ptr + row[:, None] * num_splits + split[None, :], mask=inside, other=0.0)
    top = tl.max(head, 1)
    shift = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(sums * tl.exp(head - shift[:, None]), 1)
    log_sum = shift + tl.log(tl.where(top == float("-inf"), 1.0, total))
    parent_score = tl.load(parent_score_ptr + b * num_parents + parent, mask=in_parents, other=float("-inf"))

    rank = tl.arange(0, BLOCK_WIDTH)
    score = tl.full([PARENTS, BLOCK_WIDTH], float("-inf"), tl.float32)
    token = tl.zeros([PARENTS, BLOCK_WIDTH], tl.int64)
    taken = tl.zeros([PARENTS, SPLITS], tl.int32)
    for i in range(WIDTH):
        best, winner = tl.max(head, 1, return_indices=True)
        # As often as a split has won, as far is its list used up.
        won = split[None, :] == winner[:, None]
        place = tl.sum(tl.where(won, taken, 0), 1)
        at = (row * WIDTH + place) * num_splits + winner
        entry = tl.load(entry_ptr + at, mask=in_parents, other=0).to(tl.int64)
        child = parent_score + tl.where(best == float("-inf"), float("-inf"), best - log_sum)
        score = tl.where(rank[None, :] == i, child[:, None], score)
        token = tl.where(rank[None, :] == i, entry[:, None], token)
        taken += won.to(tl.int32)
        has_more = in_parents & (place + 1 < WIDTH)
        following = tl.load(value_ptr + at + num_splits, mask=has_more, other=float("-inf"))
        head = tl.where(won, following[:, None], head)

    # [PARENTS, BLOCK_WIDTH]
    real = in_parents[:, None] & (rank[None, :] < WIDTH)
    candidate = parent[:, None] * WIDTH + rank[None, :]
    if IDS_BY_PARENT:
        token = tl.load(draft_ids_ptr + row[:, None] * stride_ids + token, mask=real, other=0)
    elif HAS_DRAFT_IDS:
        token = tl.load(draft_ids_ptr + token, mask=real, other=0)
    score = tl.where(real & (score == score), score, float("-inf"))
    if HAS_CHAIN:
        state = tl.load(idx_mapping_ptr + b).to(tl.int64)
        is_chain = tl.load(chain_ptr + state) != 0
        score = tl.where(is_chain & (candidate > 0), float("-inf"), score)
    index = tl.load(parent_index_ptr + b * num_parents + parent, mask=in_parents, other=-1)
    out = b * num_candidates + offset + candidate
    tl.store(score_out_ptr + out, score, mask=real)
    tl.store(token_out_ptr + out, token, mask=real)
    tl.store(parent_out_ptr + out, tl.broadcast_to(index[:, None], [PARENTS, BLOCK_WIDTH]), mask=real)

    if HAS_SLOTS:
        slot = tl.load(slots_ptr + candidate, mask=real, other=-1)
        at_slot = b * num_next + slot
        tl.store(next_token_ptr + at_slot, token, mask=slot >= 0)
        tl.store(next_score_ptr + at_slot, score, mask=slot >= 0)
        tl.store(next_index_ptr + at_slot, offset + candidate, mask=slot >= 0)
    else:
        flat: tl.constexpr = PARENTS * BLOCK_WIDTH
        scores = tl.reshape(score, [flat])
        tokens = tl.reshape(token, [flat])
        candidates = tl.reshape(candidate, [flat])
        left = tl.reshape(real, [flat])
        for slot in range(num_next):
            # Only candidates that are left, also when nothing but -inf is.
            best = tl.max(tl.where(left, scores, float("-inf")), 0)
            chosen = tl.min(tl.where(left & (scores == best), candidates, 2147483647), 0)
            won = candidates == chosen
            tl.store(next_token_ptr + b * num_next + slot, tl.sum(tl.where(left & won, tokens, 0), 0))
            tl.store(next_score_ptr + b * num_next + slot, best)
            tl.store(next_index_ptr + b * num_next + slot, offset + chosen)
            left = left & (candidates != chosen)


def tile_config(num_rows: int, num_entries: int, dtype: torch.dtype) -> dict[str, int]:
    """Sizes of the first kernel for ``num_rows`` rows in the batch and scores or products of ``dtype``."""
    split = 256
    while split < 1024 and triton.cdiv(num_entries, split) > MAX_SPLITS:
        split *= 2
    # The largest tiles without spills (tests/kernels/test_compile.py): the noise and fp32 products take many registers.
    wide = dtype == torch.float32
    rows = min(max(16, triton.next_power_of_2(num_rows)), max(16, (4096 if wide else 8192) // split))
    num_warps = min(max(rows * split // 512, 4), 8 if wide else 16)
    block_rank = 16 if wide else 8192 // split
    # All the registers there are: unless told so, ptxas spills a few to fit one more block on a multiprocessor.
    maxnreg = min(255, 65536 // (32 * num_warps))
    return dict(ROWS=rows, SPLIT=split, BLOCK_RANK=block_rank, num_warps=num_warps, num_stages=3, maxnreg=maxnreg)


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
    """Write the candidates of one level, return the next level's parents; see `reference_candidates.tree_level`.

    logits ``[B, P, Vd]``; parents ``[B, P]`` and candidates ``[B, M]`` contiguous; transition_in ``[V, r]`` and
    transition_out ``[Vd, r]`` with contiguous rows; base and idx_mapping int ``[B]``; temperature fp32, seeds int64 and
    chain int or bool ``[R]``; draft_ids int64 ``[Vd]``, or contiguous ``[B, P, Vd]``, with logits contiguous in B, P;
    gate ``[B, P, r]`` with stride 1 in r, or None. Raises ValueError when more than 8 parents are to be ranked.
    """
    batch, num_parents, num_entries = logits.shape
    _check_level(level, num_parents)
    has_bias = transition_in is not None and transition_in.shape[1] > 0
    has_gate = has_bias and gate is not None
    shared_logits = logits.stride(1) == 0 or num_parents == 1
    # Without a bias, parents that share logits have the same children: one row serves them all.
    num_rows = 1 if shared_logits and not has_bias else num_parents
    # Parents with tokens of their own count as requests of one parent.
    by_parent = draft_ids is not None and draft_ids.dim() == 3
    requests, row_stride = (batch * num_parents, logits.stride(1)) if by_parent else (batch, logits.stride(0))
    # Contiguous: of a single request it would be a view with stride 0.
    state, position = (
        x[:, None].expand(-1, num_parents).flatten().contiguous() if by_parent else x for x in (idx_mapping, base)
    )
    each = 1 if by_parent else num_rows
    rows_in_batch = batch * triton.next_power_of_2(num_rows)
    config = tile_config(rows_in_batch, num_entries, transition_in.dtype if has_bias else logits.dtype)
    num_splits = triton.cdiv(num_entries, config["SPLIT"])
    shape, device = (batch, num_rows, level.width, num_splits), logits.device
    value = torch.empty(shape, dtype=torch.float32, device=device)
    entry = torch.empty(shape, dtype=torch.int32, device=device)
    sums = torch.empty((batch, num_rows, num_splits), dtype=torch.float32, device=device)
    next_shape = (batch, level.num_next)
    following = Parents(
        *(torch.empty(next_shape, dtype=dtype, device=device) for dtype in (torch.int64, torch.float32, torch.int32))
    )
    if batch > 0:
        parents_per_tile = min(triton.next_power_of_2(each), config["ROWS"])
        tiles = triton.cdiv(requests * parents_per_tile, config["ROWS"]) * triton.cdiv(each, parents_per_tile)
        _child_scores_kernel[(tiles, num_splits)](
            logits,
            parents.token,
            transition_in,
            transition_out,
            gate,
            draft_ids,
            position,
            state,
            temperature,
            seeds,
            value,
            entry,
            sums,
            row_stride,
            logits.stride(1),
            logits.stride(2),
            transition_in.stride(0) if has_bias else 0,
            transition_out.stride(0) if has_bias else 0,
            gate.stride(0) if has_gate else 0,
            gate.stride(1) if has_gate else 0,
            num_entries if by_parent else 0,
            requests,
            each,
            depth,
            scales.greedy,
            scales.coupled,
            num_entries,
            num_splits,
            COUPLED=coupled,
            SHARED_LOGITS=shared_logits or by_parent,
            HAS_BIAS=has_bias,
            HAS_GATE=has_gate,
            HAS_DRAFT_IDS=draft_ids is not None,
            IDS_BY_REQUEST=by_parent,
            RANK=transition_in.shape[1] if has_bias else 0,
            WIDTH=level.width,
            PARENTS=parents_per_tile,
            **config,
        )
        block = min(triton.next_power_of_2(num_parents), MAX_BEAM)
        splits = triton.next_power_of_2(num_splits)
        _select_kernel[(batch, triton.cdiv(num_parents, block))](
            value,
            entry,
            sums,
            draft_ids,
            idx_mapping,
            chain,
            level.slots,
            parents.score,
            parents.index,
            *candidates,
            *following,
            num_rows,
            0 if num_rows < num_parents else 1,
            num_entries if by_parent else 0,
            num_parents,
            num_splits,
            candidates.score.shape[1],
            offset,
            level.num_next,
            HAS_DRAFT_IDS=draft_ids is not None,
            IDS_BY_PARENT=by_parent,
            HAS_CHAIN=chain is not None,
            HAS_SLOTS=level.slots is not None,
            WIDTH=level.width,
            BLOCK_WIDTH=triton.next_power_of_2(level.width),
            PARENTS=block,
            SPLITS=splits,
            num_warps=min(max(block * splits // 512, 4), 16),
        )
    return following if level.num_next > 0 else None


def _check_level(level: Level, num_parents: int) -> None:
    if level.num_parents != num_parents:
        raise ValueError(
            f"logits must have one row per parent of the level ({level.num_parents}), found {num_parents}; expand them."
        )
    if level.slots is None and level.num_next > 0 and num_parents > MAX_BEAM:
        raise ValueError(
            f"At most {MAX_BEAM} parents of a level can be ranked, found {num_parents}; use a smaller beam."
        )


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
    """Candidates of a tree per request from one pass of a head; see `reference_candidates.tree_candidates`.

    depth_logits ``[B, G, Vd]`` of any float dtype and strides, anchor int64 ``[B]``, levels from ``plan_levels`` or a
    fixed shape, gate ``[B, G, r]`` or None, everything else as in `tree_level`. Returns score fp32, token int64, parent
    int32 ``[B, M]``.
    """
    return expand(
        tree_level, depth_logits, anchor, transition_in, transition_out,
        levels=levels, base=base, idx_mapping=idx_mapping, temperature=temperature, seeds=seeds, coupled=coupled,
        scales=scales, chain=chain, draft_ids=draft_ids, gate=gate,
    )  # fmt: skip
