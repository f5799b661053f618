# SPDX-License-Identifier: Apache-2.0
"""Serving without a head: the text of plain decoding under every option, and who learns from whom."""

from types import SimpleNamespace

import pytest
import requests_mix
from engine_runner import generate, model_runner, spec_counters
from requests_mix import ALL, BATCHES, CORE
from vllm import SamplingParams

from vllm_kvspec.engine.draft.recycle import SHARED, owner_of


@pytest.fixture
def recycle(spec):
    """The speculative config of a user who has no head."""

    def make(num_speculative_tokens: int = 16, **keys) -> dict:
        config = spec(num_speculative_tokens, **keys)
        del config["model"]
        return config

    return make


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        pytest.param({}, ALL, id="tree"),
        pytest.param(
            {"num_speculative_tokens": 63, "draft_noise": "none"}, CORE, id="uncoupled-63", marks=pytest.mark.once
        ),
        pytest.param({"tree": "chain", "num_speculative_tokens": 6}, CORE, id="chain", marks=pytest.mark.once),
    ],
)
def test_every_feature(check, make_engine, recycle, keys, names):
    with make_engine(recycle(**keys)) as llm:
        check(llm, names)
        counters = spec_counters(llm)
    assert counters["accepted_tokens"] / counters["drafts"] > 0.3


@pytest.mark.once
@pytest.mark.parametrize(
    ("keys", "gain"),
    [pytest.param({}, 0.2, id="tree"), pytest.param({"tree": "chain", "num_speculative_tokens": 6}, 0.0, id="chain")],
)
def test_grafted_onto_a_heads_trees(check, make_engine, spec, keys, gain):
    """The text is right as before, and of greedy texts more is accepted than of the head's drafts alone."""
    accepted = []
    for graft in (False, True):
        with make_engine(spec(**keys, graft=graft)) as llm:
            check(llm, ("greedy", "greedy"))
            counters = spec_counters(llm)
            accepted.append(counters["accepted_tokens"] / counters["drafts"])
    assert accepted[1] > accepted[0] + gain


@pytest.mark.once
def test_chunked_prefill_and_preemption(check, make_engine, recycle):
    options = {"max_num_batched_tokens": 48, "max_num_seqs": 5, "enable_chunked_prefill": True}
    with make_engine(recycle(8), num_gpu_blocks_override=22, **options) as llm:
        check(llm, (*CORE, "mixed"))
        assert sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions") > 0


@pytest.mark.once
def test_budget(check, make_engine, recycle):
    """Steps are timed at start, nodes follow the load, and what was timed taught nobody anything."""
    with make_engine(recycle(16, budget="auto")) as llm:
        drafter = model_runner(llm).speculator
        owners = set(drafter.model.owner[drafter.model.context != -1].tolist())
        assert owners and SHARED not in owners
        check(llm, CORE)


def test_async_scheduling(make_engine, asynchronous, recycle, check):
    with make_engine(recycle(8), **asynchronous) as llm:
        assert llm.llm_engine.vllm_config.scheduler_config.async_scheduling
        check(llm, CORE)
        assert spec_counters(llm)["accepted_tokens"] > 0


def accepted_by(llm, *salts: str | None) -> list[float]:
    """Accepted tokens of the same greedy request, once for each salt, one after another."""
    found, before = [], spec_counters(llm).get("accepted_tokens", 0)
    for salt in salts:
        prompt = {"prompt_token_ids": requests_mix.prompt(60, 300)} | ({"cache_salt": salt} if salt else {})
        llm.generate([prompt], SamplingParams(temperature=0.0, max_tokens=48, ignore_eos=True), use_tqdm=False)
        after = spec_counters(llm)["accepted_tokens"]
        found.append(after - before)
        before = after
    return found


def test_only_requests_of_the_same_salt_learn_from_each_other(make_engine, recycle):
    """What one tenant's requests have taught must not show in how fast another's are served."""
    with make_engine(recycle(8), enable_prefix_caching=False) as llm:
        first, again, other, other_again, unsalted, unsalted_again = accepted_by(llm, "a", "a", "b", "b", None, None)
        assert again > first
        assert (other, other_again) == (first, again)
        assert (unsalted, unsalted_again) == (first, again)
        # And what the others have taught meanwhile changed nothing for the first.
        assert accepted_by(llm, "a") == accepted_by(llm, "b")


@pytest.mark.once
def test_tables_of_one_request(check, make_engine, recycle):
    with make_engine(recycle(8, recycle_scope="request"), enable_prefix_caching=False) as llm:
        first, *others = accepted_by(llm, "a", "a", None, None)
        assert first > 0 and others == [first] * 3
        check(llm, (*CORE, "mixed"))


def test_salts_come_from_our_scheduler_or_not_at_all(make_engine, recycle):
    """A user's own scheduler tells the workers no salts: then every request is alone."""
    scheduler = "vllm.v1.core.sched.scheduler.Scheduler"
    with make_engine(recycle(8), enable_prefix_caching=False, scheduler_cls=scheduler) as llm:
        first, *others = accepted_by(llm, "a", "a", None)
    assert others == [first] * 2


def test_owners():
    def owner(salt=..., name="r1", scope="salt", adapter=None):
        lora = adapter and SimpleNamespace(lora_int_id=adapter)
        request = SimpleNamespace(req_id=name, lora_request=lora, **({} if salt is ... else {"kvspec_salt": salt}))
        return owner_of(request, scope)

    assert owner(None) == owner(None, "r2") == SHARED
    assert owner("a") == owner("a", "r2") != owner("b")
    assert owner("a") != SHARED
    # The target with an adapter says other things.
    assert len({owner(salt, adapter=adapter) for salt in (None, "None", "a") for adapter in (None, 1, 2)}) == 9
    assert owner(None, adapter=1) == owner(None, "r2", adapter=1)
    assert len({owner(), owner(name="r2"), owner("a", scope="request"), owner("r1"), SHARED}) == 4
    assert owner(None, scope="request") == owner("a", scope="request") == owner()


@pytest.mark.once
def test_prefix_caching_over_drafted_blocks(make_engine, recycle, check):
    with make_engine(recycle(16)) as llm:
        check(llm, ("greedy", "sampled") * 2)
        assert sum(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits") > 0
        before = spec_counters(llm)
        generate(llm, [BATCHES["greedy"]()])
        after = spec_counters(llm)
    # By now the greedy texts are known.
    assert (after["accepted_tokens"] - before["accepted_tokens"]) / (after["drafts"] - before["drafts"]) > 1.5
