# SPDX-License-Identifier: Apache-2.0
"""The node budget in the engine: text equals plain decoding's while the number of nodes changes from step to step.

The costs come from made-up tables, so that the load of a small test moves the choice through every size.
"""

from types import SimpleNamespace

import pytest
from engine_runner import HEAD, TARGET, generate, model_runner, sampling_params, spec_counters
from requests_mix import BATCHES, staggered
from vllm.engine.arg_utils import EngineArgs

from vllm_kvspec.engine.budget import scheduler as scheduler_module
from vllm_kvspec.engine.budget import step_costs
from vllm_kvspec.engine.budget.choice import (
    RECYCLE_PROFILE,
    Acceptance,
    NodeBudget,
    Roofline,
    budget_sizes,
    read_costs,
)
from vllm_kvspec.engine.budget.scheduler import NodesByLoad
from vllm_kvspec.engine.config import selection


@pytest.fixture
def choices(monkeypatch) -> list[tuple[int, int]]:
    """(batch, nodes) of every step that an in-process engine schedules."""
    made = []
    original = NodesByLoad.__getitem__

    def record(self, batch):
        made.append((batch, original(self, batch)))
        return made[-1][1]

    monkeypatch.setattr(NodesByLoad, "__getitem__", record)
    return made


def core(llm):
    return llm.llm_engine.engine_core.engine_core


def test_text_is_that_of_plain_decoding_while_the_nodes_change(make_engine, spec, costs_file, choices, reference):
    """Eight requests thin out to two, then six more arrive: 0, 4 and 8 nodes, back to 0, and up again."""
    waves = {"greedy": [3, 4, 5, 8, 14, 18, 32, 32], "sampled": [4, 5, 6, 8, 32, 32]}
    second_wave_at = 0
    done = {}
    with make_engine(spec(8, budget_costs=costs_file)) as llm:
        engine = llm.llm_engine

        def add(name: str) -> None:
            for i, request in enumerate(staggered(name, waves[name])):
                prompt = {"prompt_token_ids": request["prompt"]}
                engine.add_request(f"{name}/{i}", prompt, sampling_params(request["params"]))

        add("greedy")
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    done[output.request_id.rsplit("-", 1)[0]] = list(output.outputs[0].token_ids)
            if not second_wave_at and choices and choices[-1][1] == 8:
                second_wave_at = len(choices)
                add("sampled")
        acceptance = core(llm).scheduler.budget.acceptance
    for name, lengths in waves.items():
        for i, length in enumerate(lengths):
            assert done[f"{name}/{i}"] == reference[name][i][0]["token_ids"][:length], f"{name} {i}"
    first, second = choices[:second_wave_at], choices[second_wave_at:]
    assert {nodes for _, nodes in first} == {nodes for _, nodes in second} == {0, 4, 8}
    # What the table says, whenever it was asked; a lower acceptance than foreseen could only mean fewer nodes.
    assert all(nodes == (8 if batch <= 2 else 4 if batch <= 5 else 0) for batch, nodes in choices)
    # Learned from the engine's own counts.
    assert acceptance.scale != 1.0


def test_asynchronous_scheduling(make_engine, asynchronous, spec, costs_file, reference):
    """The scheduler chooses a step ahead of the outputs."""
    names = ("greedy", "sampled")
    batches = [staggered("greedy", [3, 4, 5, 8, 12, 16, 24, 32]), staggered("sampled", [4, 5, 6, 8, 24, 32])]
    with make_engine(spec(8, budget_costs=costs_file), **asynchronous) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        outputs, counters = generate(llm, batches), spec_counters(llm)
    for name, batch, found in zip(names, batches, outputs, strict=True):
        for i, (request, samples) in enumerate(zip(batch, found, strict=True)):
            length = request["params"]["max_tokens"]
            assert samples[0]["token_ids"] == reference[name][i][0]["token_ids"][:length], f"{name} {i}"
    # Some steps drafted 4 nodes, some 8.
    assert 4 < counters["draft_tokens"] / counters["drafts"] < 8


