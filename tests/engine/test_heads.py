# SPDX-License-Identifier: Apache-2.0
"""Every kind of head is served, with the text of plain decoding, or refused in one sentence.

The heads are the bundled one with parts taken away, so that some of their drafts are accepted without any training.
"""

import pytest
from engine_runner import TARGET, generate, spec_counters
from heads import write_head
from requests_mix import BATCHES

from vllm_kvspec.config import EAGLE3_SHAPE, KVSpecDraftConfig
from vllm_kvspec.engine.config.refusals import check_servable
from vllm_kvspec.models.create import write_untrained_head

EAGLE3 = EAGLE3_SHAPE | {"context": "hidden", "fusion": "eagle3"}


@pytest.mark.parametrize(
    ("fields", "names", "graft"),
    [
        pytest.param(
            dict(context="kv", drafting="autoregressive"),
            ("sampled",),
            False,
            id="kv-autoregressive",
            marks=pytest.mark.once,
        ),
        pytest.param(dict(drafting="autoregressive"), ("greedy", "mixed"), True, id="hybrid-autoregressive"),
        pytest.param(dict(transition_rank=0), ("greedy",), False, id="no-bias", marks=pytest.mark.once),
        pytest.param(dict(draft_vocab_size=2048), ("sampled",), True, id="draft-vocabulary", marks=pytest.mark.once),
        pytest.param(dict(transition="tied", transition_rank=24), ("greedy", "sampled"), False, id="tied"),
        pytest.param(
            dict(transition="tied", draft_vocab_size=2048),
            ("greedy",),
            False,
            id="tied-draft-vocabulary",
            marks=pytest.mark.once,
        ),
        pytest.param(
            dict(transition="tied", drafting="autoregressive"),
            ("greedy",),
            False,
            id="tied-autoregressive",
            marks=pytest.mark.once,
        ),
    ],
)
def test_served_with_the_text_of_plain_decoding(make_engine, spec, same, reference, tmp_path, fields, names, graft):
    head = write_head(tmp_path, **fields)
    # What is grafted is accepted whatever the head does.
    with make_engine(spec(12, model=head, graft=graft)) as llm:
        same(generate(llm, [BATCHES[name]() for name in names]), [reference[name] for name in names])
        counters = spec_counters(llm)
    assert counters["accepted_tokens"] > 0


def test_an_untrained_head_is_served(make_engine, spec, same, reference, tmp_path):
    head = write_untrained_head(TARGET, str(tmp_path), context="kv", draft_block_size=3, num_hidden_layers=2)
    with make_engine(spec(4, model=str(head), budget="fixed", tree=[2, 1])) as llm:
        same(generate(llm, [BATCHES["greedy"]()]), [reference["greedy"]])


@pytest.mark.parametrize(
    ("fields", "sentence"),
    [
        (dict(context="hidden", target_kv_layer_ids=[], aux_hidden_state_layer_ids=[1]), "a context cache of its own"),
        (dict(target_kv_layer_ids=[], aux_hidden_state_layer_ids=[1], **EAGLE3), "export --format eagle3"),
        (
            dict(fusion="gated", num_hidden_layers=1, target_kv_layer_ids=[0], aux_hidden_state_layer_ids=[1]),
            "fusion 'gated'.*a context cache of its own",
        ),
        (dict(context="kv", fusion="projection", target_kv_layer_ids=[0, 1]), "reads a mix of layers \\[0, 1\\]"),
        (dict(context="kv", fusion="concat", target_kv_layer_ids=[0, 1]), 'train a head with fusion "direct"'),
    ],
    ids=["hidden", "eagle3", "gated", "projection", "concat"],
)
def test_refused_heads(fields, sentence):
    with pytest.raises(ValueError, match=sentence):
        check_servable(KVSpecDraftConfig(**fields))
