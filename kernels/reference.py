# SPDX-License-Identifier: Apache-2.0
"""Torch twin of every launcher in this directory, same names and signatures: the executable specification.

A kernel is right when it agrees with its twin here. On CPU the engine runs the cheap ones of these twins and compiled
versions of the others, so they are vectorised and read small index tensors to the host (free on CPU, never done by the
launchers). Imports torch only.

Words. A tree has nodes 0..N; node 0 (the root) is the last sampled token, at flat position ``base``; N1 = N + 1,
at most 64. ``parent[t] < t``; ``depth[t]`` counts edges to the root; bit j of ``ancestor_mask[t]`` is set iff j == t or
j is an ancestor of t, so bit 0 is always set and ``depth = popcount(mask) - 1``. B requests are in the batch,
``idx_mapping[b]`` is the row of request b in the request-state tensors (R rows). Request b owns the logits rows
``cu_num_logits[b] : cu_num_logits[b + 1]``; its row i is node i of its tree.
"""

import math

import torch
import torch.nn.functional as F

# Integer type of each width: moving bytes must not depend on what a dtype supports on CPU.
_INTEGER_OF_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def tree_inputs(
    positions: torch.Tensor,
    logits_indices: torch.Tensor,
    cu_num_logits: torch.Tensor,
    idx_mapping: torch.Tensor,
    depth: torch.Tensor,
    ancestor_mask: torch.Tensor,
    *,
    batch_mask: torch.Tensor,
    batch_len: torch.Tensor,
    local_pos: torch.Tensor,
) -> None:
    """Prepare one step's verification rows: true positions and the batch-indexed ancestor masks.

    Request b has n = cu_num_logits[b+1] - cu_num_logits[b] rows. With n > 1 it verifies a tree: its rows get positions
    ``base + depth`` (base = the position its first row had), ``batch_mask[b, :n]`` its masks and ``batch_len[b] = n``.
    With n <= 1 there is no tree: ``batch_len[b] = 0``, positions stay, ``local_pos`` is 0.

    Args:
        positions: int64 ``[T]``, flat positions of all scheduled rows; changed in place.
        logits_indices: int64 ``[L]``, row of ``positions`` behind each logits row.
        cu_num_logits: int32 ``[B+1]``.
        idx_mapping: int ``[B]``.
        depth: int32 ``[R, N1]``.
        ancestor_mask: int64 ``[R, N1]``.
        batch_mask: int64 ``[Rmax, N1]``, written; columns >= n and rows without a tree keep their old content.
        batch_len: int32 ``[Rmax]``, written; 0 for b >= B.
        local_pos: int32 ``[L]``, written: depth of each logits row's node.
    """
    batch_len.zero_()
    starts = cu_num_logits.tolist()
    for b, r in enumerate(idx_mapping.tolist()):
        start, end = starts[b], starts[b + 1]
        n = end - start
        if n <= 1:
            local_pos[start:end] = 0
            continue
        rows = logits_indices[start:end]
        positions[rows] = positions[rows[:1]] + depth[r, :n]
        local_pos[start:end] = depth[r, :n]
        batch_mask[b, :n] = ancestor_mask[r, :n]
        batch_len[b] = n


