# SPDX-License-Identifier: Apache-2.0
"""Compiled functions on torch's threads: each does its part, at most so many do; without OpenMP the caller does all."""

import weakref

import numba
import pytest
import torch

from vllm_kvspec.engine.cpu.kernels import threads
from vllm_kvspec.engine.cpu.kernels.threads import f32, i64, num_threads, team, thread_number


@team(done_by=torch.int64, scaled=torch.float32, count=int, factor=float)
def scale(arguments):
    a = numba.carray(arguments, 1)[0]
    for i in range(thread_number(), a.count, num_threads()):
        i64(a.done_by)[i] = thread_number()
        f32(a.scaled)[i] *= a.factor


@pytest.fixture
def four_threads(monkeypatch):
    # Not set: vLLM forbids that in a process that has had an engine.
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize(("most", "expected"), [(99, 4), (4, 4), (2, 2), (1, 1), (0, 1)])
def test_threads_share_the_work(most, expected):
    done_by, scaled = torch.full((16,), -1), torch.arange(16.0)
    scale(most, done_by, scaled, 12, 0.5)
    assert done_by.tolist() == [i % expected for i in range(12)] + [-1] * 4
    assert scaled.tolist() == [i / 2 for i in range(12)] + [12, 13, 14, 15]


@pytest.mark.usefixtures("four_threads")
def test_the_caller_alone_where_torch_has_no_openmp(monkeypatch):
    monkeypatch.setattr(threads, "_parallel", None)
    done_by, scaled = torch.full((8,), -1), torch.ones(8)
    scale(99, done_by, scaled, 8, 3.0)
    assert done_by.tolist() == [0] * 8
    assert scaled.tolist() == [3.0] * 8


def test_a_tensor_of_another_dtype_is_refused():
    with pytest.raises(TypeError, match=r"scaled must be torch.float32, found torch.float64"):
        scale(1, torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.float64), 1, 1.0)


def test_a_temporary_lives_until_the_threads_are_done(monkeypatch):
    made, alive = [], []

    def temporary():
        tensor = torch.ones(1)
        made.append(weakref.ref(tensor))
        return tensor

    monkeypatch.setattr(threads, "_parallel", lambda *_: alive.append(made[0]() is not None))
    scale(1, torch.zeros(1, dtype=torch.int64), temporary(), 1, 1.0)
    assert alive == [True]
