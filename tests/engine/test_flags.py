# SPDX-License-Identifier: Apache-2.0
"""Every flag of vLLM and every parameter of a request has been looked at once: ``flags.toml`` says what came of it."""

import ast
import re
import tomllib
from collections import Counter
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import pytest
import reasoning_marks
import requests_mix
from engine_runner import HEAD, PLAIN_ENGINE, TARGET, generate, sampling_params, spec_counters
from requests_mix import BATCHES
from safetensors.torch import load_file
from vllm import SamplingParams
from vllm.config import ECTransferConfig
from vllm.engine.arg_utils import AsyncEngineArgs, EngineArgs
from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
from vllm.entrypoints.openai.completion.protocol import CompletionRequest

from vllm_kvspec.engine.config.refusals import is_encoder_only
from vllm_kvspec.engine.hooks.compat import installed_minor

HERE = Path(__file__).parent
LIST = tomllib.loads((HERE / "flags.toml").read_text())
SECTIONS = ("works", "refused", "unshown", "irrelevant")
TESTS = {
    (name, test)
    for kind in ("engine", "request")
    for section in ("works", "refused")
    for name, test in LIST[kind][section].items()
    if isinstance(test, str)
}
REFUSED = {name: how for name, how in LIST["engine"]["refused"].items() if not isinstance(how, str)}


def names_of(kind: str) -> set[str]:
    """What the installed vLLM has."""
    if kind == "engine":
        return {field.name for cls in (EngineArgs, AsyncEngineArgs) for field in fields(cls)}
    public = {name for name in SamplingParams.__struct_fields__ if not name.startswith("_")}
    return public | set(CompletionRequest.model_fields) | set(ChatCompletionRequest.model_fields)


@pytest.mark.parametrize("kind", ["engine", "request"])
def test_every_one_is_decided(kind):
    decided = Counter(name for section in SECTIONS for name in LIST[kind][section])
    twice = sorted(name for name, times in decided.items() if times > 1)
    assert not twice, f"{twice}: leave each in one section of flags.toml."
    new = sorted(names_of(kind) - set(decided))
    assert not new, (
        f"vLLM has {new}, about which flags.toml says nothing: read what Model Runner V2, the scheduler and our code "
        "do with each, make it work or refuse it (engine/config/refusals.py), and list it; in [since] too if another "
        "supported vLLM does not have it."
    )
    elsewhere = {
        name
        for version, names in LIST["since"].items()
        if tuple(map(int, version.split("."))) > installed_minor()
        for name in names
    }
    gone = sorted(set(decided) - names_of(kind) - elsewhere)
    assert not gone, f"flags.toml lists {gone}, which this vLLM does not have: take them out, or add them to [since]."


@pytest.mark.parametrize(("name", "test"), sorted(TESTS))
def test_the_named_test_exists_and_has_the_flag(name, test):
    file, function = test.split("::")
    text = (HERE / file).read_text()
    assert function in {node.name for node in ast.parse(text).body if isinstance(node, ast.FunctionDef)}
    sent = "".join((HERE / helper).read_text() for helper in ("requests_mix.py", "engine_runner.py"))
    assert re.search(rf"\b{name}\b|--{name.replace('_', '-')}\b", text + sent)


def kvspec(**keys) -> dict:
    return {"method": "kvspec", "model": HEAD, "num_speculative_tokens": 8, **keys}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_at_start(name):
    how = REFUSED[name]
    budget = {"budget": "fixed"} if how.get("fixed") else {}
    arguments = {"max_model_len": 256, **how.get("with", {}), name: how["value"]}
    with pytest.raises(ValueError) as error:
        EngineArgs(
            model=TARGET, dtype="float32", speculative_config=kvspec(**budget), **arguments
        ).create_engine_config()
    assert how["says"] in str(error.value)


@pytest.mark.parametrize("name", LIST["request"]["refused"])
def test_refused_requests(name):
    how = LIST["request"]["refused"][name]
    config = EngineArgs(
        model=TARGET, dtype="float32", max_model_len=256, speculative_config=kvspec()
    ).create_engine_config()
    params = SamplingParams(**{name: how["value"]})
    with pytest.raises(ValueError, match=how["says"]):
        params.verify(config.model_config, config.speculative_config, config.structured_outputs_config, None)


def test_steps_that_hold_a_tree_are_allowed():
    """And shorter ones where the load decides: vLLM's scheduler does not fill up to a whole tree then."""
    for keys, tokens in ((kvspec(budget="fixed"), 9), (kvspec(), 8)):
        EngineArgs(
            model=TARGET, dtype="float32", max_model_len=256, speculative_config=keys, max_num_batched_tokens=tokens,
            max_num_seqs=4, max_num_scheduled_tokens=tokens, long_prefill_token_threshold=tokens,
        ).create_engine_config()  # fmt: skip


