# SPDX-License-Identifier: Apache-2.0
"""What the offline evaluator says the engine will do is what the engine's own counters say it did.

At temperature 0 a free run over the target's text is the engine's run, draft for draft. An engine that stops after M
tokens starts its last draft from token M - 1 at the latest, so the text is G - 1 tokens longer: then every anchor the
engine can visit has its whole block inside the text, and no other position is an anchor.
"""

import json
from functools import cache

import pytest
import torch
from engine_runner import HEAD, ROOT, TARGET, generate, spec_counters
from heads import write_head
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from vllm_kvspec.eval.acceptance import evaluate
from vllm_kvspec.eval.recycle import Run
from vllm_kvspec.eval.texts import Text, write_texts
from vllm_kvspec.models.draft_head import KVSpecDraftModel

MAX_TOKENS, NUM_NODES = 40, 16


HEADS = {"bundled": {}, "tied": dict(transition="tied", transition_rank=24)}


@pytest.fixture(scope="module")
def target() -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()


@cache
def texts_of(target: PreTrainedModel, length: int, temperature: float) -> list[Text]:
    """Six texts of ``length`` tokens after their prompts."""
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    rows = [json.loads(line) for line in (ROOT / "examples/prompts.jsonl").read_text().splitlines()]
    prompts = [tokenizer(row["prompt"])["input_ids"][:96] for row in rows if row.get("prompt")]
    texts = write_texts(target, tokenizer, prompts, max_new_tokens=length, temperature=temperature)
    # An engine that ignores the end of text goes on, transformers does not.
    texts = [text for text in texts if len(text.input_ids) == text.prompt_length + length][:6]
    assert len(texts) == 6
    return texts


@pytest.fixture(scope="module", params=HEADS)
def offline(target, request, tmp_path_factory):
    """The head, the texts, and the acceptance over them."""
    path = write_head(tmp_path_factory.mktemp(request.param), **HEADS[request.param])
    head = KVSpecDraftModel.from_pretrained(path, dtype=torch.float32).eval()
    texts = texts_of(target, MAX_TOKENS + head.config.draft_block_size - 1, temperature=0.0)
    return path, texts, evaluate(head, target, texts, [NUM_NODES], temperature=0.0, beam=8, width=4)[0]


def served(make_engine, spec_config: dict, texts: list[Text], temperature: float = 0.0, **arguments) -> dict:
    """The engine's counters after it has written the texts' first MAX_TOKENS tokens."""
    params = {"max_tokens": MAX_TOKENS, "temperature": temperature, "ignore_eos": True}
    batch = [{"prompt": text.input_ids[: text.prompt_length], "params": params | {"seed": text.seed}} for text in texts]
    with make_engine(spec_config, **arguments) as llm:
        outputs = generate(llm, [batch])[0]
        counters = spec_counters(llm)
    for text, (sample,) in zip(texts, outputs, strict=True):
        assert sample["token_ids"] == text.input_ids[text.prompt_length :][:MAX_TOKENS]
    return counters


@pytest.mark.parametrize("tree", ["chain", str(NUM_NODES)])
def test_the_engine_drafts_and_accepts_what_was_predicted(offline, make_engine, spec, tree):
    head, texts, predicted = offline
    keys = {"tree": "chain", "num_speculative_tokens": 8} if tree == "chain" else {"num_speculative_tokens": NUM_NODES}
    counters = served(make_engine, spec(model=head, graft=False, **keys), texts)
    acceptance = predicted[tree]
    print(f"{tree}: {acceptance.drafts:.0f} drafts, tau {acceptance.tau:.3f}; engine {counters}")
    assert counters["drafts"] == acceptance.drafts > 20
    assert counters["accepted_tokens"] == pytest.approx((acceptance.tau - 1) * acceptance.drafts, abs=1e-6)


@pytest.mark.parametrize(
    ("keys", "temperature"),
    [({}, 0.0), ({}, 1.0), ({"tree": "chain"}, 0.0), ({"graft": True}, 0.0), ({"graft": True}, 1.0)],
)
def test_recycled_drafts_are_accepted_as_predicted(target, make_engine, spec, keys, temperature):
    """Draft for draft also where each depends on all that were verified before: one request at a time."""
    texts = texts_of(target, MAX_TOKENS + NUM_NODES, temperature)
    path = HEAD if "graft" in keys else None
    head = KVSpecDraftModel.from_pretrained(path, dtype=torch.float32).eval() if path else None
    run = Run(target, NUM_NODES, chain="tree" in keys, temperature=temperature, head=head)
    for text in texts:
        run.read(text, last_anchor=text.prompt_length + MAX_TOKENS - 2)
    alone = {"max_num_seqs": 1, "enable_prefix_caching": False}
    counters = served(make_engine, spec(NUM_NODES, model=path, **keys), texts, temperature, **alone)
    print(f"predicted {run.accepted}; engine {counters}")
    assert counters["drafts"] == sum(map(len, run.accepted)) > 30
    assert counters["accepted_tokens"] == sum(map(sum, run.accepted)) > 20
    # Grafts, too, have taken part.
    assert sum(run.sources.values()) == counters["accepted_tokens"]
    assert set(run.sources) - {"head"}
    assert ("head" in run.sources) == (head is not None)


def test_a_lossy_text_is_drafted_as_predicted(target, make_engine, spec):
    """FLy: along the text that came out the exact walk accepts what the engine's lossy one did. So after a token that
    is not the target's the head reads the KV and the hidden state of that very token."""
    head = KVSpecDraftModel.from_pretrained(HEAD, dtype=torch.float32).eval()
    longer = MAX_TOKENS + head.config.draft_block_size - 1
    exact = texts_of(target, longer, temperature=0.0)
    fly = {"rejection_sample_method": "fly", "fly_window_size": 1, "fly_entropy_threshold": 0.3}

    def batch(max_tokens: int) -> list[dict]:
        params = {"max_tokens": max_tokens, "temperature": 0.0, "ignore_eos": True}
        return [{"prompt": text.input_ids[: text.prompt_length], "params": params} for text in exact]

    with make_engine(spec(NUM_NODES, graft=False, **fly)) as llm:
        (written,) = generate(llm, [batch(longer)])
        before = spec_counters(llm)
        generate(llm, [batch(MAX_TOKENS)])
        counters = {name: value - before[name] for name, value in spec_counters(llm).items() if name in before}
    texts = [
        Text(text.input_ids[: text.prompt_length] + sample["token_ids"], text.prompt_length, text.seed)
        for text, (sample,) in zip(exact, written, strict=True)
    ]
    assert [text.input_ids for text in texts] != [text.input_ids for text in exact]
    acceptance = evaluate(head, target, texts, [NUM_NODES], temperature=0.0, beam=8, width=4)[0][str(NUM_NODES)]
    assert counters["drafts"] == acceptance.drafts > 20
    assert counters["accepted_tokens"] == pytest.approx((acceptance.tau - 1) * acceptance.drafts, abs=1e-6)
