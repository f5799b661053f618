# SPDX-License-Identifier: Apache-2.0
"""Compiled functions that torch's own threads run together.

Between two of our calls those threads are torch's and vLLM's, and for a while spin in wait of the next product: threads
of our own would share the cores with them. So the team is OpenMP's, entered by ``GOMP_parallel``, which libgomp has,
and LLVM's and Intel's OpenMP too. Where torch comes without one, the calling thread does all of it.

A team's function gets its arguments as one struct in memory: a few microseconds less per call than numpy arrays.
"""

import ctypes
from collections.abc import Callable
from functools import partial

import llvmlite.binding as llvm
import numba
import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from vllm_kvspec.engine.cpu.kernels.compiled import compile_now

# The length of an array in memory of which only the address is known.
_ANY = 1 << 60


# With torch's OpenMP, which torch makes visible to the whole process.
_process = ctypes.CDLL(None)
_parallel = getattr(_process, "GOMP_parallel", None)
if _parallel is not None:
    _parallel.argtypes, _parallel.restype = (ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint, ctypes.c_uint), None


# Compiled functions whose addresses are given away.
_kept = []


def _named(symbol: str, standard: str, alone: int) -> types.ExternalFunction:
    """A function of OpenMP under a name of ours, so that code from the cache finds it as well; ``alone``: what it is
    without OpenMP."""
    if _parallel is not None:
        address = ctypes.cast(getattr(_process, standard), ctypes.c_void_p).value
    else:
        _kept.append(numba.cfunc(types.int32())(lambda: alone))
        address = _kept[-1].address
    llvm.add_symbol(symbol, address)
    return types.ExternalFunction(symbol, types.int32())


# In a team's function: this thread's number, and how many threads there are.
thread_number = _named("kvspec_thread_number", "omp_get_thread_num", 0)
num_threads = _named("kvspec_num_threads", "omp_get_num_threads", 1)


@intrinsic
def _pointer(_, address):
    return types.voidptr(address), lambda context, builder, signature, values: builder.inttoptr(
        values[0], cgutils.voidptr_t
    )


@intrinsic
def _prefetch(_, pointer):
    """The cache line at an address, to the second-level cache: for the first there are too few places under way, and a
    fetch that finds none is dropped."""

    def code(context, builder, signature, values):
        integer = ir.IntType(32)
        kind = ir.FunctionType(ir.VoidType(), [cgutils.voidptr_t, integer, integer, integer])
        function = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0i8")
        builder.call(function, [values[0], integer(0), integer(2), integer(1)])
        return context.get_dummy_value()

    return types.void(pointer), code


@numba.njit(forceinline=True)
def prefetch(address):
    """Fetch the cache line at an address without waiting for it."""
    _prefetch(_pointer(address))


def _array(dtype):
    @numba.njit(forceinline=True)
    def array(address):
        return numba.carray(_pointer(address), _ANY, dtype)

    return array


# What a tensor of the struct is in a team's function: its elements as they lie in memory, without an end.
f32, i32, i64 = _array(np.float32), _array(np.int32), _array(np.int64)


def team(fastmath: bool | set[str] = False, **fields: type | torch.dtype) -> Callable:
    """Decorates a compiled function of one argument, a pointer to the struct with these fields; compiles it now.

    A field is ``int``, ``float`` (fp32) or the dtype of a tensor, whose address is in the struct. The result takes how
    many threads at most have something to do, then the fields' values in this order, and returns when all threads have.
    Each thread must do its own part of the work (``thread_number``, ``num_threads``). Raises TypeError for a tensor of
    another dtype; how its elements lie is the caller's to see to.
    """
    types_in_c = [(name, ctypes.c_float if kind is float else ctypes.c_int64) for name, kind in fields.items()]
    struct = type("Arguments", (ctypes.Structure,), {"_fields_": types_in_c})
    signature = types.void(types.CPointer(numba.from_dtype(np.dtype(struct))))
    tensors = [(i, name, kind) for i, (name, kind) in enumerate(fields.items()) if isinstance(kind, torch.dtype)]

    def decorate(function):
        entry = compile_now(partial(numba.cfunc, signature), function, fastmath)

        def run(most: int, *values) -> None:
            # ``values`` stays as it is: it keeps a caller's temporaries alive until the threads are done.
            fields_in_c = list(values)
            for i, name, dtype in tensors:
                if values[i].dtype != dtype:
                    raise TypeError(f"{name} must be {dtype}, found {values[i].dtype}.")
                fields_in_c[i] = values[i].data_ptr()
            arguments = struct(*fields_in_c)
            if _parallel is None:
                entry.ctypes(ctypes.addressof(arguments))
            else:
                _parallel(entry.address, ctypes.addressof(arguments), max(1, min(most, torch.get_num_threads())), 0)

        return run

    return decorate
