# SPDX-License-Identifier: Apache-2.0
"""What the launchers do on the host a CUDA graph can hold, without a wait for the device.

Each is captured as a recorded graph, whose entries are then its kernels, interpreted, and replayed.
"""

import importlib
from pathlib import Path

import pytest
import torch
from recorded_graphs import RecordedGraph, capture, launch
from triton.runtime.interpreter import InterpretedFunction

pytestmark = pytest.mark.cpu

SHAPE = "--device cpu --small --batch 2 --rows 5 --layers 1"
LAUNCHERS = (
    "tree_attention",
    "paged_draft_attention",
    "kv_compact",
    "tree_inputs",
    "tree_walk",
    "loose_scores",
    "tree_build",
    "draft_inputs",
    "recycle_update",
    "own_matches",
    "recycle_tree",
    "tree_candidates",
    "gumbel_noise",
)
# They change what they read.
ONLY_ONCE = ("kv_compact", "recycle_update")


@pytest.fixture
def cases(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    bench = importlib.import_module("bench_kernels")
    assert set(bench.KERNELS) == set(LAUNCHERS)

    def make(kernel: str) -> list:
        arguments = bench.parse_arguments(["--kernels", kernel, *SHAPE.split()])
        return [case() for _, _, case in bench.cases(arguments, torch.device("cpu"))]

    return make


@pytest.mark.parametrize("kernel", LAUNCHERS)
def test_every_launcher(kernel, cases, monkeypatch):
    monkeypatch.setattr(InterpretedFunction, "run", launch(InterpretedFunction.run))
    (case,) = cases(kernel)
    graph = RecordedGraph()
    with torch.inference_mode(), capture(graph):
        found = case.run()
    kernels = [call for call in graph.calls if call.function is InterpretedFunction.run.__wrapped__]
    assert kernels
    if kernel not in ONLY_ONCE:
        graph.replay()
    assert case.compare(found, case.twin())[1]
