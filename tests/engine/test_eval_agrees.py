# SPDX-License-Identifier: Apache-2.0
"""What the offline evaluator says the engine will do is what the engine's own counters say it did.

At temperature 0 a free run over the target's text is the engine's run, draft for draft. An engine that stops after M
tokens starts its last draft from token M - 1 at the latest, so the text is G - 1 tokens longer: then every anchor the
engine can visit has its whole block inside the text, and no other position is an anchor.
"""

import json

import pytest
import torch
from engine_runner import ROOT, TARGET, generate, spec_counters
from heads import write_head
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_kvspec.eval.acceptance import evaluate
from vllm_kvspec.eval.texts import write_texts
from vllm_kvspec.models.draft_head import KVSpecDraftModel

MAX_TOKENS, NUM_NODES = 40, 16


HEADS = {"bundled": {}, "tied": dict(transition="tied", transition_rank=24)}


@pytest.fixture(scope="module", params=HEADS)
def offline(request, tmp_path_factory):
    """The head, the texts, and the acceptance over them."""
    path = write_head(tmp_path_factory.mktemp(request.param), **HEADS[request.param])
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    head = KVSpecDraftModel.from_pretrained(path, dtype=torch.float32).eval()
    rows = [json.loads(line) for line in (ROOT / "examples/prompts.jsonl").read_text().splitlines()]
    prompts = [tokenizer(row["prompt"])["input_ids"][:96] for row in rows if row.get("prompt")]
    length = MAX_TOKENS + head.config.draft_block_size - 1
    texts = write_texts(target, tokenizer, prompts, max_new_tokens=length, temperature=0.0)
    # An engine that ignores the end of text goes on, transformers does not.
    texts = [text for text in texts if len(text.input_ids) == text.prompt_length + length][:6]
    assert len(texts) == 6
    return path, texts, evaluate(head, target, texts, [NUM_NODES], temperature=0.0, beam=8, width=4)[0]


@pytest.mark.parametrize("tree", ["chain", str(NUM_NODES)])
def test_the_engine_drafts_and_accepts_what_was_predicted(offline, make_engine, spec, tree):
    head, texts, predicted = offline
    keys = {"tree": "chain", "num_speculative_tokens": 8} if tree == "chain" else {"num_speculative_tokens": NUM_NODES}
    params = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True}
    batch = [{"prompt": text.input_ids[: text.prompt_length], "params": params} for text in texts]
    with make_engine(spec(model=head, **keys)) as llm:
        outputs = generate(llm, [batch])[0]
        counters = spec_counters(llm)
    for text, (sample,) in zip(texts, outputs, strict=True):
        assert sample["token_ids"] == text.input_ids[text.prompt_length :][:MAX_TOKENS]
    acceptance = predicted[tree]
    print(f"{tree}: {acceptance.drafts:.0f} drafts, tau {acceptance.tau:.3f}; engine {counters}")
    assert counters["drafts"] == acceptance.drafts > 20
    assert counters["accepted_tokens"] == pytest.approx((acceptance.tau - 1) * acceptance.drafts, abs=1e-6)