def tree_walk(
    sampled: torch.Tensor,
    draft_tokens: torch.Tensor,
    parent: torch.Tensor,
    cu_num_logits: torch.Tensor,
    idx_mapping: torch.Tensor,
    score: torch.Tensor | None = None,
    window: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Walk each request's tree along the target's own samples.

    From the root: emit the token sampled at the current node, then go to its lowest-index child that carries exactly
    this token; stop when there is none. Lossless for any tree, since every emitted token is the target's sample.

    With ``score`` (FLy, arXiv 2511.22972; lossy): where no child carries the sampled token, go on to a child below
    which the samples lead through at least ``window`` more nodes, to that of the highest score, and emit its token
    instead. On a chain this is the paper's rule: a mismatch passes if the window behind it holds no other one.

    Args:
        sampled: int64 ``[L]``, the target's token of each logits row.
        draft_tokens: int ``[L]``, the drafted token of each row (of row 0: the root's); negative is never accepted.
        parent: int32 ``[R, N1]``.
        cu_num_logits: int32 ``[B+1]``.
        idx_mapping: int ``[B]``.
        score: fp32 ``[L]`` from `reference_loose.loose_scores`; -inf where a node must not be gone to. None: lossless.
        window: nodes that must follow, see above.

    Returns:
        tokens: int64 ``[B, N1]``, emitted tokens, -1 beyond them.
        num_sampled: int32 ``[B]``, 1 + accepted nodes; 0 for a request without rows.
        path: int32 ``[B, N1]``, node at depth d of the accepted path; d itself beyond it.
    """
    num_reqs, num_nodes = idx_mapping.shape[0], parent.shape[1]
    tokens = torch.full((num_reqs, num_nodes), -1, dtype=torch.int64, device=sampled.device)
    path = torch.arange(num_nodes, dtype=torch.int32, device=sampled.device).repeat(num_reqs, 1)
    num_sampled = torch.zeros(num_reqs, dtype=torch.int32, device=sampled.device)
    starts = cu_num_logits.tolist()
    for b, r in enumerate(idx_mapping.tolist()):
        rows = slice(starts[b], starts[b + 1])
        scores = None if score is None else score[rows].tolist()
        emitted, nodes = _walk_one(
            sampled[rows].tolist(), draft_tokens[rows].tolist(), parent[r].tolist(), scores, window
        )
        num_sampled[b] = len(emitted)
        tokens[b, : len(emitted)] = torch.tensor(emitted, dtype=torch.int64)
        path[b, : len(nodes)] = torch.tensor(nodes, dtype=torch.int32)
    return tokens, num_sampled, path


def _walk_one(
    sampled: list[int], draft: list[int], parent: list[int], score: list[float] | None, window: int
) -> tuple[list[int], list[int]]:
    emitted: list[int] = []
    nodes: list[int] = []
    run = [] if score is None else _native_runs(sampled, draft, parent)
    node = 0 if sampled else None
    while node is not None:
        nodes.append(node)
        children = [t for t in range(node + 1, len(sampled)) if parent[t] == node and draft[t] >= 0]
        native = [t for t in children if draft[t] == sampled[node]]
        loose = [t for t in children if score is not None and run[t] >= window and score[t] > -math.inf]
        following = native[0] if native else max(loose, key=score.__getitem__) if loose else None
        emitted.append(sampled[node] if following is None else draft[following])
        node = following
    return emitted, nodes


def _native_runs(sampled: list[int], draft: list[int], parent: list[int]) -> list[int]:
    """Of each node, how many nodes a walk along the samples from there accepts."""
    run = [0] * len(sampled)
    # Children come after their parent. Of two with the same token the walk takes the first, which is written last.
    for t in range(len(sampled) - 1, 0, -1):
        if 0 <= draft[t] == sampled[parent[t]]:
            run[parent[t]] = run[t] + 1
    return run


def kv_base_ptrs(kv_caches: list[torch.Tensor]) -> torch.Tensor:
    """Device table of the caches' base addresses, int64 ``[num_layers]``, for `kv_compact`; make it once at start.

    Raises ValueError unless all caches share shape, strides, dtype and device, are 4-dimensional
    ``[num_blocks, num_kv_heads, block_size, content]``, have content stride 1 and start at multiples of 16 bytes.
    """
    first = kv_caches[0]
    for cache in kv_caches:
        same = (cache.shape, cache.stride(), cache.dtype, cache.device)
        if same != (first.shape, first.stride(), first.dtype, first.device):
            raise ValueError(
                "kv_compact needs KV caches of one shape, strides, dtype and device, found "
                f"{tuple(cache.shape)}/{cache.stride()}/{cache.dtype} beside "
                f"{tuple(first.shape)}/{first.stride()}/{first.dtype}; call it once per group of equal caches."
            )
    if first.dim() != 4 or first.stride(3) != 1:
        raise ValueError(
            "kv_compact needs caches [num_blocks, num_kv_heads, block_size, content] with content stride 1, found "
            f"shape {tuple(first.shape)}, strides {first.stride()}; pass the logical view of the cache."
        )
    addresses = [cache.data_ptr() for cache in kv_caches]
    if any(address % 16 for address in addresses):
        raise ValueError(
            "kv_compact needs caches that start at a multiple of 16 bytes; pass the whole cache, not a slice."
        )
    return torch.tensor(addresses, dtype=torch.int64, device=first.device)


def kv_compact(
    kv_caches: list[torch.Tensor],
    base_ptrs: torch.Tensor,
    block_table: torch.Tensor,
    base: torch.Tensor,
    path: torch.Tensor,
    num_sampled: torch.Tensor,
) -> None:
    """Move the accepted path's KV rows to contiguous positions, in every cache.

    For d = 1 .. num_sampled[b] - 1, ascending, the row (all heads, whole content) of position ``base[b] + path[b, d]``
    is copied to position ``base[b] + d``. Position p lives in block ``block_table[b, p // block_size]``, slot
    ``p % block_size``. Bytes are moved, so any dtype works.

    Args:
        kv_caches: tensors ``[num_blocks, num_kv_heads, block_size, content]``, equal in shape, strides and dtype.
        base_ptrs: int64 ``[num_layers]``, ``kv_base_ptrs(kv_caches)``.
        block_table: int32 ``[>=B, M]``.
        base: int64 ``[B]``, flat position of the root.
        path: int32 ``[B, N1]``, strictly increasing with ``path[b, d] >= d``.
        num_sampled: int32 ``[B]``, 0 and 1 move nothing.
    """
    block_size = kv_caches[0].shape[2]
    depths = torch.arange(path.shape[1], device=path.device)
    moved = (depths > 0) & (depths < num_sampled[:, None]) & (path != depths)
    req, d = moved.nonzero(as_tuple=True)
    if req.numel() == 0:
        return
    src, dst = base[req] + path[req, d], base[req] + d
    # A source is never an earlier destination (path[d] >= d): reading all rows first equals ascending copies.
    src_block, dst_block = block_table[req, src // block_size].long(), block_table[req, dst // block_size].long()
    for cache in kv_caches:
        rows = cache.view(_INTEGER_OF_WIDTH[cache.element_size()])
        rows[dst_block, :, dst % block_size] = rows[src_block, :, src % block_size]


def tree_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    query_start_loc: torch.Tensor,
    seq_lens: torch.Tensor,
    batch_mask: torch.Tensor,
    batch_len: torch.Tensor,
    *,
    scale: float,
    max_query_len: int,
    sliding_window: int = 0,
    q_scale: float | torch.Tensor = 1.0,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
    out: torch.Tensor,
) -> torch.Tensor:
    """Attention of scheduled rows over the paged KV cache: causal, with an ancestor mask among tree rows.

    Request b has n query rows, sequence length s (these rows included) and a tree of T = batch_len[b] nodes in its last
    T rows (0: none). Query row i sees key j iff ``j <= s - n + i``, except that a tree row (``i >= n - T``) sees a tree
    key (``j >= s - T``) iff bit ``j - (s - T)`` of ``batch_mask[b, i - (n - T)]`` is set. With ``sliding_window`` W > 0
    also ``true(row) - true(key) < W``, where the true position of a tree node is ``s - T + depth`` and of any other row
    its flat position. With ``soft_cap`` c > 0 a scaled score x becomes ``c * tanh(x / c)`` (Gemma 2). With ``sinks``
    the softmax of head h has one more score, ``sinks[h]``, neither scaled nor capped, which takes its share of the
    weights and brings no value (gpt-oss).

    Args:
        q: ``[T, Hq, D]``, possibly fp8; may have padding rows past ``query_start_loc[B]``.
        k_cache, v_cache: ``[num_blocks, block_size, Hkv, D]``, any strides, possibly another dtype than q.
        block_table: int32 ``[>=B, M]``.
        query_start_loc: int32 ``[>=B+1]``; a request with no query rows is skipped.
        seq_lens: int32 ``[B]``.
        batch_mask: int64 ``[Rmax, N1]``.
        batch_len: int32 ``[Rmax]``.
        scale: factor of the scores.
        max_query_len: largest n of the batch (an upper bound is enough); sizes the launch.
        sliding_window: W in tokens, 0 for none.
        q_scale, k_scale, v_scale: factors of queries, cached keys and values, float or 1-element tensor.
        soft_cap: c, 0 for none.
        sinks: ``[Hq]``, any float dtype, or None.
        out: ``[T, Hq, D]``, written for real rows only; its dtype is that of the products, whatever q's is.

    Returns:
        out. Scores and sums are accumulated in fp32 (fp64 for fp64 inputs).
    """
    seqs = seq_lens.tolist()
    starts = query_start_loc.tolist()
    trees = batch_len.tolist()
    for b, seq_len in enumerate(seqs):
        start, end = starts[b], starts[b + 1]
        if start == end:
            continue
        visible = _tree_visibility(end - start, seq_len, trees[b], batch_mask[b], sliding_window)
        # With a sliding window the blocks behind it may already belong to others: never read them.
        first = max(0, seq_len - (end - start) - sliding_window + 1) if sliding_window > 0 else 0
        k = _gather_paged(k_cache, block_table[b], first, seq_len, out.dtype, k_scale)
        v = _gather_paged(v_cache, block_table[b], first, seq_len, out.dtype, v_scale)
        rows = q[start:end].to(out.dtype) * q_scale
        out[start:end] = _attend(rows, k, v, visible[:, first:], scale, soft_cap, sinks)
    return out


def _tree_visibility(n: int, seq_len: int, tree: int, mask: torch.Tensor, window: int) -> torch.Tensor:
    """Bool ``[n, seq_len]``: which keys each query row may see."""
    keys = torch.arange(seq_len, device=mask.device)
    visible = keys <= keys[seq_len - n :, None]
    true_pos = keys
    if tree > 0:
        bits = ((mask[:tree, None] >> torch.arange(tree, device=mask.device)) & 1).bool()
        visible[n - tree :, seq_len - tree :] = bits
        true_pos = torch.cat([keys[: seq_len - tree], seq_len - tree + bits.sum(-1) - 1])
    if window > 0:
        visible &= true_pos[seq_len - n :, None] - true_pos < window
    return visible


def paged_draft_attention(
    q: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    block_table: torch.Tensor,
    context_lens: torch.Tensor,
    k_block: torch.Tensor | None,
    v_block: torch.Tensor | None,
    *,
    scale: float,
    sliding_window: int = 0,
    causal: bool = False,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
    out: torch.Tensor,
) -> torch.Tensor:
    """Attention of the draft head's block over the target's paged KV plus the block's own, uncached K/V.

    Every one of the G query rows of request b sees the context keys ``[0, context_lens[b])`` and all G rows of its own
    block (with ``causal``, query g only rows 0..g), in one softmax. With ``sliding_window`` W > 0 query g (at position
    ``context_len + g``) sees context key j iff ``context_len + g - j < W``; the window hides no row of the block.

    Without a block of keys the rows are queries alone: all stand at the context's last position, ``context_len - 1``,
    and see the context in the window there.

    Args:
        q: ``[B, G, Hq, D]``.
        k_cache, v_cache: ``[num_blocks, block_size, Hkv, D]``, any strides, possibly another dtype than q.
        block_table: int32 ``[>=B, M]``.
        context_lens: int32 ``[>=B]``, 0 allowed where there is a block.
        k_block, v_block: ``[B, G, Hkv, D]``, or both None.
        scale: factor of the scores.
        sliding_window: W in tokens, 0 for none.
        causal: whether a block row sees only itself and earlier rows of its block.
        k_scale, v_scale: factors of the cached keys and values (not of the block's), float or 1-element tensor.
        out: ``[B, G, Hq, D]``, written.

    Returns:
        out. Scores and sums are accumulated in fp32 (fp64 for fp64 inputs).
    """
    num_reqs, block_rows = q.shape[:2]
    rows = torch.arange(block_rows, device=q.device)
    for b, context_len in enumerate(context_lens[:num_reqs].tolist()):
        if k_block is None:
            first = max(0, context_len - sliding_window) if sliding_window > 0 else 0
            k = _gather_paged(k_cache, block_table[b], first, context_len, q.dtype, k_scale)
            v = _gather_paged(v_cache, block_table[b], first, context_len, q.dtype, v_scale)
            out[b] = _attend(q[b], k, v, None, scale)
            continue
        first = min(context_len, max(0, context_len - sliding_window + 1)) if sliding_window > 0 else 0
        k = _gather_paged(k_cache, block_table[b], first, context_len, q.dtype, k_scale)
        v = _gather_paged(v_cache, block_table[b], first, context_len, q.dtype, v_scale)
        visible = None
        if sliding_window > 0 or causal:
            row, key = context_len + rows[:, None], torch.arange(first, context_len + block_rows, device=q.device)
            in_context = (row - key < sliding_window) | (sliding_window == 0)
            in_block = (key <= row) | (not causal)
            visible = torch.where(key < context_len, in_context, in_block)
        k, v = torch.cat([k, k_block[b].to(k.dtype)]), torch.cat([v, v_block[b].to(v.dtype)])
        out[b] = _attend(q[b], k, v, visible, scale)
    return out


def _gather_paged(
    cache: torch.Tensor,
    blocks: torch.Tensor,
    start: int,
    end: int,
    q_dtype: torch.dtype,
    scale: float | torch.Tensor,
) -> torch.Tensor:
    """Rows [start, end) of one request's paged cache as ``[end - start, Hkv, D]``, at least fp32, scale applied."""
    block_size = cache.shape[1]
    first_block = start // block_size
    rows = cache[blocks[first_block : -(-end // block_size)].long()].flatten(0, 1)
    rows = rows[start - first_block * block_size : end - first_block * block_size]
    rows = rows.to(torch.promote_types(q_dtype, torch.float32))
    if isinstance(scale, float) and scale == 1.0:
        return rows
    return rows * scale


def _attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    visible: torch.Tensor | None,
    scale: float,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> torch.Tensor:
    """q ``[n, Hq, D]``, k and v ``[m, Hkv, D]``, visible bool ``[n, m]`` or None -> ``[n, Hq, D]``.

    A soft-cap or sinks need `visible`.
    """
    n, num_heads, head_dim = q.shape
    num_kv_heads = k.shape[1]
    group = num_heads // num_kv_heads
    # The heads that share a KV head become more query rows, so K and V are not repeated.
    rows = q.to(k.dtype).reshape(n, num_kv_heads, group, head_dim).permute(1, 2, 0, 3)
    rows = rows.reshape(1, num_kv_heads, group * n, head_dim)
    mask = None if visible is None else visible.repeat(group, 1)
    k, v = k.transpose(0, 1)[None], v.transpose(0, 1)[None]
    if soft_cap or sinks is not None:
        scores = rows @ k.transpose(2, 3) * scale
        if soft_cap:
            scores = soft_cap * (scores / soft_cap).tanh()
        scores = scores.masked_fill(~mask, float("-inf"))
        if sinks is not None:
            sink = sinks.to(scores.dtype).view(num_kv_heads, group, 1).expand(-1, -1, n)
            scores = torch.cat([scores, sink.reshape(1, num_kv_heads, group * n, 1)], dim=-1)
        result = scores.softmax(dim=-1)[..., : k.shape[2]] @ v
    else:
        result = F.scaled_dot_product_attention(rows, k, v, attn_mask=mask, scale=scale)
    return result.view(num_kv_heads, group, n, head_dim).permute(2, 0, 1, 3).reshape(n, num_heads, head_dim).to(q.dtype)


def tree_build(
    score: torch.Tensor, token: torch.Tensor, parent: torch.Tensor, num_nodes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Keep the N = num_nodes best candidates of each request as its tree.

    Candidates are ranked by score (NaN counts as -inf), equal scores by index. A child never scores above its parent
    and comes after it, so the kept set is closed under ancestors; the candidate of rank t - 1 becomes node t, hence
    parents precede children and the first n nodes are the best tree of n nodes. A kept candidate with score -inf is
    unused: it continues as a chain (``parent = t - 1``) with token 0.

    Args:
        score: fp32 ``[B, M]``, cumulative log-probability.
        token: int64 ``[B, M]``.
        parent: int32 ``[B, M]``, candidate index of the parent, or -1 for the root.
        num_nodes: N, 1..63, at most M.

    Returns:
        tokens int64 ``[B, N]`` (nodes 1..N), parent int32 ``[B, N1]``, depth int32 ``[B, N1]``,
        ancestor_mask int64 ``[B, N1]``.

    Raises:
        ValueError: num_nodes is outside 1..63 or larger than M.
    """
    check_num_nodes(num_nodes, score.shape[1])
    batch, num_candidates = score.shape
    score = torch.where(score.isnan(), float("-inf"), score)
    order = score.argsort(dim=1, descending=True, stable=True)
    kept = order[:, :num_nodes]
    unused = score.gather(1, kept) == float("-inf")
    ranks = torch.arange(num_candidates, device=score.device).expand(batch, -1)
    rank = torch.empty_like(order).scatter_(1, order, ranks)
    nodes = torch.arange(num_nodes + 1, device=score.device)

    kept_parent = parent.gather(1, kept).long()
    node_of_parent = torch.where(kept_parent < 0, 0, rank.gather(1, kept_parent.clamp(min=0)) + 1)
    previous = nodes[:-1].expand(batch, -1)
    # The minimum keeps parent[t] < t even for scores that break the rule above.
    tree_parent = torch.where(unused, previous, torch.minimum(node_of_parent, previous))
    tree_parent = F.pad(tree_parent, (1, 0))
    tokens = torch.where(unused, 0, token.gather(1, kept))

    mask = (torch.ones_like(nodes) << nodes).repeat(batch, 1)
    ancestor = tree_parent
    # Pointer doubling: after k rounds a mask holds 2**k generations, and no tree is deeper than 63.
    for _ in range(num_nodes.bit_length()):
        mask |= mask.gather(1, ancestor)
        ancestor = ancestor.gather(1, ancestor)
    depth = ((mask[:, :, None] >> nodes) & 1).sum(-1) - 1
    return tokens, tree_parent.int(), depth.int(), mask


def check_num_nodes(num_nodes: int, num_candidates: int) -> None:
    """Raise ValueError unless 1 <= num_nodes <= 63 and there are enough candidates."""
    if not 1 <= num_nodes <= 63 or num_nodes > num_candidates:
        raise ValueError(
            f"tree_build needs 1 <= num_nodes <= min(63, candidates), found num_nodes={num_nodes} and {num_candidates} "
            "candidates; lower num_speculative_tokens or widen the expansion."
        )


def gumbel_noise(
    seeds: torch.Tensor,
    temperature: torch.Tensor,
    positions: torch.Tensor,
    idx_mapping: torch.Tensor,
    vocab_size: int,
) -> torch.Tensor:
    """Temperature times the Gumbel noise the target's sampler will draw at each position.

    vLLM 0.32 samples ``argmax(logits / T + g)`` with g a pure function of (seed, position, token): MurmurHash3 (32 bit)
    over the words seed low, seed high, position low, token; its 32 bits become a uniform u in (0, 1) and
    ``g = -log(-log(1 - u))``. (``vllm/v1/worker/gpu/sample/gumbel.py``, is_drafting=False, use_fp64=False.)

    Args:
        seeds: int64 ``[R]``.
        temperature: fp32 ``[R]``.
        positions: int64 ``[B, G]``, position of the row whose output is sampled (depth position for tree rows).
        idx_mapping: int ``[B]``.
        vocab_size: V.

    Returns:
        fp32 ``[B, G, V]``; 0 where the temperature is 0.
    """
    tokens = torch.arange(vocab_size, device=positions.device)
    return gumbel_noise_at(seeds, temperature, positions, idx_mapping, tokens)


def gumbel_noise_at(
    seeds: torch.Tensor,
    temperature: torch.Tensor,
    positions: torch.Tensor,
    idx_mapping: torch.Tensor,
    tokens: torch.Tensor,
) -> torch.Tensor:
    """``gumbel_noise`` of the listed ``tokens`` only, int ``[n]`` or for each row ``[B, G, n]``: fp32 ``[B, G, n]``."""
    noise = torch.zeros((*positions.shape, tokens.shape[-1]), dtype=torch.float32, device=positions.device)
    temp = temperature[idx_mapping.long()]
    sampling = temp.nonzero()[:, 0]
    if sampling.numel() == 0:
        return noise
    seed = seeds[idx_mapping[sampling].long()].long()[:, None]
    # Casting to int32 keeps the low word.
    h = _murmur_mix(torch.zeros_like(seed, dtype=torch.int32), seed.int())
    h = _murmur_mix(h, (seed >> 32).int())
    h = _murmur_mix(h, positions[sampling].int())
    h = _murmur_mix(h[:, :, None], (tokens if tokens.dim() == 1 else tokens[sampling]).int())
    noise[sampling] = _gumbel(_murmur_finish(h ^ 16)) * temp[sampling, None, None]
    return noise


def _signed(word: int) -> int:
    """A 32-bit constant as int32, whose products keep the same low 32 bits."""
    return word - (1 << 32) if word >> 31 else word


def _murmur_mix(h: torch.Tensor, word: torch.Tensor) -> torch.Tensor:
    """One MurmurHash3 round on int32 bit patterns; multiplication wraps."""
    word = _rotate(word * _signed(0xCC9E2D51), 15) * 0x1B873593
    return _rotate(h ^ word, 13) * 5 + _signed(0xE6546B64)


def _shift_right(word: torch.Tensor, bits: int) -> torch.Tensor:
    """Logical shift of an int32 bit pattern."""
    return word >> bits & (1 << (32 - bits)) - 1


def _rotate(word: torch.Tensor, bits: int) -> torch.Tensor:
    return word << bits | _shift_right(word, 32 - bits)


def _murmur_finish(h: torch.Tensor) -> torch.Tensor:
    h = (h ^ _shift_right(h, 16)) * _signed(0x85EBCA6B)
    h = (h ^ _shift_right(h, 13)) * _signed(0xC2B2AE35)
    return h ^ _shift_right(h, 16)


def _gumbel(bits: torch.Tensor) -> torch.Tensor:
    """-log(-log(1 - u)) in fp32 for u = (bits + 0.5) / 2**32, precise for small u, where the largest values are."""
    u = _shift_right(bits, 16).float() * 2.0**-16 + ((bits & 0xFFFF).float() + 0.5) * 2.0**-32
    series = u * (1.0 / 8.0)
    for k in range(7, 1, -1):
        series.add_(1.0 / k).mul_(u)
    log1p = torch.where(u < 0.25, -u * series.add_(1.0), torch.log((1.0 - u).clamp_(min=2.0**-24)))
    return log1p.neg_().log_().neg_()
