# SPDX-License-Identifier: Apache-2.0
"""Attention over the paged KV cache on CPU, and the cache's update: compiled ``tree_attention`` and
``paged_draft_attention`` for float32.

The torch twins gather each request's keys and values and mask whole score matrices, which for the few rows of a decode
step costs more than the products. Here two query rows that share a KV head go through the cache together, four keys at
a time, where it lies. Other dtypes take the twins.
"""

import functools
import math

import numba
import numpy as np
import torch

from vllm_kvspec.engine.cpu.kernels.threads import f32, i32, i64, num_threads, prefetch, team, thread_number
from vllm_kvspec.kernels import reference

_F = np.float32
# Keys that are fetched from memory before they are used.
_AHEAD = 16
# Up to so many pairs of query rows a KV head is one thread's, where there are many: one core reads it then. More pairs
# are work enough to be shared out.
_FEW = 4
# Of keys, and as many of values: elements that stay in a core's second-level cache.
_CACHED = 64 * 1024
# No "ninf": a hidden score is -inf.
_FAST = {"reassoc", "contract", "arcp", "nsz", "nnan"}
_inlined = numba.njit(forceinline=True, error_model="numpy", fastmath=_FAST)


@_inlined
def exp(x):
    """e**x in fp32 for x <= 0, to about two units in the last place (Cephes' polynomial); 0 below -87."""
    y = max(x, _F(-87.0))
    n = _F(math.floor(y * _F(1.44269504) + _F(0.5)))
    f = (y - n * _F(0.693359375)) + n * _F(2.12194440e-4)
    p = _F(1.9875691500e-4)
    p = p * f + _F(1.3981999507e-3)
    p = p * f + _F(8.3334519073e-3)
    p = p * f + _F(4.1665795894e-2)
    p = p * f + _F(1.6666665459e-1)
    p = p * f + _F(5.0000001201e-1)
    result = (p * f * f + f + _F(1.0)) * np.int32((np.int32(n) + np.int32(127)) << np.int32(23)).view(np.float32)
    return result if x >= _F(-87.0) else _F(0.0)


@_inlined
def tanh(x):
    """Tanh in fp32, to about two units in the last place (Cephes' polynomial, and 1 - 2 / (e**2|x| + 1))."""
    y = x * x
    p = _F(-5.70498872745e-3)
    p = p * y + _F(2.06390887954e-2)
    p = p * y + _F(-5.37397155531e-2)
    p = p * y + _F(1.33314422036e-1)
    p = p * y + _F(-3.33332819422e-1)
    decay = exp(_F(-2.0) * abs(x))
    far = _F(1.0) - _F(2.0) * decay / (_F(1.0) + decay)
    return p * y * x + x if abs(x) < _F(0.625) else math.copysign(far, x)


@_inlined
def _dot(q0, q1, keys, starts, first, end, dim, scores0, scores1):
    """scores[j] = q . key j for both queries and j in [first, end); key j starts at ``starts[j]`` of ``keys``."""
    j = first
    while j + 4 <= end:
        k0 = keys[starts[j] : starts[j] + dim]
        k1 = keys[starts[j + 1] : starts[j + 1] + dim]
        k2 = keys[starts[j + 2] : starts[j + 2] + dim]
        k3 = keys[starts[j + 3] : starts[j + 3] + dim]
        a0, a1, a2, a3 = _F(0), _F(0), _F(0), _F(0)
        b0, b1, b2, b3 = _F(0), _F(0), _F(0), _F(0)
        for d in range(dim):
            x, y = q0[d], q1[d]
            a0 += x * k0[d]
            a1 += x * k1[d]
            a2 += x * k2[d]
            a3 += x * k3[d]
            b0 += y * k0[d]
            b1 += y * k1[d]
            b2 += y * k2[d]
            b3 += y * k3[d]
        scores0[j], scores0[j + 1], scores0[j + 2], scores0[j + 3] = a0, a1, a2, a3
        scores1[j], scores1[j + 1], scores1[j + 2], scores1[j + 3] = b0, b1, b2, b3
        j += 4
    while j < end:
        k0 = keys[starts[j] : starts[j] + dim]
        a0, b0 = _F(0), _F(0)
        for d in range(dim):
            a0 += q0[d] * k0[d]
            b0 += q1[d] * k0[d]
        scores0[j], scores1[j] = a0, b0
        j += 1


