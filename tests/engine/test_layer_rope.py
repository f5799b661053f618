# SPDX-License-Identifier: Apache-2.0
"""A target whose layers have other rotary positions by type: the head turns its rows as the layer it reads, in training
as in the engine. The target copies by position alone, so any other turn is accepted by chance only."""

import pytest
from copy_language import BLOCK, PERIOD, SHAPE, make_it_copy, train_head, unseen_texts
from engine_runner import generate, spec_counters
from transformers import Gemma3ForCausalLM, Gemma3TextConfig

from vllm_kvspec.eval.acceptance import evaluate
from vllm_kvspec.models.draft_head import KVSpecDraftModel

TYPES, THETAS = ("sliding_attention", "full_attention"), (100.0, 3000.0)
ROPES = {kind: {"rope_type": "default", "rope_theta": theta} for kind, theta in zip(TYPES, THETAS, strict=True)}
# The bases share their highest frequency, which alone would tell neighbours apart: window and texts are much longer.
WINDOW, MAX_TOKENS, NUM_NODES = 32, 48, 8


@pytest.fixture(scope="module", params=[0, 1], ids=TYPES)
def layer(request) -> int:
    return request.param


@pytest.fixture(scope="module", params=["block", pytest.param("autoregressive", marks=pytest.mark.once)])
def pair(layer, request, tmp_path_factory):
    """(directory, target, head): ``layer`` of the target copies, and the head, trained for it, reads that layer."""
    config = Gemma3TextConfig(
        layer_types=list(TYPES), rope_parameters=dict(ROPES), sliding_window=WINDOW, query_pre_attn_scalar=16,
        architectures=["Gemma3ForCausalLM"], **SHAPE,
    )  # fmt: skip
    directory = tmp_path_factory.mktemp("pair")
    # Gemma's norms multiply by one more than their weight.
    target = make_it_copy(Gemma3ForCausalLM(config), layer, THETAS[layer], unit_norm=0.0)
    target.save_pretrained(directory / "target")
    head = train_head(target, directory, context="kv", target_kv_layer_ids=[layer], drafting=request.param)
    head.save_pretrained(directory / "head")
    return directory, target, head


def predicted(head, target):
    # As many tokens more as a block has: every anchor that the engine can visit has its whole block in the text.
    texts = unseen_texts(PERIOD + MAX_TOKENS + BLOCK - 1)
    return texts, evaluate(head, target, texts, [NUM_NODES], beam=8, width=4)[0][str(NUM_NODES)]


def test_a_wrong_turn_is_seen(pair, layer):
    """What the test below is worth: the same weights, turned as layers of the other type."""
    directory, target, head = pair
    other = KVSpecDraftModel.from_pretrained(directory / "head", layer_rope_parameters=[ROPES[TYPES[1 - layer]]])
    assert predicted(head, target)[1].tau == BLOCK + 1
    assert predicted(other.eval(), target)[1].tau < 3


def test_what_is_accepted_is_what_was_predicted(pair, make_engine, spec):
    directory, target, head = pair
    texts, acceptance = predicted(head, target)
    params = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True, "detokenize": False}
    batch = [{"prompt": text.input_ids[:PERIOD], "params": params} for text in texts]
    keys = {"model": str(directory / "head"), "num_speculative_tokens": NUM_NODES, "graft": False}
    engine = {"model": str(directory / "target"), "skip_tokenizer_init": True, "max_model_len": 128}
    with make_engine(spec(**keys), **engine) as llm:
        outputs = generate(llm, [batch])[0]
        counters = spec_counters(llm)
    for text, (sample,) in zip(texts, outputs, strict=True):
        assert sample["token_ids"] == text.input_ids[PERIOD:][:MAX_TOKENS]
    assert counters["drafts"] == acceptance.drafts
    assert counters["accepted_tokens"] == pytest.approx((acceptance.tau - 1) * acceptance.drafts)