def test_steps_are_timed_and_the_scheduler_gets_the_table(make_engine, spec, tmp_path, monkeypatch, same, reference):
    """At start, before the first request. Serving goes on as if nothing had happened."""
    for name, value in {"BATCHES": (1, 3), "TIMED_STEPS": 1, "LONG_CONTEXT": 64, "LONG_CONTEXT_BATCH": 1}.items():
        monkeypatch.setattr(step_costs, name, value)
    with make_engine(spec(4, budget="auto")) as llm:
        runner = model_runner(llm)
        assert runner.req_states.req_id_to_index == {}
        guessed = core(llm).scheduler.budget.costs
        found = generate(llm, [BATCHES["greedy"]()])
        measured = core(llm).scheduler.budget.costs
    same(found, [reference["greedy"]])
    assert isinstance(guessed, Roofline)
    assert measured.nodes == [0, 2, 4]
    # As timed: a larger batch may well take less.
    assert all(0 < measured.step_seconds(batch, 0, nodes) < 60 for batch in (1, 3) for nodes in measured.nodes)


def configured(spec: dict, **arguments):
    return EngineArgs(
        model=TARGET, dtype="float32", max_model_len=256, speculative_config=spec, **arguments
    ).create_engine_config()


def test_fixed_where_the_user_said_so(spec, costs_file):
    schedule = [(1, 3, 8), (4, 8, 5)]
    for keys in ({"budget": "fixed"}, {"num_speculative_tokens_per_batch_size": schedule}):
        config = configured(spec(8, **keys))
        assert config.speculative_config.budget == "fixed"
        assert config.scheduler_config.scheduler_cls == selection.SCHEDULER
        given = keys.get("num_speculative_tokens_per_batch_size")
        assert config.speculative_config.num_speculative_tokens_per_batch_size == given
    config = configured(spec(8, budget_costs=costs_file), max_num_seqs=8)
    assert config.speculative_config.budget == "auto"
    assert config.speculative_config.node_sizes == [0, 4, 8]
    assert config.scheduler_config.scheduler_cls == selection.SCHEDULER


def test_it_is_the_default(spec):
    keys = {key: value for key, value in spec(16).items() if key != "budget"}
    config = configured(keys)
    assert config.speculative_config.budget == "auto"
    assert config.speculative_config.node_sizes == sorted(budget_sizes(16))
    assert config.scheduler_config.scheduler_cls == selection.SCHEDULER
    parallel = SimpleNamespace(data_parallel_size=2)
    config.speculative_config.num_speculative_tokens_per_batch_size = None
    selection.select_budget(EngineArgs(model=TARGET), config.speculative_config, parallel)
    assert config.speculative_config.budget == "fixed"


class MadeUpTimer:
    """Steps of 40 ms a request; one call in a busy moment takes three times as long."""

    def __init__(self, busy_call: int, max_batch: int = 256):
        self.calls, self.busy_call, self.max_batch = 0, busy_call, max_batch

    def fits(self, batch: int, context: int, nodes: int) -> bool:
        return batch <= self.max_batch and context == step_costs.SHORT_CONTEXT

    def seconds(self, batch: int, context: int, nodes: int) -> float:
        self.calls += 1
        return 0.04 * batch * (3 if self.calls == self.busy_call else 1)


@pytest.mark.parametrize("busy_call", [1, 2, 3, 9])
def test_slow_steps_and_busy_moments(busy_call):
    table = step_costs.measure_step_costs(MadeUpTimer(busy_call), [0, 8])
    # 160 ms at batch 4 is too long to time a larger one; a busy moment of one round may end that round earlier.
    assert table["steps"] == {nodes: [(batch, pytest.approx(0.04 * batch)) for batch in (1, 2, 4)] for nodes in (0, 8)}
    assert step_costs.measure_step_costs(MadeUpTimer(0, max_batch=1), [0])["steps"] == {0: [(1, 0.04)]}


