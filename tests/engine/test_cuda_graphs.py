# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the target and of the drafter: replays give the text of plain decoding and the drafts of eager code.

Without a GPU the graphs are recorded ones (``recorded_graphs.py``), in vLLM's own managers. On a GPU also: a step never
waits for the device. Which sizes there are: ``test_faked_gpu.py``.
"""

import pytest
import torch
from engine_runner import generate, spec_counters
from heads import write_head
from requests_mix import ALL, BATCHES, CORE, staggered

from vllm_kvspec.engine.draft.head_drafter import Drafter
from vllm_kvspec.engine.draft.speculator import KVSpecSpeculator
from vllm_kvspec.engine.runner import KVSpecRunnerMixin
from vllm_kvspec.engine.verify import attention_cuda
from vllm_kvspec.engine.verify.attention_cuda import TreeMetadataBuilder

ONCE = {"marks": pytest.mark.once}


@pytest.mark.cpu
@pytest.mark.parametrize(
    ("keys", "flags", "names", "beside"),
    [
        pytest.param({"graft": False}, {}, ALL, True, id="head"),
        pytest.param(
            {"graft": False, "model": "token by token"}, {}, ("greedy", "mixed"), False, id="head-token-by-token",
            **ONCE,
        ),
        pytest.param({"model": None}, {}, (*CORE, "mixed"), True, id="without-a-head", **ONCE),
        pytest.param({}, {"performance_mode": "interactivity"}, ("greedy", "mixed"), False, id="graft"),
        pytest.param(
            {"tree": [3, 1, 1], "num_speculative_tokens": 9}, {"cudagraph_capture_sizes": [10, 25, 70, 80]},
            ("greedy", "mixed"), False, id="fixed-widths", **ONCE,
        ),
        pytest.param(
            {"tree": "chain", "num_speculative_tokens": 6}, {"max_cudagraph_capture_size": 32}, ("greedy", "sampled"),
            False, id="chain", **ONCE,
        ),
    ],
)  # fmt: skip
def test_text_and_drafts(make_engine, with_graphs, replays, spec, check, tmp_path, keys, flags, names, beside):
    """Also of padded batches, and of chains among trees. ``flags`` change which graphs there are. ``beside``: an engine
    without graphs accepts as much."""
    if keys.get("model"):
        keys = keys | {"model": write_head(tmp_path, drafting="autoregressive")}
    keys = {"num_speculative_tokens": 8} | keys
    accepted = []
    for options in (with_graphs, {}) if beside else (with_graphs,):
        with make_engine(spec(**keys), **options, **flags) as llm:
            check(llm, names)
            accepted.append(spec_counters(llm))
    assert accepted[0] == accepted[-1]
    assert accepted[0]["accepted_tokens"] > 0
    assert not replays.wrong
    assert {graph.uniform_token_count for graph in replays.target} == {1 + keys["num_speculative_tokens"]}
    assert min(len(replays.target), len(replays.drafter)) > 10
    # The longer rows.
    assert replays.padded or not beside


@pytest.mark.cpu
def test_the_nodes_change_with_the_load(make_engine, with_graphs, replays, spec, costs_file, reference):
    """Eight requests thin out to two: plain steps, then steps of 4 and of 8 nodes, all of them replayed."""
    lengths = {"greedy": [3, 4, 5, 8, 12, 16, 24, 32], "sampled": [4, 5, 6, 8, 24, 32]}
    batches = [staggered(name, list(wanted)) for name, wanted in lengths.items()]
    with make_engine(spec(8, graft=False, budget_costs=costs_file), **with_graphs) as llm:
        found = generate(llm, batches)
    for (name, wanted), outputs in zip(lengths.items(), found, strict=True):
        for i, length in enumerate(wanted):
            assert outputs[i][0]["token_ids"] == reference[name][i][0]["token_ids"][:length], f"{name} {i}"
    assert {graph.uniform_token_count for graph in replays.target} == {1, 5, 9}
    assert len(replays.drafter) > 10 and not replays.wrong


def chosen_by_the_batch(build):
    """A stale value: which kernel runs is decided by the host's count of drafts, as it stands during a capture."""

    def broken(self, *args, **kwargs):
        if self.tree_state.num_draft_reqs == 0:
            return super(TreeMetadataBuilder, self).build(*args, **kwargs)
        return build(self, *args, **kwargs)

    return broken


