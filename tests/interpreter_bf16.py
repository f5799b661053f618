# SPDX-License-Identifier: Apache-2.0
"""Makes Triton's interpreter compute bfloat16 correctly, for tests only.

The stock interpreter (3.6 to 3.8) holds bf16 as uint16 and adds, multiplies, compares and dots those bit patterns, and
truncates when it stores fp32 as bf16. `install` lets every arithmetic entry of the interpreter see fp32 values instead
and rounds results to nearest even, as a GPU does. Remove when the stock interpreter passes test_interpreter_bf16.py.
"""

import functools

import numpy as np
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

# Builder methods and how many leading arguments are tensors; their results take the type of the operands.
_ARITHMETIC = {"binary_op": 2, "unary_op": 1, "ternary_op": 3, "create_fma": 3, "create_fabs": 1, "create_rsqrt": 1}


def _is_bf16(value: object) -> bool:
    return isinstance(value, TensorHandle) and value.dtype.scalar == tl.bfloat16


def _widen(value):
    """A bf16 handle as fp32 (exact); anything else as it is."""
    if not _is_bf16(value):
        return value
    bits = np.ascontiguousarray(value.data).astype(np.uint32) << np.uint32(16)
    return TensorHandle(bits.view(np.float32).reshape(value.data.shape), tl.float32)


def _narrow(data: np.ndarray) -> TensorHandle:
    """fp32 numbers as a bf16 handle, rounded to nearest even."""
    data = np.asarray(data, dtype=np.float32)
    bits = np.ascontiguousarray(data).view(np.uint32).reshape(data.shape).astype(np.uint64)
    rounded = (bits + 0x7FFF + ((bits >> np.uint64(16)) & np.uint64(1))) >> np.uint64(16)
    rounded = np.where(np.isnan(data), np.uint64(0x7FC0), rounded)
    return TensorHandle(rounded.astype(np.uint16), tl.bfloat16)


def _in_fp32(method, num_tensors: int):
    @functools.wraps(method)
    def wrapped(self, *args):
        if not any(_is_bf16(arg) for arg in args[:num_tensors]):
            return method(self, *args)
        result = method(self, *[_widen(arg) for arg in args[:num_tensors]], *args[num_tensors:])
        return result if result.data.dtype == np.bool_ else _narrow(result.data)

    return wrapped


def install() -> None:
    """Patch the interpreter's builder, once."""
    if getattr(InterpreterBuilder, "bf16_corrected", False):
        return
    for name, num_tensors in _ARITHMETIC.items():
        setattr(InterpreterBuilder, name, _in_fp32(getattr(InterpreterBuilder, name), num_tensors))

    stock_dot, stock_cast, stock_fp = (
        InterpreterBuilder.create_dot,
        InterpreterBuilder.cast_impl,
        InterpreterBuilder.create_fp_to_fp,
    )

    def create_dot(self, a, b, d, *rest):
        return stock_dot(self, _widen(a), _widen(b), d, *rest)

    def cast_impl(self, src, dst_type):
        src = _widen(src)
        if dst_type.scalar == tl.bfloat16:
            return _narrow(src.data)
        return src if src.dtype.scalar == dst_type.scalar else stock_cast(self, src, dst_type)

    def create_fp_to_fp(self, src, dst_type, rounding_mode):
        if dst_type.scalar == tl.bfloat16:
            wide = src if src.dtype.scalar == tl.float32 else stock_fp(self, _widen(src), tl.float32, rounding_mode)
            return _narrow(wide.data)
        src = _widen(src)
        return src if src.dtype.scalar == dst_type.scalar else stock_fp(self, src, dst_type, rounding_mode)

    InterpreterBuilder.create_dot = create_dot
    InterpreterBuilder.cast_impl = cast_impl
    InterpreterBuilder.create_fp_to_fp = create_fp_to_fp
    InterpreterBuilder.bf16_corrected = True
