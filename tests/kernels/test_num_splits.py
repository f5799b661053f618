# SPDX-License-Identifier: Apache-2.0
"""How many parts the keys of a request are cut into, for the 132 multiprocessors of an H100 or H200."""

import pytest
import torch

from vllm_kvspec.kernels import _paged_softmax
from vllm_kvspec.kernels._paged_softmax import MAX_SPLITS, MIN_SPLIT_KEYS, num_splits

CUDA = torch.device("cuda")


@pytest.fixture(autouse=True)
def h100(monkeypatch):
    monkeypatch.setattr(_paged_softmax, "_num_multiprocessors", lambda device: 132)


@pytest.mark.parametrize(
    ("programs", "max_keys", "num_warps", "splits"),
    [
        pytest.param(8, 40960, 8, 16, id="one request, one wave of the most splits"),
        pytest.param(8, 40960, 4, 16, id="one request, small tiles"),
        pytest.param(64, 40960, 8, 2, id="128 of 132"),
        pytest.param(64, 40960, 4, 4, id="256 of 264"),
        pytest.param(96, 40960, 8, 4, id="three waves of a quarter instead of one"),
        pytest.param(160, 40960, 8, 4, id="five of a quarter instead of two"),
        pytest.param(128, 40960, 8, 1, id="full"),
        pytest.param(1024, 40960, 8, 1, id="many waves"),
        pytest.param(8, 600, 8, 2, id="few keys"),
        pytest.param(8, 100, 8, 1, id="fewer"),
    ],
)
def test_choice(programs, max_keys, num_warps, splits):
    assert num_splits(programs, max_keys, CUDA, num_warps) == splits


def test_always_a_power_of_two_within_bounds():
    for programs in range(1, 600):
        for max_keys in (1, 512, 5000, 100_000):
            splits = num_splits(programs, max_keys, CUDA, 8)
            assert splits & (splits - 1) == 0 and 1 <= splits <= MAX_SPLITS
            assert splits == 1 or max_keys >= splits * MIN_SPLIT_KEYS


def test_one_on_cpu():
    assert num_splits(1, 40960, torch.device("cpu"), 4) == 1