def with_a_switch(propose):
    """A stale value, of the drafter: the host decides in every step whether drafts know the noise."""

    def broken(self, *args, **kwargs):
        self.drafter.coupled = not self.drafter.coupled
        return propose(self, *args, **kwargs)

    return broken


def with_new_masks(prepare_attn):
    """An unpersisted buffer, of the target: each step's masks are in memory of their own."""

    def broken(self, *args):
        self.tree_state.batch_mask = torch.zeros_like(self.tree_state.batch_mask)
        self.tree_state.batch_len = torch.zeros_like(self.tree_state.batch_len)
        return prepare_attn(self, *args)

    return broken


def with_new_rows(propose):
    """An unpersisted buffer, of the drafter."""

    def broken(self, *args, **kwargs):
        self.rows = self._new_rows(self.speculative_config.head_config)
        return propose(self, *args, **kwargs)

    return broken


def with_trees_for_all(dispatch):
    """A graph for a batch that has chains; graphs draft trees alone."""

    def broken(self, num_reqs, nodes, with_chains):
        return dispatch(self, num_reqs, nodes, False)

    return broken


@pytest.mark.once
@pytest.mark.cpu
@pytest.mark.parametrize(
    ("owner", "name", "broken", "tree", "where"),
    [
        (TreeMetadataBuilder, "build", chosen_by_the_batch, "auto", "text"),
        (KVSpecSpeculator, "propose", with_a_switch, "auto", "drafts"),
        (KVSpecRunnerMixin, "prepare_attn", with_new_masks, "auto", "text"),
        (KVSpecSpeculator, "propose", with_new_rows, "auto", "drafts"),
        # Where chains are drafted beside trees, no graph does it.
        (KVSpecSpeculator, "_dispatch", with_trees_for_all, [3, 1, 1], "drafts"),
    ],
)
def test_planted_defects_are_seen(
    make_engine, with_graphs, replays, spec, reference, monkeypatch, owner, name, broken, tree, where
):
    """Eager, such engines write the text of plain decoding."""
    monkeypatch.setattr(owner, name, broken(getattr(owner, name)))
    with make_engine(spec(9, graft=False, tree=tree), **with_graphs) as llm:
        (found,) = generate(llm, [BATCHES["mixed"]()])
    found, expected = (
        [[sample["token_ids"] for sample in samples] for samples in batch] for batch in (found, reference["mixed"])
    )
    assert {"text": found != expected, "drafts": bool(replays.wrong)} == {"text": False, "drafts": False, where: True}


@pytest.mark.once
@pytest.mark.cpu
@pytest.mark.parametrize(
    ("owner", "name", "read"),
    [
        (attention_cuda, "attend", lambda impl, query, k, v, metadata, *_: metadata.seq_lens.tolist()),
        (Drafter, "trees", lambda self, rows, *_: rows.base[rows.base > 0]),
    ],
)
def test_a_planted_host_read_is_refused(make_engine, with_graphs, spec, monkeypatch, owner, name, read):
    from vllm.distributed import cleanup_dist_env_and_memory

    original = getattr(owner, name)

    def broken(*args, **kwargs):
        read(*args)
        return original(*args, **kwargs)

    monkeypatch.setattr(owner, name, broken)
    try:
        with (
            pytest.raises(RuntimeError, match="no CUDA graph can hold it"),
            make_engine(spec(8, graft=False), **with_graphs),
        ):
            pass
    finally:
        cleanup_dist_env_and_memory()


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
def test_a_replay_gives_what_an_eager_draft_gives(make_engine, with_graphs, replays, spec, keys):
    with make_engine(spec(**{"num_speculative_tokens": 16} | keys), **with_graphs) as llm:
        generate(llm, [BATCHES["greedy"](), BATCHES["sampled"]()])
    assert len(replays.drafter) > 10 and not replays.wrong


@pytest.mark.gpu
@pytest.mark.parametrize("keys", [{}, {"model": None}], ids=["head", "without a head"])
def test_a_step_never_waits_for_the_device(make_engine, with_graphs, spec, monkeypatch, keys):
    """Once kernels are compiled: everything that kvspec adds to a step, under torch's own check."""

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
    with make_engine(spec(16, **keys), **with_graphs) as llm:
        generate(llm, [BATCHES["greedy"]()])
        watching = True
        generate(llm, [BATCHES["greedy"]()])
