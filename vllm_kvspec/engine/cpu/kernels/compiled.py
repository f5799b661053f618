# SPDX-License-Identifier: Apache-2.0
"""How tensors reach compiled code: flat arrays with explicit types, so that nothing compiles while serving.

As in the Triton kernels, a matrix is its first element and a row stride. A call whose types differ from the signature
raises TypeError instead of compiling again.
"""

import ctypes
from collections.abc import Callable
from functools import partial

import numba
import numpy as np
import torch
from numba import types

INT = types.int64
I16 = types.int16[::1]
I32 = types.int32[::1]
I64 = types.int64[::1]
U8 = types.uint8[::1]
U64 = types.uint64[::1]
F32 = types.float32[::1]
F64 = types.float64[::1]
BOOLS = types.boolean[::1]
BOOL = types.boolean


def compiled(*parameters, fastmath: bool | set[str] = False):
    """Compile now for these parameter types, or load what an earlier process compiled."""
    return partial(compile_now, partial(numba.njit, types.void(*parameters)), fastmath=fastmath)


def compile_now(jit: Callable, function: Callable, fastmath: bool | set[str] = False):
    """``jit``, one of numba's decorators, applied to ``function``; from the cache where it is there."""
    options = {"fastmath": fastmath, "error_model": "numpy"}
    try:
        return jit(cache=True, **options)(function)
    except RuntimeError as error:
        # Neither beside this file nor in the user's cache directory can anything be written.
        if "cannot cache" not in str(error):
            raise
        return jit(**options)(function)


def flat(tensor: torch.Tensor) -> np.ndarray:
    """The elements from the tensor's first to its last as they lie in memory; writing to them writes the tensor."""
    if not tensor.is_contiguous():
        if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
            raise ValueError(f"The elements of a row must be adjacent; found strides {tensor.stride()}.")
        length = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
        tensor = tensor.as_strided((length,), (1,))
    return tensor.numpy().reshape(-1)


def integers(tensor: torch.Tensor) -> np.ndarray:
    """``flat`` as int64, for reading: vLLM passes the same argument as int32 here and as int64 there."""
    return flat(tensor).astype(np.int64, copy=False)


def row_chunks(num_rows: int, size: int = 16):
    """Slices of at most ``size`` rows: what is computed from logits in fp32 is never larger than one of them."""
    return [slice(start, min(start + size, num_rows)) for start in range(0, num_rows, size)]


def copy_bytes(destination: int, source: int, num_bytes: int) -> None:
    ctypes.memmove(destination, source, num_bytes)
