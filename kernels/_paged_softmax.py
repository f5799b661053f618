# SPDX-License-Identifier: Apache-2.0
"""What the two attention kernels share: reading paged KV tiles, the online softmax, merging KV splits, tile sizes.

Scores are kept in units of log2 (``exp2`` is the native instruction), sums and outputs in fp32. A KV split leaves its
unnormalised output, row maximum and row sum in scratch buffers ``[rows, Hq, SPLITS, D]`` and ``[rows, Hq, SPLITS]``;
`merge_splits` weighs them by ``exp2(max - overall max)``.
"""

import functools

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)

# More splits than this cost more in the merge than they bring.
MAX_SPLITS = 16
# What doubling the splits adds to the time, for the merge: a guess, to be measured.
MERGE_COST = 0.05
# Keys a split should at least have.
MIN_SPLIT_KEYS = 256


@triton.jit
def scalar(value, IS_TENSOR: tl.constexpr):
    """A factor given by value or as a pointer to one element."""
    if IS_TENSOR:
        value = tl.load(value).to(tl.float32)
    return value


@triton.jit
def load_kv_tile(
    k_ptr,
    v_ptr,
    table_ptr,
    keys,
    valid,
    dim,
    stride_k_block,
    stride_k_slot,
    stride_v_block,
    stride_v_slot,
    BLOCK_SIZE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
):
    """K transposed ``[BLOCK_D, TILE]`` and V ``[TILE, BLOCK_D]`` of one KV head at flat positions `keys`."""
    block = tl.load(table_ptr + keys // BLOCK_SIZE, mask=valid, other=0).to(tl.int64)
    slot = (keys % BLOCK_SIZE).to(tl.int64)
    k_row = block * stride_k_block + slot * stride_k_slot
    v_row = block * stride_v_block + slot * stride_v_slot
    in_dim = dim < HEAD_DIM
    k = tl.load(k_ptr + k_row[None, :] + dim[:, None], mask=valid[None, :] & in_dim[:, None], other=0.0)
    v = tl.load(v_ptr + v_row[:, None] + dim[None, :], mask=valid[:, None] & in_dim[None, :], other=0.0)
    return k, v


@triton.jit
def softmax_step(q, k, v, visible, row_max, row_sum, acc, qk_scale, MASKED: tl.constexpr, SOFT_CAP: tl.constexpr = 0.0):
    """Fold one KV tile into the running softmax; `visible` ``[BLOCK_M, TILE]`` is used only when MASKED."""
    scores = tl.dot(q, k.to(q.dtype), input_precision="ieee") * qk_scale
    if SOFT_CAP > 0:
        # cap * tanh(score / cap); far scores end at 1 - 2 / inf and 1 - 2 / 1.
        scores = SOFT_CAP * LOG2_E * (1.0 - 2.0 / (1.0 + tl.exp2(scores * (2.0 / SOFT_CAP))))
    if MASKED:
        scores = tl.where(visible, scores, float("-inf"))
    new_max = tl.maximum(row_max, tl.max(scores, 1))
    # A row that has seen no key yet has maximum -inf; subtracting 0 instead avoids inf - inf.
    safe_max = tl.where(new_max == float("-inf"), 0.0, new_max)
    p = tl.exp2(scores - safe_max[:, None])
    decay = tl.exp2(row_max - safe_max)
    row_sum = row_sum * decay + tl.sum(p, 1)
    acc = acc * decay[:, None] + tl.dot(p.to(q.dtype), v.to(q.dtype), input_precision="ieee")
    return new_max, row_sum, acc


@triton.jit
def store_rows(
    out,
    out_offset,
    part_out_ptr,
    part_max_ptr,
    part_sum_ptr,
    part_row,
    split,
    live,
    dim,
    row_max,
    row_sum,
    acc,
    HEAD_DIM: tl.constexpr,
    SPLITS: tl.constexpr,
):
    """Store finished rows, or one split's share of them; `part_row` ``[BLOCK_M]`` is row * Hq + head."""
    inside = live[:, None] & (dim < HEAD_DIM)[None, :]
    if SPLITS == 1:
        result = acc / tl.where(row_sum > 0, row_sum, 1.0)[:, None]
        tl.store(out + out_offset[:, None] + dim[None, :], result.to(out.dtype.element_ty), mask=inside)
    else:
        part = part_row * SPLITS + split
        tl.store(part_out_ptr + part[:, None] * HEAD_DIM + dim[None, :], acc, mask=inside)
        tl.store(part_max_ptr + part, row_max, mask=live)
        tl.store(part_sum_ptr + part, row_sum, mask=live)


# The row count is one element of an array of the batch: at any address, and read once.
@triton.jit(do_not_specialize_on_alignment=["num_rows_ptr"])
def _merge_splits_kernel(
    part_out_ptr,
    part_max_ptr,
    part_sum_ptr,
    num_rows_ptr,
    out_ptr,
    stride_out_row,
    stride_out_head,
    NUM_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    SPLITS: tl.constexpr,
    HAS_PADDING: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    head = tl.program_id(1).to(tl.int64)
    # Nested: the outer test is settled at compile time, and without it there is nothing to load.
    if HAS_PADDING:  # noqa: SIM102
        if row >= tl.load(num_rows_ptr):
            return
    split = tl.arange(0, SPLITS)
    dim = tl.arange(0, BLOCK_D)
    inside = dim < HEAD_DIM
    part = (row * NUM_HEADS + head) * SPLITS + split
    split_max = tl.load(part_max_ptr + part)
    weight = tl.exp2(split_max - tl.max(split_max, 0))
    total = tl.sum(weight * tl.load(part_sum_ptr + part), 0)
    # [SPLITS, BLOCK_D]
    acc = tl.load(part_out_ptr + part[:, None] * HEAD_DIM + dim[None, :], mask=inside[None, :], other=0.0)
    result = tl.sum(weight[:, None] * acc, 0) / total
    out = out_ptr + row * stride_out_row + head * stride_out_head + dim
    tl.store(out, result.to(out_ptr.dtype.element_ty), mask=inside)


def new_parts(rows: int, num_heads: int, splits: int, head_dim: int, device: torch.device) -> tuple[torch.Tensor, ...]:
    """Scratch of `splits` KV splits: outputs, maxima, sums, all fp32; one unused element each for a single split."""
    if splits == 1:
        return (torch.empty(1, dtype=torch.float32, device=device),) * 3
    shape = (rows, num_heads, splits)
    return tuple(torch.empty(s, dtype=torch.float32, device=device) for s in ((*shape, head_dim), shape, shape))


def merge_splits(parts: tuple[torch.Tensor, ...], out: torch.Tensor, num_rows: torch.Tensor | None) -> None:
    """Combine splits into out ``[rows, Hq, D]``; rows at and past `num_rows` (1-element tensor) stay untouched."""
    rows, num_heads, head_dim = out.shape
    _merge_splits_kernel[(rows, num_heads)](
        *parts,
        parts[0] if num_rows is None else num_rows,
        out,
        out.stride(0),
        out.stride(1),
        NUM_HEADS=num_heads,
        HEAD_DIM=head_dim,
        BLOCK_D=triton.next_power_of_2(head_dim),
        SPLITS=parts[0].shape[2],
        HAS_PADDING=num_rows is not None,
        num_warps=1,
    )


def tile_config(rows: int, q: torch.Tensor, group: int = 1, has_window: bool = False) -> dict[str, int | None]:
    """BLOCK_M, TILE and launch options for `rows` rows that share one KV head; a tile holds `group` of them or more."""
    head_dim = q.shape[-1]
    wide = head_dim > 128 or q.dtype == torch.float32
    capability = _capability(q.device)
    # Other tensor cores than those of compute capability 9 and 10 take both factors of a product from registers.
    in_registers = capability not in (9, 10)
    # The largest tiles, and the fewest warps for them, that compile without spills (tests/kernels/test_compile.py);
    # float32, which no server runs on a GPU, spills with any. A query that is converted stays in registers as well.
    most = (32 if in_registers or q.dtype.itemsize == 1 else 64) if wide else 128
    huge = head_dim > 256
    most = most // 2 if huge else most
    block_m = max(min(max(16, triton.next_power_of_2(rows)), most), triton.next_power_of_2(group))
    tile = 64 if block_m >= 128 and not wide and not in_registers else 32
    # What the mask of a window or a division by the group takes in registers, the largest tile has to spare on compute
    # capability 9 alone.
    divides = group & (group - 1) != 0
    halved = block_m >= 128 and (has_window if capability == 10 else in_registers and divides)
    halved = halved or (huge and block_m >= 32 and (divides or has_window))
    tile = tile // 2 if halved else tile
    num_warps = 8 if wide or block_m >= (64 if in_registers else 128) else 4
    # A third stage makes up for the smaller tile where there is room for it.
    num_stages = 2 if (block_m >= 128 and not halved) or q.dtype == torch.float32 else 3
    # Unless it is told that it may take them all, ptxas spills a few registers to fit one more block on a
    # multiprocessor. The largest tiles with all their keys take them anyway, and spill when told so.
    maxnreg = 255 if block_m < 128 or halved else None
    return dict(BLOCK_M=block_m, TILE=tile, num_warps=num_warps, num_stages=num_stages, maxnreg=maxnreg)


def num_splits(programs: int, max_keys: int, device: torch.device, num_warps: int) -> int:
    """Power of two of KV splits; from sizes the host knows, so that it fits in a CUDA graph.

    The time is about that of the waves of programs, each of 1/splits of the keys, and of a merge that grows with the
    splits. `num_warps` says how many programs a multiprocessor holds, since they take all the registers they may.
    """
    if device.type != "cuda":
        return 1
    at_once = _num_multiprocessors(device) * 8 // num_warps
    best, least = 1, float("inf")
    for log in range(MAX_SPLITS.bit_length()):
        splits = 1 << log
        time = triton.cdiv(programs * splits, at_once) / splits * (1 + MERGE_COST * log)
        if time < least and (splits == 1 or max_keys >= splits * MIN_SPLIT_KEYS):
            best, least = splits, time
    return best


@functools.cache
def _capability(device: torch.device) -> int:
    """Major compute capability; the interpreter counts as 9."""
    return torch.cuda.get_device_capability(device)[0] if device.type == "cuda" else 9


@functools.cache
def _num_multiprocessors(device: torch.device) -> int:
    return torch.cuda.get_device_properties(device).multi_processor_count


def check_heads(q: torch.Tensor, k_cache: torch.Tensor, v_cache: torch.Tensor, *others: torch.Tensor) -> None:
    """Raise ValueError unless head counts and dimensions fit and all tensors have stride 1 in the last dimension."""
    num_heads, head_dim = q.shape[-2:]
    num_kv_heads = k_cache.shape[2]
    if k_cache.shape != v_cache.shape or k_cache.shape[3] != head_dim or num_heads % num_kv_heads:
        raise ValueError(
            "paged attention needs K and V of one shape [num_blocks, block_size, Hkv, D] with Hq a multiple of Hkv, "
            f"found q {tuple(q.shape)}, K {tuple(k_cache.shape)}, V {tuple(v_cache.shape)}; pass views of that shape."
        )
    last_strides = [tensor.stride(-1) for tensor in (q, k_cache, v_cache, *others)]
    if any(stride != 1 for stride in last_strides):
        raise ValueError(
            "paged attention needs a contiguous head dimension, found last strides "
            f"{last_strides} for q, K, V and the other tensors; make that dimension innermost."
        )
