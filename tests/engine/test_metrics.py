# SPDX-License-Identifier: Apache-2.0
"""vLLM's acceptance numbers are right for trees: per request and in its counters, against a count by hand.

By hand: the tokens that each engine step adds to an answer, less the one that the step without drafts would have added;
and the nodes that the scheduler sent to the target for it.
"""

from collections import defaultdict

import pytest
from engine_runner import sampling_params
from requests_mix import prompt

# A tree for each of three requests, none for more: no step of the first request drafts, some steps of the others do.
NODES, SCHEDULE = 12, [(1, 3, 12), (4, 8, 0)]
LENGTHS = (8, 30, 36, 36)
PARAMS = (
    {"temperature": 0.0},
    {"temperature": 0.0},
    {"temperature": 1.0, "seed": 3},
    # Reads the drafts as a sequence: a chain.
    {"temperature": 0.0, "repetition_penalty": 1.1},
)


def run_by_steps(llm, lengths) -> tuple[list[list[tuple[int, int]]], list]:
    """One request of each kind, together. By request: its steps that sampled, as (tokens added, nodes verified); and
    its last output."""
    engine = llm.llm_engine
    scheduler = engine.engine_core.engine_core.scheduler
    scheduled, schedule = [], scheduler.schedule

    def recorded(*args, **kwargs):
        scheduled.append(schedule(*args, **kwargs))
        return scheduled[-1]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scheduler, "schedule", recorded)
        for i, (params, length) in enumerate(zip(PARAMS, lengths, strict=True)):
            request = {**params, "max_tokens": length, "ignore_eos": True}
            engine.add_request(str(i), {"prompt_token_ids": prompt(20 + i, 300 * i)}, sampling_params(request))
        steps, done = defaultdict(list), {}
        while engine.has_unfinished_requests():
            outputs = engine.step()
            nodes = {key.split("-")[0]: len(v) for key, v in scheduled[-1].scheduled_spec_decode_tokens.items()}
            for output in outputs:
                name = output.request_id.split("-")[0]
                added = len(output.outputs[0].token_ids) - sum(tokens for tokens, _ in steps[name])
                steps[name].append((added, nodes.get(name, 0)))
                done[name] = output.outputs[0]
    names = [str(i) for i in range(len(PARAMS))]
    return [steps[name] for name in names], [done[name] for name in names]


def counters(llm) -> dict[str, list[int]]:
    """vLLM's counters of speculative decoding, as /metrics shows them."""
    return {
        metric.name.removeprefix("vllm:spec_decode_num_"): getattr(metric, "values", None) or [metric.value]
        for metric in llm.get_metrics()
        if metric.name.startswith("vllm:spec_decode_num_")
    }


def test_by_hand(make_engine, spec):
    # The same drafts in both runs.
    speculative = spec(NODES, num_speculative_tokens_per_batch_size=SCHEDULE, graft=False)
    with make_engine(speculative, per_request_spec_decode_metrics="detailed") as llm:
        # A step may accept past the end of the answer. Where do the steps end? So that no answer is cut below.
        steps, _ = run_by_steps(llm, LENGTHS)
        ends = [sum(tokens for tokens, _ in of_one[:-1]) for of_one in steps]
        before = counters(llm)
        steps, outputs = run_by_steps(llm, ends)
        found = {name: [a - b for a, b in zip(now, before[name], strict=True)] for name, now in counters(llm).items()}

    drafts = [[(tokens - 1, nodes) for tokens, nodes in of_one if nodes] for of_one in steps]
    for of_one, output in zip(drafts, outputs, strict=True):
        accepted = [a for a, _ in of_one]
        metrics = output.spec_decode_metrics.to_dict()
        # Left out when empty.
        assert metrics.get("per_step_accepted", []) == accepted
        assert metrics.get("per_step_drafted", []) == [nodes for _, nodes in of_one]
        assert metrics["acceptance_histogram"] == [accepted.count(a) for a in range(NODES + 1)]
        assert metrics["mean_acceptance_length"] == pytest.approx(1 + sum(accepted) / max(len(accepted), 1))
    together = [draft for of_one in drafts for draft in of_one]
    assert found == {
        "drafts": [len(together)],
        "draft_tokens": [sum(nodes for _, nodes in together)],
        "accepted_tokens": [sum(a for a, _ in together)],
        # Position i counts nodes accepted at depth i + 1.
        "accepted_tokens_per_pos": [sum(a > i for a, _ in together) for i in range(NODES)],
    }
    # What the test is about was there: steps without a tree, and in each request paths of several lengths.
    assert not drafts[0]
    assert all(len({a for a, _ in of_one}) > 1 for of_one in drafts[1:]), drafts
    assert all(len(of_one) < len(all_steps) - 1 for of_one, all_steps in zip(drafts[1:], steps[1:], strict=True))
