# SPDX-License-Identifier: Apache-2.0
"""Tensors with a stride so large that element offsets pass 2**31, in memory that is reserved but never filled.

Only the pages that hold elements are touched, so a tensor that spans 20 GB costs a few pages. Half of the reservation
lies below the tensor: an address computed in 32 bits wraps to a negative offset, which then reads zeros instead of
ending the process, and the test fails on the result.
"""

import mmap

import torch

# Its multiples leave the range of int32 from index 2 on; itself it fits, so Triton passes it as a 32-bit stride.
FAR_STRIDE = 2**30 + 64
# Linux; python's mmap has no name for it before 3.13.
_MAP_NORESERVE = 0x4000


def far(tensor: torch.Tensor, dim: int) -> torch.Tensor:
    """A copy of `tensor` (at least 3 long in `dim`) with `FAR_STRIDE` in that dimension, on the same device."""
    if tensor.shape[dim] < 3:
        raise ValueError(
            f"far needs at least 3 entries in dimension {dim}, found shape {tuple(tensor.shape)}; add some."
        )
    strides = list(tensor.contiguous().stride())
    strides[dim] = FAR_STRIDE
    span = sum((size - 1) * stride for size, stride in zip(tensor.shape, strides, strict=True)) + 1
    if tensor.device.type == "cuda":
        raw, start = torch.empty(span, dtype=tensor.dtype, device=tensor.device), 0
    else:
        raw, start = _reserve(2**31 + span, tensor.dtype), 2**31
    view = raw.as_strided(tensor.shape, strides, start)
    return view.copy_(tensor)


def _reserve(count: int, dtype: torch.dtype) -> torch.Tensor:
    """`count` zeros of address space."""
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE
    memory = mmap.mmap(-1, count * dtype.itemsize, flags=flags)
    # Without huge pages: each of the few touched places costs 4 KB.
    memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=torch.uint8).view(dtype)
