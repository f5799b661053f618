# SPDX-License-Identifier: Apache-2.0
"""What vLLM leaves for the KV cache: the room without speculation, less the head's weights.

vLLM measures the memory of one large pass (``profile_run``) and gives the rest to the cache. Bytes are counted here by
torch's own allocator records, on CPU, with the buffers of the drafter's kernels as on a GPU.
"""

import json

import pytest
import torch
from engine_runner import PLAIN_ENGINE
from torch._C._profiler import _EventType

from vllm_kvspec.engine import ops
from vllm_kvspec.kernels import recycle, tree_build, tree_candidates

REQUESTS = 1024
ENGINE = {"max_num_seqs": REQUESTS, "max_num_batched_tokens": 2 * REQUESTS}
# Of a step, by vLLM's default on a GPU: as many as its largest CUDA graph.
GRAPH_ROWS = 512


def peak_bytes(run) -> int:
    """The most that lived at once of what ``run()`` allocated."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        run()
    events, sizes = list(profile.profiler.kineto_results.experimental_event_tree()), []
    while events:
        event = events.pop()
        events.extend(event.children)
        if event.tag == _EventType.Allocation:
            sizes.append((event.start_time_ns, event.extra_fields.alloc_size))
    live = peak = 0
    for _, size in sorted(sizes, key=lambda entry: entry[0]):
        live += size
        peak = max(peak, live)
    return peak


@pytest.fixture
def auto(spec, tmp_path) -> dict:
    """Costs from a file: no steps are timed at start."""
    column = [[1, 0.001], [REQUESTS, 0.01]]
    costs = {"steps": dict.fromkeys((0, 2, 4, 8, 16), column), "context": dict.fromkeys((0, 2, 4, 8, 16), 0)}
    (tmp_path / "costs.json").write_text(json.dumps(costs))
    return spec(16, budget_costs=str(tmp_path / "costs.json"))


class NoLaunch:
    """A kernel whose launches do nothing. Triton's interpreter would copy its arguments."""

    def __getitem__(self, grid):
        return lambda *args, **kwargs: None


def draft_as_on_a_gpu(monkeypatch) -> None:
    """The wrappers of the drafter's Triton kernels, which allocate what they do on a GPU, without the launches."""
    for module, wrapper, kernels in (
        (tree_candidates, "tree_candidates", ("_child_scores_kernel", "_select_kernel")),
        (tree_build, "tree_build", ("_tree_build_kernel",)),
        (recycle, "own_matches", ("_match_kernel", "_merge_kernel")),
        (recycle, "recycle_tree", ("_tree_kernel",)),
    ):
        monkeypatch.setattr(ops, wrapper, getattr(module, wrapper))
        for kernel in kernels:
            monkeypatch.setattr(module, kernel, NoLaunch())
    monkeypatch.setattr(ops, "USE_COMPILED", False)


def drafting_bytes(runner) -> int:
    """What drafting and trees keep, the head's weights left out."""
    objects = (runner.speculator, runner.tree_state, runner.speculator.drafter, runner.rejection_sampler)
    tensors = [value for thing in objects for value in vars(thing).values() if torch.is_tensor(value)]
    tensors += [column for column in runner.speculator.rows if column is not None]
    return sum({tensor.data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}.values())


def profiled(llm) -> int:
    return llm.collective_rpc(lambda worker: peak_bytes(worker.model_runner.profile_run))[0]


def test_the_pass_that_measures_memory_needs_no_more_than_without_kvspec(make_engine, auto, monkeypatch):
    """Of 1,024 requests the load lets few have trees; a draft for all of them would take 8,192 rows of logits."""
    with make_engine(None, **ENGINE, **PLAIN_ENGINE) as llm:
        plain = profiled(llm)
    draft_as_on_a_gpu(monkeypatch)
    with make_engine(auto, **ENGINE) as llm:
        drafted = []
        runner = llm.collective_rpc(lambda worker: worker.model_runner)[0]
        speculator = runner.speculator
        draft = speculator.draft
        monkeypatch.setattr(speculator, "max_rows", GRAPH_ROWS)
        monkeypatch.setattr(speculator, "draft", lambda *args: (drafted.append(args), draft(*args)))
        ours = profiled(llm)
        vocabulary, kept = speculator.vocab_size, drafting_bytes(runner)
        hidden = speculator.drafter.head.config.hidden_size * runner.dtype.itemsize
    # Every number of nodes was drafted, for all requests that may get it.
    assert {nodes for _, _, nodes in drafted} == {2, 4, 8, 16}
    assert all(batch == GRAPH_ROWS // (nodes + 1) for batch, _, nodes in drafted)
    assert plain > 4 * REQUESTS * vocabulary
    assert ours < 1.02 * plain
    # A request's hidden state, and tokens, parents, depths, masks and positions of its 17 rows.
    assert REQUESTS * hidden < kept < REQUESTS * (hidden + 17 * 64)
