# SPDX-License-Identifier: Apache-2.0
"""Every kind of model that vLLM serves, a few layers with random weights: the text is that of plain decoding and the
served head is its definition, or kvspec says at start in one sentence why not. ``docs/models.md`` lists the same cases.
"""

import json
from functools import partial

import pytest
import torch
from architectures import CASES, Case
from engine_runner import HEAD, PLAIN_ENGINE, generate, model_runner, quick_engines, run_script, spec_counters
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_kvspec.models import attention, draft_head
from vllm_kvspec.models.target import head_logits, view_target

ENGINE = {"skip_tokenizer_init": True, "max_model_len": 128, "kv_cache_memory_bytes": 4 << 20}
SERVED, REFUSED = [case for case in CASES if case.is_served], [case for case in CASES if case.refusal]
by_type = partial(pytest.mark.parametrize, "case", ids=lambda case: case.name)


def request(length: int, temperature: float, max_tokens: int = 16) -> dict:
    prompt = [5 + 37 * i % 400 for i in range(length)]
    params = {"max_tokens": max_tokens, "temperature": temperature, "seed": length, "ignore_eos": True}
    return {"prompt": prompt, "params": params | {"detokenize": False}}


# Within and beyond the windows; the last one is alone.
BATCHES = [[request(3, 0.0), request(18, 1.0), request(45, 0.0), request(90, 1.0)], [request(30, 0.0, max_tokens=24)]]


@pytest.fixture(scope="module", autouse=True)
def less_waiting():
    from vllm.distributed import cleanup_dist_env_and_memory

    with quick_engines():
        yield
    # An engine that refused its model late has left its process groups.
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def targets(selected, tmp_path_factory) -> dict:
    """Directories of the targets that the selected tests serve."""
    root = tmp_path_factory.mktemp("targets")
    return {case.name: write_target(case, root / case.name) for case in selected("case") if case in SERVED}


@pytest.fixture(scope="module")
def plain(targets, tmp_path_factory) -> dict[str, list]:
    """What plain vLLM answers, all targets in one process."""
    jobs = [{"engine": {"model": str(path), **ENGINE, **PLAIN_ENGINE}, "batches": BATCHES} for path in targets.values()]
    return dict(zip(targets, run_script({"jobs": jobs}, tmp_path_factory.mktemp("plain"))["outputs"], strict=True))


def write_target(case: Case, directory):
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(AutoConfig.for_model(case.model_type, **case.config)).save_pretrained(directory)
    return directory


def write_head(target, directory) -> draft_head.KVSpecDraftModel:
    """An untrained head that reads a layer of each kind, where one head can; zero output projections would hide what it
    reads."""
    torch.manual_seed(1)
    layers = draft_head.readable_layers(target.config)[-2:]
    config = draft_head.head_config_for(target.config, num_hidden_layers=len(layers), target_kv_layer_ids=layers)
    head = draft_head.KVSpecDraftModel(config).eval()
    for module in head.modules():
        if isinstance(module, attention.KVSpecAttention):
            torch.nn.init.normal_(module.o_proj.weight, std=0.2)
    head.save_pretrained(directory)
    return head


@by_type(argvalues=SERVED)
def test_text_is_that_of_plain_decoding_and_the_head_is_its_definition(
    case, targets, plain, tmp_path, make_engine, spec, same
):
    directory, expected = targets[case.name], plain[case.name]
    target = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, **case.torch_fields).eval()
    head = write_head(target, tmp_path / "head")
    texts = [
        one["prompt"] + samples[0]["token_ids"]
        for batch, outputs in zip(BATCHES, expected, strict=True)
        for one, samples in zip(batch, outputs, strict=True)
    ]
    (tmp_path / "texts.json").write_text(json.dumps(texts))
    keys = {"model": str(tmp_path / "head"), "drafter": "oracle", "oracle_file": str(tmp_path / "texts.json")}
    with make_engine(spec(num_speculative_tokens=12, **keys), model=str(directory), **ENGINE) as llm:
        same(generate(llm, BATCHES), expected, "oracle")
        assert spec_counters(llm)["accepted_tokens"] > 0
        speculator = model_runner(llm).speculator
        # From now on the head drafts, on the same engine.
        speculator.test_drafter = None
        same(generate(llm, BATCHES[:1]), expected[:1], "head")
        seen = record_blocks(speculator.drafter)
        same(generate(llm, BATCHES[1:]), expected[1:], "head alone")
    compare_with_definition(head, target, texts[-1], *(torch.cat(parts) for parts in zip(*seen, strict=True)))


def record_blocks(drafter) -> list[tuple[torch.Tensor, ...]]:
    """Will hold (base [B], hidden states [B, G, H], logits [B, G, V]) of every block that the engine's head scores."""
    seen, forward = [], drafter.head.forward

    def recorded(rows, base, *rest):
        hidden = forward(rows, base, *rest)
        logits = drafter.logits(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)
        seen.append((base.long().clone(), hidden.clone(), logits.clone()))
        return hidden

    drafter.head.forward = recorded
    return seen


@torch.no_grad()
def compare_with_definition(head, target, text: list[int], base, hidden, logits) -> None:
    ids = torch.tensor([text])
    # The last step may have gone on beyond the text that was asked for.
    inside = base < len(text)
    base, hidden, logits = base[inside], hidden[inside], logits[inside]
    view = view_target(target, head.config, ids)
    wanted = head(view, base[None], target.get_input_embeddings()(ids[:, base, None]))[0]
    assert len(base) > 1
    torch.testing.assert_close(hidden, wanted, atol=2e-3, rtol=2e-3)
    wanted = head_logits(target, wanted)
    torch.testing.assert_close(logits, wanted, atol=2e-3 * wanted.abs().max().item(), rtol=0)


@by_type(argvalues=[case for case in SERVED if case.model_type in ("gemma2", "cohere2")])
def test_text_without_a_head(case, targets, plain, make_engine, spec, same):
    """What the first round taught is accepted in the second."""
    directory, expected = targets[case.model_type], plain[case.model_type]
    with make_engine(spec(num_speculative_tokens=12, model=None), model=str(directory), **ENGINE) as llm:
        same(generate(llm, BATCHES), expected)
        before = spec_counters(llm)["accepted_tokens"]
        same(generate(llm, BATCHES), expected)
        assert spec_counters(llm)["accepted_tokens"] > before + 10


@by_type(argvalues=REFUSED)
def test_refused_at_start_in_one_sentence(case, tmp_path, spec, make_engine):
    directory = write_target(case, tmp_path / "target")
    keys = {"model": make_head_or_another(directory, tmp_path / "head")}
    with (
        pytest.raises(ValueError, match=case.refusal) as error,
        make_engine(spec(**keys), model=str(directory), **ENGINE),
    ):
        pass
    print(f"{case.name}: {error.value}")


def make_head_or_another(target, directory) -> str:
    """A head for the target, or where that is refused too, the bundled one."""
    try:
        config = draft_head.head_config_for(AutoConfig.from_pretrained(target), num_hidden_layers=1)
    except ValueError as error:
        assert str(error).startswith("A kvspec head attends to")
        return HEAD
    draft_head.KVSpecDraftModel(config).save_pretrained(directory)
    return str(directory)
