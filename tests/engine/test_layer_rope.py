# SPDX-License-Identifier: Apache-2.0
"""A target whose layers have other rotary positions by type: the head turns its rows as the layer it reads, in training
as in the engine. The target copies by position alone, so any other turn is accepted by chance only."""

import pytest
from copy_language import BLOCK, PERIOD, SHAPE, make_it_copy, train_head, unseen_texts
from engine_runner import generate, spec_counters
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from vllm_kvspec.eval.acceptance import evaluate

TYPES, THETAS = ("sliding_attention", "full_attention"), (100.0, 3000.0)
MAX_TOKENS, NUM_NODES = 24, 8


def make_target(layer: int) -> Gemma3ForCausalLM:
    rope = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in zip(TYPES, THETAS, strict=True)}
    config = Gemma3TextConfig(
        layer_types=list(TYPES), rope_parameters=rope, sliding_window=PERIOD + 1, query_pre_attn_scalar=16,
        architectures=["Gemma3ForCausalLM"], **SHAPE,
    )  # fmt: skip
    # Gemma's norms multiply by one more than their weight.
    return make_it_copy(Gemma3ForCausalLM(config), layer, THETAS[layer], unit_norm=0.0)


@pytest.mark.parametrize("layer", [0, 1], ids=TYPES)
@pytest.mark.parametrize("drafting", ["block", "autoregressive"])
def test_what_is_accepted_is_what_was_predicted(layer, drafting, tmp_path, make_engine, spec):
    target = make_target(layer)
    target.save_pretrained(tmp_path / "target")
    head = train_head(target, tmp_path, context="kv", target_kv_layer_ids=[layer], drafting=drafting)
    head.save_pretrained(tmp_path / "head")
    # As many tokens more as a block has: every anchor that the engine can visit has its whole block in the text.
    texts = unseen_texts(PERIOD + MAX_TOKENS + BLOCK - 1)
    predicted = evaluate(head, target, texts, [NUM_NODES], beam=8, width=4)[0][str(NUM_NODES)]
    assert predicted.tau == BLOCK + 1
    params = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True, "detokenize": False}
    batch = [{"prompt": text.input_ids[:PERIOD], "params": params} for text in texts]
    keys = {"model": str(tmp_path / "head"), "num_speculative_tokens": NUM_NODES}
    engine = {"model": str(tmp_path / "target"), "skip_tokenizer_init": True, "max_model_len": 128}
    with make_engine(spec(**keys), **engine) as llm:
        outputs = generate(llm, [batch])[0]
        counters = spec_counters(llm)
    for text, (sample,) in zip(texts, outputs, strict=True):
        assert sample["token_ids"] == text.input_ids[PERIOD:][:MAX_TOKENS]
    assert counters["drafts"] == predicted.drafts
    assert counters["accepted_tokens"] == pytest.approx((predicted.tau - 1) * predicted.drafts)