@_inlined
def _weigh(weights0, weights1, values, starts, first, end, dim, sum0, sum1):
    """sum += weights[j] * value j for both queries and j in [first, end)."""
    j = first
    while j + 4 <= end:
        v0 = values[starts[j] : starts[j] + dim]
        v1 = values[starts[j + 1] : starts[j + 1] + dim]
        v2 = values[starts[j + 2] : starts[j + 2] + dim]
        v3 = values[starts[j + 3] : starts[j + 3] + dim]
        a0, a1, a2, a3 = weights0[j], weights0[j + 1], weights0[j + 2], weights0[j + 3]
        b0, b1, b2, b3 = weights1[j], weights1[j + 1], weights1[j + 2], weights1[j + 3]
        for d in range(dim):
            sum0[d] += a0 * v0[d] + a1 * v1[d] + a2 * v2[d] + a3 * v3[d]
            sum1[d] += b0 * v0[d] + b1 * v1[d] + b2 * v2[d] + b3 * v3[d]
        j += 4
    while j < end:
        v0 = values[starts[j] : starts[j] + dim]
        for d in range(dim):
            sum0[d] += weights0[j] * v0[d]
            sum1[d] += weights1[j] * v0[d]
        j += 1


@_inlined
def _fetch(starts, first, end, dim, key_address, value_address):
    """Fetch the keys and values [first, end) from memory without waiting for them; returns ``end``."""
    for j in range(first, end):
        for d in range(0, dim, 16):
            prefetch(key_address + 4 * (starts[j] + d))
            prefetch(value_address + 4 * (starts[j] + d))
    return end


@_inlined
def _cap(scores, scale, soft_cap):
    """Scores to those that, times `soft_cap`, are the scaled and capped ones."""
    factor = scale / soft_cap
    for j in range(len(scores)):
        scores[j] = tanh(scores[j] * factor)


@_inlined
def _softmax(scores, scale, sink):
    """Scores to unnormalised weights; returns what to multiply the weighted sum by.

    `sink` is a score that is scaled already and has no value; -inf for none.
    """
    # Loops from 0: only with an index that cannot be negative are they vector code.
    top = sink / scale
    for j in range(len(scores)):
        top = max(top, scores[j])
    total = exp(sink - top * scale)
    for j in range(len(scores)):
        weight = exp((scores[j] - top) * scale)
        scores[j] = weight
        total += weight
    return _F(1) / total


@_inlined
def _store(out, start, dim, total, factor):
    row = out[start : start + dim]
    for d in range(dim):
        row[d] = total[d] * factor
        total[d] = _F(0)


