# SPDX-License-Identifier: Apache-2.0
"""The drafter's CUDA graphs: their sizes, and a draft on padded rows, with the replay done in Python where there is no
GPU. On a GPU also: a replay gives what an eager draft gives, and a step never waits for the device.
"""

import contextlib
from types import SimpleNamespace

import pytest
import torch
from engine_runner import generate, spec_counters
from requests_mix import BATCHES
from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor

from vllm_kvspec.engine.draft.graphs import DrafterGraphs
from vllm_kvspec.engine.draft.speculator import KVSpecSpeculator

CAPTURE_SIZES = [1, 2, 4, *range(8, 257, 8)]


def graphs(nodes: int, max_num_reqs: int, mode=CUDAGraphMode.FULL_DECODE_ONLY, schedule=None) -> DrafterGraphs:
    """The manager with the attributes that choose its sizes, and no device behind it."""
    self = object.__new__(DrafterGraphs)
    speculative = SimpleNamespace(
        uses_dynamic_speculative_decoding=lambda: schedule is not None, num_speculative_tokens_per_batch_size=schedule
    )
    self.vllm_config = SimpleNamespace(
        speculative_config=speculative,
        num_speculative_tokens=nodes,
        cache_config=SimpleNamespace(use_kda_recoverssm=False),
    )
    self.compilation_config = SimpleNamespace(cudagraph_capture_sizes=CAPTURE_SIZES, max_cudagraph_capture_size=256)
    self.cudagraph_mode, self.decode_query_len, self.max_num_reqs = mode, nodes + 1, max_num_reqs
    self.varlen_decode, self.ubatch_runner, self.lora_capture_cases = False, None, [0]
    self._lora_dispatch_map, self._max_lora_case = {}, 0
    self._candidates, self._capture_descs, self._graphs_captured = {}, {}, True
    self._init_candidates()
    return self


def padded_sizes(manager: DrafterGraphs, batches: range) -> list[int | None]:
    """The graph's batch size for each batch; None: eager."""
    how = [manager.dispatch_batch(batch) for batch in batches]
    return [desc.num_reqs if desc.cg_mode == CUDAGraphMode.FULL else None for desc in how]


def test_sizes_are_those_of_the_targets_decode_graphs():
    """With 17 rows per request, vLLM's token counts make graphs of 1, 2, ... requests; about a quarter is padded."""
    manager = graphs(nodes=16, max_num_reqs=64)
    # 256 tokens hold 15 requests.
    assert padded_sizes(manager, range(1, 17)) == [1, 2, 3, 4, 5, 7, 7, 9, 9, 12, 12, 12, 15, 15, 15, None]
    captured = [desc.num_reqs for desc in manager._capture_descs[CUDAGraphMode.FULL]]
    assert captured == sorted(captured, reverse=True)
    assert padded_sizes(graphs(nodes=3, max_num_reqs=64), range(1, 9)) == [1, 2, 4, 4, 6, 6, 8, 8]


def test_one_size_serves_every_number_of_nodes():
    """With a schedule the target has graphs per number of nodes; the plain decode ones need no draft."""
    manager = graphs(nodes=8, max_num_reqs=200, schedule=[(1, 8, 8), (9, 40, 3), (41, 200, 0)])
    captured = [desc.num_reqs for desc in manager._capture_descs[CUDAGraphMode.FULL]]
    assert len(captured) == len(set(captured))
    assert captured[0] == 64
    assert padded_sizes(manager, range(1, 3)) == [1, 2]
    assert padded_sizes(manager, range(65, 66)) == [None]


def test_no_graphs_where_the_user_wants_none():
    assert padded_sizes(graphs(16, 64, CUDAGraphMode.NONE), range(1, 9)) == [None] * 8
    assert not graphs(16, 64, CUDAGraphMode.NONE)._capture_descs


class PaddedReplay:
    """Stands in for the graphs: pads batches to multiples of 4 and runs the recorded function again.

    Each draft is done twice, padded and not, and must come out the same; no row of another request may change.
    """

    def __init__(self, speculator: KVSpecSpeculator):
        self.speculator = speculator
        self.padded = 0

    def dispatch_batch(self, num_reqs: int) -> BatchExecutionDescriptor:
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
def test_padded_drafts(make_engine, spec, same, reference, monkeypatch):
    """Trees, chains among them, on padded batches: the same drafts and the text of plain decoding."""
    replays = []

    def init(self, cudagraph_mode):
        self.graphs = PaddedReplay(self)
        replays.append(self.graphs)

    monkeypatch.setattr(KVSpecSpeculator, "init_cudagraph_manager", init)
    names = ("sampled", "mixed")
    with make_engine(spec(8, budget="fixed")) as llm:
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
    "keys", [{}, {"tree": "chain", "num_speculative_tokens": 8}, {"tree": [3, 1], "num_speculative_tokens": 6}]
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
def test_a_step_never_waits_for_the_device(cuda_engine, monkeypatch):
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
    with cuda_engine() as llm:
        generate(llm, [BATCHES["greedy"]()])
        watching = True
        generate(llm, [BATCHES["greedy"]()])
