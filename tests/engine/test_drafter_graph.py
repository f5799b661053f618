# SPDX-License-Identifier: Apache-2.0
"""The drafter's CUDA graphs: a draft on padded rows, with the replay done in Python where there is no GPU. On a GPU
also: a replay gives what an eager draft gives, and a step never waits for the device. Sizes: ``test_faked_gpu.py``.
"""

import contextlib

import pytest
import torch
from engine_runner import generate, spec_counters
from requests_mix import BATCHES
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from vllm_kvspec.engine.draft.graphs import DrafterGraphs
from vllm_kvspec.engine.draft.speculator import KVSpecSpeculator


class PaddedReplay:
    """Stands in for the graphs: pads batches to multiples of 4 and runs the recorded function again.

    Each draft is done twice, padded and not, and must come out the same; no row of another request may change.
    """

    def __init__(self, speculator: KVSpecSpeculator):
        self.speculator = speculator
        self.padded = 0

    def dispatch_batch(self, num_reqs: int, nodes: int) -> BatchExecutionDescriptor:
        size = min(-(-num_reqs // 4) * 4, self.speculator.max_num_reqs)
        self.live = num_reqs
        return BatchExecutionDescriptor(CUDAGraphMode.FULL, num_tokens=size, num_reqs=size)

    def run_fullgraph(self, how: BatchExecutionDescriptor) -> None:
        speculator, state = self.speculator, self.speculator.state
        rows = speculator.rows.first(how.num_reqs)
        mine = torch.zeros(state.padding_request + 1, dtype=torch.bool)
        mine[rows.request] = True
        outputs = (state.parent, state.depth, state.ancestor_mask)
        before = [tensor[~mine].clone() for tensor in outputs]
        speculator.draft(self.live)
        alone = [tensor[rows.request[: self.live]].clone() for tensor in outputs]
        tokens = speculator.draft_tokens[: self.live].clone()
        speculator.draft(how.num_reqs)
        assert rows.request[self.live :].tolist() == [state.padding_request] * (how.num_reqs - self.live)
        assert torch.equal(speculator.draft_tokens[: self.live], tokens)
        for tensor, old, one in zip(outputs, before, alone, strict=True):
            assert torch.equal(tensor[~mine], old)
            assert torch.equal(tensor[rows.request[: self.live]], one)
        self.padded += how.num_reqs > self.live


@pytest.mark.cpu
@pytest.mark.parametrize("keys", [{"graft": False}, {"model": None}, {}], ids=["head", "without a head", "graft"])
def test_padded_drafts(make_engine, spec, same, reference, monkeypatch, keys):
    """Trees, chains among them, on padded batches: the same drafts and the text of plain decoding."""
    replays = []

    def init(self, cudagraph_mode):
        self.graphs = PaddedReplay(self)
        replays.append(self.graphs)

    monkeypatch.setattr(KVSpecSpeculator, "init_cudagraph_manager", init)
    names = ("sampled", "mixed")
    with make_engine(spec(8, budget="fixed", **keys)) as llm:
        same(generate(llm, [BATCHES[name]() for name in names]), [reference[name] for name in names])
        assert spec_counters(llm)["accepted_tokens"] > 0
    assert replays[-1].padded > 10


@pytest.fixture
def cuda_engine(make_engine, spec):
    @contextlib.contextmanager
    def start(**keys):
        keys = {"num_speculative_tokens": 16, "budget": "fixed"} | keys
        with make_engine(spec(**keys), enforce_eager=False, dtype="bfloat16") as llm:
            yield llm

    return start


@pytest.mark.gpu
@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"tree": "chain", "num_speculative_tokens": 8},
        {"tree": [3, 1], "num_speculative_tokens": 6},
        {"model": None},
    ],
)
def test_a_replay_gives_what_an_eager_draft_gives(cuda_engine, monkeypatch, keys):
    replays = []
    replay = DrafterGraphs.run_fullgraph

    def run(self, how):
        replay(self, how)
        replays.append(self)

    propose = KVSpecSpeculator.propose

    def compare(self, *args, **kwargs):
        count = len(replays)
        tokens = propose(self, *args, **kwargs).clone()
        if len(replays) > count:
            rows = self.rows.first(len(tokens))
            outputs = (self.state.parent, self.state.depth, self.state.ancestor_mask)
            graph = [tensor[rows.request].clone() for tensor in outputs]
            self.draft(len(tokens))
            assert torch.equal(self.draft_tokens[: len(tokens)], tokens)
            assert all(torch.equal(tensor[rows.request], one) for tensor, one in zip(outputs, graph, strict=True))
        return tokens

    monkeypatch.setattr(DrafterGraphs, "run_fullgraph", run)
    monkeypatch.setattr(KVSpecSpeculator, "propose", compare)
    with cuda_engine(**keys) as llm:
        generate(llm, [BATCHES["greedy"](), BATCHES["sampled"]()])
    assert len(replays) > 10


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [{}, {"model": None}], ids=["head", "without a head"])
def test_a_step_never_waits_for_the_device(cuda_engine, monkeypatch, keys):
    """Once kernels are compiled: everything that kvspec adds to a step, under torch's own check."""
    from vllm_kvspec.engine.runner import KVSpecRunnerMixin

    def watched(function):
        def call(*args, **kwargs):
            previous = torch.cuda.get_sync_debug_mode()
            torch.cuda.set_sync_debug_mode("error" if watching else previous)
            try:
                return function(*args, **kwargs)
            finally:
                torch.cuda.set_sync_debug_mode(previous)

        return call

    watching = False
    for owner, name in (
        (KVSpecRunnerMixin, "prepare_attn"),
        (KVSpecRunnerMixin, "sample"),
        (KVSpecSpeculator, "propose"),
    ):
        monkeypatch.setattr(owner, name, watched(getattr(owner, name)))
    with cuda_engine(**keys) as llm:
        generate(llm, [BATCHES["greedy"]()])
        watching = True
        generate(llm, [BATCHES["greedy"]()])