@pytest.mark.parametrize(
    ("keys", "arguments", "sentence"),
    [
        ({"budget": "some"}, {}, "budget"),
        ({"budget_costs": "/nowhere.json"}, {}, "budget_costs must be a JSON file"),
        ({"budget": "fixed", "budget_costs": "/nowhere.json"}, {}, 'needs budget "auto"'),
        ({"budget_costs": "costs"}, {"scheduler_cls": "my.Scheduler"}, "--scheduler-cls my.Scheduler"),
    ],
)
def test_refusals(keys, arguments, sentence, spec, costs_file):
    if keys.get("budget_costs") == "costs":
        keys = {**keys, "budget_costs": costs_file}
    with pytest.raises(ValueError, match=sentence):
        configured(spec(8, **keys), **arguments)


def test_the_change_is_logged_once_per_number_of_nodes(monkeypatch, costs_file):
    lines = []
    log = SimpleNamespace(info=lambda text, *values: lines.append(text % values), debug=lambda *_: None)
    monkeypatch.setattr(scheduler_module, "logger", log)
    budget = NodeBudget(read_costs(costs_file), Acceptance(), [0, 4, 8])
    lookup = NodesByLoad(SimpleNamespace(running=[]), budget)
    assert [lookup[batch] for batch in (1, 1, 8, 1, 8, 4)] == [8, 8, 0, 8, 0, 4]
    assert [line.split()[1] for line in lines] == ["8", "0", "4"]
    assert "at batch 8" in lines[1]


def test_without_a_table_the_roofline_serves(costs_file):
    """Until the first step's output brings measured costs."""
    from vllm_kvspec.engine.budget.scheduler import create_budget

    config = configured({"method": "kvspec", "model": HEAD, "num_speculative_tokens": 8, "budget_costs": costs_file})
    config.speculative_config.budget_costs = None
    budget = create_budget(config)
    assert isinstance(budget.costs, Roofline)
    # 4.6M parameters in float32.
    assert budget.costs.target.weight_bytes == pytest.approx(4 * 4.6e6, rel=0.1)
    assert budget.nodes(1, 100) == 8


def test_without_a_head_drafting_costs_nothing_in_the_roofline():
    from vllm_kvspec.engine.budget.scheduler import create_budget

    budget = create_budget(configured({"method": "kvspec", "num_speculative_tokens": 8}))
    assert budget.costs.draft_seconds(1, 100) == 0
    assert budget.acceptance.accepted(8) == pytest.approx(RECYCLE_PROFILE[8] - 1)


@pytest.mark.parametrize("head", [object(), None])
@pytest.mark.parametrize(("accepted", "warns"), [(0, True), (19, True), (20, False), (400, False)])
def test_next_to_no_acceptance_is_said_once(accepted, warns, head, monkeypatch):
    said = []
    monkeypatch.setattr(scheduler_module.logger, "warning", lambda text, *values: said.append(text % values))

    class Stock:
        def make_spec_decoding_stats(self, stats, num_draft_tokens, num_accepted_tokens):
            return num_accepted_tokens

    watch = type("Watch", (scheduler_module.WatchesAcceptance, Stock), {})()
    watch.vllm_config = SimpleNamespace(speculative_config=SimpleNamespace(head_config=head))
    counts = [accepted // 200 + (i < accepted % 200) for i in range(200)]
    for count in [*counts, *counts]:
        assert watch.make_spec_decoding_stats(None, 8, count) == count
        # A step without drafts shows nothing.
        watch.make_spec_decoding_stats(None, 0, 0)
    assert len(said) == warns
    if warns:
        assert f"of the first 200 drafts only {accepted} tokens" in said[0]
        assert ("the head was trained for other weights" in said[0]) is (head is not None)