def test_an_encoder_alone_is_refused():
    def asked(role: str | None = None, **multimodal) -> bool:
        transfer = role and ECTransferConfig(ec_connector="ECExampleConnector", ec_role=role)
        model = SimpleNamespace(multimodal_config=SimpleNamespace(**multimodal) if multimodal else None)
        return bool(is_encoder_only(SimpleNamespace(ec_transfer_config=transfer), model))

    assert asked(mm_encoder_only=True) and asked("ec_producer", mm_encoder_only=False)
    assert not asked() and not asked(mm_encoder_only=False) and not asked("ec_both", mm_encoder_only=False)


SCHEDULER_AND_METRICS = {
    "cudagraph_metrics": True,
    "enable_logging_iteration_details": True,
    "enable_mfu_metrics": True,
    "enable_prompt_embeds": True,
    "kv_cache_metrics": True,
    "kv_cache_metrics_sample": 1.0,
    "kv_events_config": {"enable_kv_cache_events": True, "publisher": "null"},
    "long_prefill_token_threshold": 24,
    "max_num_active_seqs": 5,
    "max_num_scheduled_tokens": 80,
    "per_request_spec_decode_metrics": "detailed",
    "prefill_schedule_interval": 2,
    "prefix_caching_hash_algo": "sha256_cbor",
    "scheduler_reserve_full_isl": False,
    "scheduling_policy": "priority",
    "stream_interval": 3,
    "watermark": 0.05,
    "worker_extension_cls": "asked_by_rpc.Extension",
}


def test_the_scheduler_and_the_metrics(make_engine, spec, check, same, reference, tmp_path, monkeypatch):
    """Flags that move requests between steps or look at them, all at once."""
    (tmp_path / "asked_by_rpc.py").write_text(
        "class Extension:\n    def asked(self):\n        return type(self).__name__\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    request = BATCHES["greedy"]()[5]
    embedding = load_file(Path(TARGET) / "model.safetensors")["model.embed_tokens.weight"].float()
    with make_engine(spec(8), **SCHEDULER_AND_METRICS) as llm:
        assert llm.collective_rpc("asked") == ["KVSpecCPUWorker"]
        check(llm, ("greedy", "sampled", "rare"))
        before = spec_counters(llm)
        (output,) = llm.generate(
            [{"prompt_embeds": embedding[request["prompt"]]}],
            [sampling_params(request["params"])],
            priority=[3],
            use_tqdm=False,
        )
        after = spec_counters(llm)
    assert list(output.outputs[0].token_ids) == reference["greedy"][5][0]["token_ids"]
    counted = output.outputs[0].spec_decode_metrics
    for key, values in (("accepted_tokens", counted.per_step_accepted), ("draft_tokens", counted.per_step_drafted)):
        assert sum(values) == after[key] - before[key] > 0
    # A step adds its accepted tokens and one; the first token comes from the prompt, the last step may give too many.
    assert 0 <= 1 + sum(n + 1 for n in counted.per_step_accepted) - len(output.outputs[0].token_ids) <= 8


THINKING, DONE = reasoning_marks.START, reasoning_marks.END
ANSWER = r"(yes|no|maybe)( and (yes|no|maybe)){2}"
SAMPLER = {
    "logprobs_mode": "processed_logprobs",
    "reasoning_config": {"reasoning_start_str": THINKING, "reasoning_end_str": DONE},
    # Grammars begin where the thinking ends, inside a draft as well.
    "reasoning_parser": "marks",
    "use_fp64_gumbel": True,
}


def thinking_batch() -> list[dict]:
    """Requests that must stop thinking after so many tokens, and one that thinks on; then some with a grammar."""
    from transformers import AutoTokenizer

    start = AutoTokenizer.from_pretrained(TARGET)(THINKING)["input_ids"]
    batch = []
    for i, budget in enumerate((0, 5, 11, None, 0, 6, 8)):
        grammar = {"regex": ANSWER, "ignore_eos": False} if i > 3 else {}
        one = requests_mix.request(20, 300 * i, temperature=0.9 * (i % 2), seed=i, **grammar)
        one["prompt"] = [*one["prompt"], *start]
        one["params"] |= {} if budget is None else {"thinking_token_budget": budget}
        batch.append(one)
    return batch


def test_the_sampler(make_engine, spec, script, same):
    """Flags that change how a token is chosen or reported: plain decoding with them is another reference."""
    batches = [BATCHES["sampled"](), BATCHES["logprobs"](), thinking_batch()]
    job = {"engine": {**PLAIN_ENGINE, **SAMPLER}, "batches": batches}
    expected = script(job, script=reasoning_marks.__file__)["outputs"]
    texts = [samples[0]["text"] for samples in expected[2]]
    assert [DONE in text for text in texts] == [True, True, True, False, True, True, True]
    assert all(re.fullmatch(ANSWER, text.partition(DONE)[2]) for text in texts[4:])
    with make_engine(spec(8), **SAMPLER) as llm:
        same(generate(llm, batches), expected)
        assert spec_counters(llm)["accepted_tokens"] > 0
