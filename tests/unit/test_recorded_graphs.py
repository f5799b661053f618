# SPDX-License-Identifier: Apache-2.0
"""The stand-in for CUDA graphs does what a CUDA graph does, to small functions."""

import numpy as np
import pytest
import torch
from recorded_graphs import RecordedGraph, WaitsForDevice, capture, launch

pytestmark = pytest.mark.cpu


def record(function, *args):
    """(the graph, what ``function`` returned while it was captured)"""
    graph = RecordedGraph()
    with torch.inference_mode(), capture(graph):
        result = function(*args)
    return graph, result


def numbers() -> torch.Tensor:
    return torch.tensor([3.0, -1.0, 2.0])


def test_a_replay_computes_with_what_its_memory_holds_now():
    x = numbers()
    graph, y = record(lambda: (x * 2).view(3, 1).expand(3, 2).sum(1))
    x.copy_(torch.tensor([1.0, 2.0, 3.0]))
    graph.replay()
    assert y.tolist() == [4.0, 8.0, 12.0]


def test_writes_into_memory_from_outside():
    x, rows = numbers(), torch.tensor([2, 0])

    def function():
        x[rows] = x[rows] + 1
        x[:1].mul_(10)

    graph, _ = record(function)
    assert x.tolist() == [40.0, -1.0, 3.0]
    rows.copy_(torch.tensor([1, 2]))
    graph.replay()
    assert x.tolist() == [400.0, 0.0, 4.0]


def test_a_number_stays_that_of_the_capture():
    x, factor = numbers(), [2.0]
    graph, y = record(lambda: x * factor[0])
    factor[0] = 5.0
    graph.replay()
    assert y.tolist() == [6.0, -2.0, 4.0]


def test_a_tensor_put_in_anothers_place_is_not_seen():
    holder = torch.nn.Linear(1, 3, bias=False)
    holder.x = numbers()
    graph, y = record(lambda: holder.x + holder.weight.view(-1))
    before = y.clone()
    holder.x, holder.weight.data = torch.zeros(3), torch.zeros(3, 1)
    graph.replay()
    assert torch.equal(y, before)


def test_memory_that_a_graph_does_not_write_holds_nothing():
    x = numbers()

    def function():
        y = torch.empty(4)
        y[:3] = x
        return y

    graph, y = record(function)
    with torch.inference_mode():
        y.zero_()
    graph.replay()
    assert y[:3].tolist() == x.tolist() and y[3].isnan()


def test_a_launch_is_one_entry_with_its_arguments_of_then():
    seen = []

    @launch
    def kernel(x, factor, *, rows):
        seen.append((factor, len(rows)))
        # Reads what it likes, as a kernel does.
        rows[0].fill_(float(x.sum().item()) * factor)
        return rows[0], x * factor

    x, out, rest = numbers(), torch.zeros(2), []
    rows = [out, rest]
    graph, (same, made) = record(lambda: kernel(x, 2, rows=rows))
    assert len(graph.calls) == 1 and same.data_ptr() == out.data_ptr()
    rows.append(None)
    x.fill_(1.0)
    graph.replay()
    assert seen == [(2, 2), (2, 2)]
    assert out.tolist() == [6.0, 6.0] and made.tolist() == [2.0] * 3


def write_many(x):
    x[x > 0] = torch.ones(2)


@pytest.mark.parametrize(
    "wait",
    [
        lambda x: x.sum().item(),
        lambda x: x.tolist(),
        lambda x: x.cpu(),
        lambda x: x.numpy(),
        lambda x: np.asarray(x),
        lambda x: bool(x.any()),
        lambda x: int(x[0]),
        lambda x: x if x[0] > 0 else -x,
        lambda x: x[x[0].long()],
        lambda x: x[x > 0],
        lambda x: x.nonzero(),
        lambda x: x.unique(),
        lambda x: x.masked_select(x > 0),
        lambda x: torch.equal(x, x),
        lambda x: x.repeat_interleave(x.long()),
        lambda x: x + torch.tensor([1.0]),
        lambda x: x + torch.from_numpy(np.ones(3)),
        write_many,
    ],
)
def test_what_waits_for_the_device_is_refused(wait):
    with pytest.raises(WaitsForDevice):
        record(wait, numbers())
    # And nothing is left behind.
    assert RecordedGraph.capturing is None and numbers().tolist() == [3.0, -1.0, 2.0]


def write_one(x):
    x[x > 0] = 0.0


@pytest.mark.parametrize(
    "allowed",
    [
        lambda x: x[torch.arange(2)],
        lambda x: x.masked_fill(x > 0, 0.0),
        lambda x: torch.where(x > 0, x, 0),
        lambda x: torch.arange(3).repeat_interleave(torch.full((3,), 2), output_size=6),
        write_one,
    ],
)
def test_what_a_graph_can_hold_is_not(allowed):
    graph, _ = record(allowed, numbers())
    assert graph.calls
