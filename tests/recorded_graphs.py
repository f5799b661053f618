# SPDX-License-Identifier: Apache-2.0
"""A CUDA graph without a GPU: records what runs while it captures, and on a replay runs the record again.

The record holds what a CUDA graph holds, and no code of ours: every torch operation and every kernel launch, with the
very memory and the very numbers of that moment. So a replay shows, as on a GPU, a Python value that has changed since
and a tensor that was put in another's place. What would wait for the device is an error while a graph captures. Memory
made during a capture is the graph's own: a replay writes it again where it is, and uninitialised memory is NaN.

Not shown: streams, and memory that the replay of another graph of the pool takes.
"""

import contextlib
from collections.abc import Callable, Iterator
from functools import wraps
from typing import Any, ClassVar, NamedTuple

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

aten = torch.ops.aten
UNINITIALISED = {aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided}
# With a mask as the index their shapes depend on data.
INDEXED = {aten.index, aten.index_put, aten.index_put_}
WAITS = {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape}
# What leads to no operation on a CPU, and on a GPU to a copy that the host waits for.
READS = {"cpu", "numpy", "tolist", "__array__"}
UPLOADS = {torch.tensor, torch.as_tensor, torch.asarray}
POISON_INTEGER = -0x5A5A5A5B


class WaitsForDevice(RuntimeError):
    """Nothing that a capture allows."""


class Call(NamedTuple):
    function: Callable
    args: tuple
    kwargs: dict[str, Any]
    # Of the tensors that it returns, by place: those that are new.
    made: dict[int, torch.Tensor]


class RecordedGraph:
    """Stands for ``torch.cuda.CUDAGraph``; ``capture`` for ``torch.cuda.graph``."""

    # The one that records now. None also inside a launch, which is one entry whatever it does.
    capturing: ClassVar["RecordedGraph | None"] = None

    def __init__(self):
        self.calls: list[Call] = []

    def run(self, function: Callable, args: tuple, kwargs: dict[str, Any], writes: bool) -> Any:
        """Run it and record it, unless it only looks at memory in another way. ``writes``: to its arguments."""
        RecordedGraph.capturing = None
        try:
            held = as_it_is((args, kwargs))
            result = function(*args, **kwargs)
            given = {storage(tensor) for tensor in tree_leaves(held) if torch.is_tensor(tensor)}
            made = {
                i: as_it_is(value)
                for i, value in enumerate(tree_leaves(result))
                if torch.is_tensor(value) and storage(value) not in given
            }
            if getattr(function, "overloadpacket", None) in UNINITIALISED:
                (memory,) = made.values()
                poison(memory)
                self.calls.append(Call(poison, (memory,), {}, {}))
            elif made or writes:
                self.calls.append(Call(function, *held, made))
            return result
        finally:
            RecordedGraph.capturing = self

    @torch.inference_mode()
    def replay(self) -> None:
        for call in self.calls:
            values = tree_leaves(call.function(*call.args, **call.kwargs))
            for i, memory in call.made.items():
                memory.copy_(values[i])


@contextlib.contextmanager
def capture(graph: RecordedGraph, pool=None, stream=None, **options) -> Iterator[None]:
    """Everything that runs inside goes into ``graph``."""
    assert RecordedGraph.capturing is None, "a graph is being captured already"
    from_numpy = torch.from_numpy
    torch.from_numpy = _no_upload
    try:
        with Refusals(), Operations():
            RecordedGraph.capturing = graph
            yield
    finally:
        RecordedGraph.capturing = None
        torch.from_numpy = from_numpy


def launch(function: Callable) -> Callable:
    """``function``, which does its work outside of torch's operations, as one entry of a record."""

    @wraps(function)
    def call(*args, **kwargs):
        graph = RecordedGraph.capturing
        return function(*args, **kwargs) if graph is None else graph.run(function, args, kwargs, writes=True)

    return call


class Operations(TorchDispatchMode):
    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        graph, kwargs = RecordedGraph.capturing, kwargs or {}
        if graph is None:
            return function(*args, **kwargs)
        if waits(function, args, kwargs):
            raise WaitsForDevice(f"{function} waits for the device: no CUDA graph can hold it.")
        with self:
            # What is made of other operations, in C++ or in Python, is those.
            result = function.decompose(*args, **kwargs)
        if result is not NotImplemented:
            return result
        if function.namespace == "vllm":
            raise NotImplementedError(f"{function} is Python, which may do more than a record of its call can repeat.")
        return graph.run(function, args, kwargs, writes=function._schema.is_mutable)


class Refusals(TorchFunctionMode):
    def __torch_function__(self, function, types, args=(), kwargs=None):
        name = getattr(function, "__name__", "")
        if RecordedGraph.capturing is not None and (name in READS or function in UPLOADS):
            raise WaitsForDevice(f"{name} copies between host and device: no CUDA graph can hold it.")
        return function(*args, **(kwargs or {}))


def _no_upload(array):
    raise WaitsForDevice("from_numpy makes a copy to the device wait: no CUDA graph can hold it.")


def waits(function, args: tuple, kwargs: dict[str, Any]) -> bool:
    packet = function.overloadpacket
    if packet in INDEXED:
        masks = [i for i in args[1] if i is not None and i.dtype in (torch.bool, torch.uint8)]
        # One value for all that a mask shows needs no shape.
        return bool(masks) and (packet is aten.index or args[2].numel() > 1)
    if packet is aten.repeat_interleave and kwargs.get("output_size") is not None:
        return False
    return not WAITS.isdisjoint(function.tags)


def as_it_is(values: Any) -> Any:
    """The same memory and numbers, whatever becomes of these tensors and containers."""
    return tree_map_only(torch.Tensor, lambda tensor: tensor.detach(), values)


def storage(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage()._cdata


def poison(memory: torch.Tensor) -> None:
    if memory.is_floating_point():
        memory.fill_(float("nan"))
    elif memory.dtype in (torch.int32, torch.int64):
        memory.fill_(POISON_INTEGER)