@_inlined
def _slots(starts, a, b, h, first, end):
    """Where the keys [first, end) of request ``b`` start in the cache, for KV head ``h``."""
    table = i32(a.tables)[b * a.table_stride :]
    for block in range(first // a.block_size, (end + a.block_size - 1) // a.block_size):
        start, block_first = table[block] * a.stride_block + h * a.stride_head, block * a.block_size
        for j in range(max(first, block_first), min(end, block_first + a.block_size)):
            starts[j] = start + (j - block_first) * a.stride_slot


@_inlined
def _popcount(mask):
    count = 0
    for bit in range(64):
        count += (mask >> bit) & 1
    return count


@_inlined
def _hide_from_row(scores, row, num_rows, seq_len, tree, masks, window, first, end):
    """-inf for the keys [first, end) that a verification row may not see: see ``reference.tree_attention``."""
    true_row = seq_len - num_rows + row
    if row < num_rows - tree:
        for j in range(true_row + 1, end):
            scores[j] = -np.inf
    else:
        base = seq_len - tree
        mask = masks[row - (num_rows - tree)]
        true_row = base + _popcount(mask) - 1
        for t in range(tree):
            hidden = (mask >> t) & 1 == 0
            # The depth position of a key, where a sliding window needs it.
            if window > 0 and not hidden:
                hidden = true_row - (base + _popcount(masks[t]) - 1) >= window
            if hidden:
                scores[base + t] = -np.inf
    if window > 0:
        for j in range(first, min(true_row - window + 1, seq_len - tree)):
            scores[j] = -np.inf


# Of a paged cache: strides of a block, a slot and a head in elements; query heads for each KV head.
_LAYOUT = dict.fromkeys(
    ("block_size", "stride_block", "stride_slot", "stride_head", "num_kv_heads", "group", "dim"), int
)
_SHARED = {
    **dict.fromkeys(("q", "keys", "values", "out"), torch.float32),
    "tables": torch.int32,
    "table_stride": int,
    **_LAYOUT,
}


@_inlined
def _span(a, b):
    """The keys [first, end) that the rows of request ``b`` see, and how many rows."""
    num_rows, seq_len = i32(a.row_starts)[b + 1] - i32(a.row_starts)[b], i32(a.seq_lens)[b]
    # With a sliding window the blocks behind it may already belong to others: never read them.
    return max(0, seq_len - num_rows - a.window + 1) if a.window > 0 else 0, seq_len, num_rows


@_inlined
def _parts_of_thread(a):
    """What this thread computes: rows of request, KV head, first pair of query rows, step to the next pair."""
    parts, count = np.empty((a.num_reqs * a.num_kv_heads, 4), np.int64), 0
    turn, threads = thread_number(), num_threads()
    many = a.num_reqs * a.num_kv_heads >= 4 * threads
    for b in range(a.num_reqs):
        pairs = (_span(a, b)[2] * a.group + 1) // 2
        whole = many and pairs <= _FEW
        for h in range(a.num_kv_heads):
            begin, step = (0 if turn == 0 else pairs, 1) if whole else (turn, threads)
            turn = (turn - (1 if whole else pairs)) % threads
            if begin < pairs:
                parts[count] = b, h, begin, step
                count += 1
    return parts[:count]


@team(
    _FAST, **_SHARED, row_starts=torch.int32, seq_lens=torch.int32, masks=torch.int64, trees=torch.int32,
    sinks=torch.float32, num_reqs=int, mask_stride=int, window=int, scale=float, soft_cap=float,
)  # fmt: skip
def _tree_attention(arguments):
    a = numba.carray(arguments, 1)[0]
    q, keys, values, out = f32(a.q), f32(a.keys), f32(a.values), f32(a.out)
    group, dim, window, scale = a.group, a.dim, a.window, a.scale
    longest = 0
    for b in range(a.num_reqs):
        longest = max(longest, i32(a.seq_lens)[b])
    scores0, scores1 = np.empty(longest, np.float32), np.empty(longest, np.float32)
    sum0, sum1 = np.zeros(dim, np.float32), np.zeros(dim, np.float32)
    here, there = np.empty(longest, np.int64), np.empty(longest, np.int64)
    width = a.num_kv_heads * group * dim
    score_scale = a.soft_cap if a.soft_cap > 0 else scale
    parts, fetched = _parts_of_thread(a), False
    for part in range(len(parts)):
        b, h, begin, step = parts[part]
        first, seq_len, num_rows = _span(a, b)
        row_start, tree, pairs = i32(a.row_starts)[b], i32(a.trees)[b], (num_rows * group + 1) // 2
        mask = i64(a.masks)[b * a.mask_stride : b * a.mask_stride + tree]
        if part == 0:
            _slots(here, a, b, h, first, seq_len)
        # While this part is computed the keys and values of the next come from memory, `rate` of them each time that
        # four are read here.
        cursor = fetch_end = 0
        if part + 1 < len(parts):
            cursor, fetch_end, _ = _span(a, parts[part + 1, 0])
            _slots(there, a, parts[part + 1, 0], parts[part + 1, 1], cursor, fetch_end)
            if (seq_len - first + fetch_end - cursor) * dim > _CACHED:
                cursor = fetch_end
        fetching = cursor < fetch_end
        passes = 2 * ((pairs - begin - 1) // step + 1) - (0 if fetched else 1)
        times = passes * ((seq_len - first + 3) // 4)
        rate = (fetch_end - cursor + times - 1) // times
        for pair in range(begin, pairs, step):
            r = 2 * pair
            # The last of an odd number of query rows goes with itself.
            s = min(r + 1, num_rows * group - 1)
            i, j = r // group, s // group
            head0, head1 = h * group + r - i * group, h * group + s - j * group
            x = (row_start + i) * width + head0 * dim
            y = (row_start + j) * width + head1 * dim
            end = seq_len if j >= num_rows - tree else seq_len - num_rows + j + 1
            q0, q1 = q[x : x + dim], q[y : y + dim]
            if pair == begin and not fetched:
                for k in range(first, end, 4):
                    _fetch(here, min(k + _AHEAD, end), min(k + _AHEAD + 4, end), dim, a.keys, a.values)
                    _dot(q0, q1, keys, here, k, min(k + 4, end), dim, scores0, scores1)
            elif cursor < fetch_end:
                for k in range(first, end, 4):
                    cursor = _fetch(there, cursor, min(cursor + rate, fetch_end), dim, a.keys, a.values)
                    _dot(q0, q1, keys, here, k, min(k + 4, end), dim, scores0, scores1)
            else:
                _dot(q0, q1, keys, here, first, end, dim, scores0, scores1)
            if a.soft_cap > 0:
                _cap(scores0[first:end], scale, a.soft_cap)
                _cap(scores1[first:end], scale, a.soft_cap)
            _hide_from_row(scores0, i, num_rows, seq_len, tree, mask, window, first, end)
            _hide_from_row(scores1, j, num_rows, seq_len, tree, mask, window, first, end)
            factor0 = _softmax(scores0[first:end], score_scale, f32(a.sinks)[head0])
            factor1 = _softmax(scores1[first:end], score_scale, f32(a.sinks)[head1])
            if cursor < fetch_end:
                for k in range(first, end, 4):
                    cursor = _fetch(there, cursor, min(cursor + rate, fetch_end), dim, a.keys, a.values)
                    _weigh(scores0, scores1, values, here, k, min(k + 4, end), dim, sum0, sum1)
            else:
                _weigh(scores0, scores1, values, here, first, end, dim, sum0, sum1)
            _store(out, x, dim, sum0, factor0)
            _store(out, y, dim, sum1, factor1)
        fetched = fetching
        here, there = there, here


@_inlined
def _hide_from_block_row(scores, row, context, window, causal, first, end):
    """-inf for the keys that a row of the head's block may not see: see ``reference.paged_draft_attention``."""
    if causal:
        for j in range(context + row + 1, end):
            scores[j] = -np.inf
    if window > 0 and end > context:
        for j in range(first, min(context, context + row - window + 1)):
            scores[j] = -np.inf


@team(
    _FAST, **_SHARED, own_keys=torch.float32, own_values=torch.float32, context_lens=torch.int32, num_reqs=int,
    num_rows=int, window=int, causal=int, own=int, scale=float,
)  # fmt: skip
def _draft_attention(arguments):
    """``own``: 0 for queries alone, without a block of keys."""
    a = numba.carray(arguments, 1)[0]
    q, keys, values, out = f32(a.q), f32(a.keys), f32(a.values), f32(a.out)
    own_keys, own_values, context_lens = f32(a.own_keys), f32(a.own_values), i32(a.context_lens)
    num_rows, own, group, dim, window, scale = a.num_rows, a.own, a.group, a.dim, a.window, a.scale
    longest = num_rows
    for b in range(a.num_reqs):
        longest = max(longest, num_rows + context_lens[b])
    scores0, scores1 = np.empty(longest, np.float32), np.empty(longest, np.float32)
    sum0, sum1 = np.zeros(dim, np.float32), np.zeros(dim, np.float32)
    starts = np.empty(longest, np.int64)
    width = a.num_kv_heads * group * dim
    turn, threads, pairs = thread_number(), num_threads(), (num_rows * group + 1) // 2
    for b in range(a.num_reqs):
        context = context_lens[b]
        end = context + num_rows * own
        first = min(context, max(0, context - window + own)) if window > 0 else 0
        for h in range(a.num_kv_heads):
            _slots(starts, a, b, h, first, context)
            for j in range(num_rows * own):
                starts[context + j] = ((b * num_rows + j) * a.num_kv_heads + h) * dim
            for pair in range(turn, pairs, threads):
                r = 2 * pair
                s = min(r + 1, num_rows * group - 1)
                i, j = r // group, s // group
                x = (b * num_rows + i) * width + (h * group + r - i * group) * dim
                y = (b * num_rows + j) * width + (h * group + s - j * group) * dim
                q0, q1 = q[x : x + dim], q[y : y + dim]
                _dot(q0, q1, keys, starts, first, context, dim, scores0, scores1)
                _dot(q0, q1, own_keys, starts, context, end, dim, scores0, scores1)
                _hide_from_block_row(scores0, i, context, window, a.causal, first, end)
                _hide_from_block_row(scores1, j, context, window, a.causal, first, end)
                factor0 = _softmax(scores0[first:end], scale, _F(-np.inf))
                factor1 = _softmax(scores1[first:end], scale, _F(-np.inf))
                _weigh(scores0, scores1, values, starts, first, context, dim, sum0, sum1)
                _weigh(scores0, scores1, own_values, starts, context, end, dim, sum0, sum1)
                _store(out, x, dim, sum0, factor0)
                _store(out, y, dim, sum1, factor1)
            turn = (turn - pairs) % threads


@team(
    key=torch.float32, value=torch.float32, keys=torch.float32, values=torch.float32, slots=torch.int64, num_rows=int,
    key_stride=int, value_stride=int, **_LAYOUT,
)  # fmt: skip
def _store_kv(arguments):
    a = numba.carray(arguments, 1)[0]
    key, value, keys, values = f32(a.key), f32(a.value), f32(a.keys), f32(a.values)
    for row in range(thread_number(), a.num_rows, num_threads()):
        slot = i64(a.slots)[row]
        if slot < 0:
            continue
        start = slot // a.block_size * a.stride_block + slot % a.block_size * a.stride_slot
        for h in range(a.num_kv_heads):
            to, k, v = start + h * a.stride_head, row * a.key_stride + h * a.dim, row * a.value_stride + h * a.dim
            keys[to : to + a.dim] = key[k : k + a.dim]
            values[to : to + a.dim] = value[v : v + a.dim]


def store_kv(
    key: torch.Tensor, value: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, slot_mapping: torch.Tensor
) -> None:
    """Write K and V ``[>=n, Hkv, D]`` to the slots int64 ``[n]`` of caches ``[num_blocks, block_size, Hkv, D]``.

    A negative slot is padding.
    """
    rows = len(slot_mapping)
    if _all_fp32(key, value, k_cache, v_cache) and key.stride(1) == value.stride(1) == key.shape[2]:
        _store_kv(
            rows // 64, key, value, k_cache, v_cache, slot_mapping, rows, key.stride(0), value.stride(0),
            *_layout(k_cache, key.shape[1]),
        )  # fmt: skip
        return
    kept = (slot_mapping >= 0).nonzero().squeeze(1)
    block, offset = slot_mapping[kept] // k_cache.shape[1], slot_mapping[kept] % k_cache.shape[1]
    k_cache[block, offset] = key[kept].to(k_cache.dtype)
    v_cache[block, offset] = value[kept].to(v_cache.dtype)


def _layout(cache: torch.Tensor, num_heads: int) -> tuple[int, ...]:
    """``_LAYOUT`` of a cache [num_blocks, block_size, Hkv, D]."""
    _, block_size, num_kv_heads, dim = cache.shape
    return (block_size, *cache.stride()[:3], num_kv_heads, num_heads // num_kv_heads, dim)


def _all_fp32(*tensors: torch.Tensor) -> bool:
    return all(tensor.dtype == torch.float32 for tensor in tensors)


def tree_attention(q, k_cache, v_cache, block_table, query_start_loc, seq_lens, batch_mask, batch_len, **options):
    """``reference.tree_attention``, without scales for float32 (an unquantised cache has none)."""
    out = options["out"]
    if not _all_fp32(q, k_cache, v_cache, out):
        return reference.tree_attention(
            q, k_cache, v_cache, block_table, query_start_loc, seq_lens, batch_mask, batch_len, **options
        )
    sinks = options.get("sinks")
    sinks = _no_sinks(q.shape[1]) if sinks is None else sinks.detach().float()
    _tree_attention(
        _parts(q), q.contiguous(), k_cache, v_cache, out, block_table, block_table.stride(0),
        *_layout(k_cache, q.shape[1]), query_start_loc, seq_lens, batch_mask, batch_len, sinks, len(seq_lens),
        batch_mask.stride(0), options.get("sliding_window", 0), options["scale"], options.get("soft_cap", 0.0),
    )  # fmt: skip
    return out


@functools.cache
def _no_sinks(num_heads: int) -> torch.Tensor:
    return torch.full((num_heads,), -math.inf)


def paged_draft_attention(q, k_cache, v_cache, block_table, context_lens, k_block, v_block, **options):
    """``reference.paged_draft_attention``, without scales for float32 (an unquantised cache has none)."""
    out, own = options["out"], k_block is not None
    # Compiled code takes an array where there is none, and does not read it.
    k_own, v_own = (k_block, v_block) if own else (q, q)
    if not _all_fp32(q, k_cache, v_cache, k_own, v_own, out):
        return reference.paged_draft_attention(
            q, k_cache, v_cache, block_table, context_lens, k_block, v_block, **options
        )
    _draft_attention(
        _parts(q), q.contiguous(), k_cache, v_cache, out, block_table, block_table.stride(0),
        *_layout(k_cache, q.shape[2]), k_own.contiguous(), v_own.contiguous(), context_lens.contiguous(), q.shape[0],
        q.shape[1], options.get("sliding_window", 0), int(options.get("causal", False)), int(own), options["scale"],
    )  # fmt: skip
    return out


def _parts(q: torch.Tensor) -> int:
    """How many threads get two pairs of query rows [..., num_heads, dim] each."""
    return q.numel() // (4 * q.shape[-1])
