# SPDX-License-Identifier: Apache-2.0
"""The measured bottlenecks on heads for which the answer is known: copied queries, closed paths, fixed gates."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from vllm_kvspec.eval.bottlenecks import (
    attention_query_error,
    bottlenecks,
    captured_attention,
    gate_statistics,
    gradient_share,
)
from vllm_kvspec.eval.texts import Text
from vllm_kvspec.models.draft_head import KVSpecDraftModel, head_config_for
from vllm_kvspec.models.drafting import draft_logits
from vllm_kvspec.models.target import view_target

BLOCK, VOCAB = 3, 40
TEXTS = [Text(torch.arange(length).remainder(VOCAB - 3).mul(7).remainder(VOCAB).tolist(), 4, 0) for length in (24, 31)]


@pytest.fixture(scope="module")
def target():
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=VOCAB, tie_word_embeddings=True, max_position_embeddings=128, initializer_range=0.3,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def make_head(target, **fields) -> KVSpecDraftModel:
    fields = {"draft_block_size": BLOCK, "num_hidden_layers": 1, "transition_rank": 8, **fields}
    torch.manual_seed(1)
    return KVSpecDraftModel(head_config_for(target.config, **fields)).eval()


def with_queries_of(target, head: KVSpecDraftModel) -> KVSpecDraftModel:
    """A one-layer head whose rows are the tokens' embeddings and whose queries are the target's first layer's."""
    own, wanted = head.layers[0], target.model.layers[0]
    with torch.no_grad():
        own.input_layernorm.weight.copy_(wanted.input_layernorm.weight)
        own.self_attn.q_proj.weight.copy_(wanted.self_attn.q_proj.weight)
        own.self_attn.q_norm.weight.copy_(wanted.self_attn.q_norm.weight)
        if head.config.context == "hybrid":
            size = head.config.hidden_size
            head.context_proj.weight.copy_(torch.cat((torch.eye(size), torch.zeros(size, size)), dim=1))
    return head


@pytest.mark.parametrize("context", ["kv", "hybrid"], ids=["one pass", "row after row"])
def test_the_targets_own_queries_have_no_error(target, context):
    head = make_head(target, context=context, drafting="autoregressive", target_kv_layer_ids=[0])
    error = attention_query_error(with_queries_of(target, head), target, TEXTS)
    for key in ("by_depth", "grouped"):
        assert error[key] == pytest.approx([0] * BLOCK, abs=1e-5)
    assert error["stale"][0] == pytest.approx(0, abs=1e-6) and min(error["stale"][1:]) > 0.05
    # The same queries over the keys of another layer are not that layer's queries.
    head.config.target_kv_layer_ids = [1]
    assert min(attention_query_error(head, target, TEXTS)["by_depth"]) > 0.05


def test_permuted_heads_look_wrong_one_by_one_but_not_grouped(target):
    head = with_queries_of(target, make_head(target, context="kv", drafting="autoregressive", target_kv_layer_ids=[0]))
    with torch.no_grad():
        weight = head.layers[0].self_attn.q_proj.weight
        weight.copy_(weight.view(4, 16, -1)[[1, 0, 3, 2]].flatten(0, 1))
    error = attention_query_error(head, target, TEXTS)
    assert min(error["by_depth"]) > 0.05
    assert error["grouped"] == pytest.approx([0] * BLOCK, abs=1e-5)


def test_stale_queries_against_a_plain_loop(target):
    head = make_head(target, context="kv", target_kv_layer_ids=[1])
    eager = Qwen3ForCausalLM(target.config).eval()
    eager.load_state_dict(target.state_dict())
    eager.set_attn_implementation("eager")
    found = torch.zeros(BLOCK)
    anchors = 0
    for text in TEXTS:
        with torch.no_grad():
            maps = eager(torch.tensor([text.input_ids]), output_attentions=True).attentions[1][0]
        for base in range(text.prompt_length, len(text.input_ids) - BLOCK):
            anchors += 1
            rows = [maps[:, base + d, :base] / maps[:, base + d, :base].sum(-1, keepdim=True) for d in range(BLOCK)]
            found += torch.stack([(rows[0] - row).abs().sum(-1).mean() / 2 for row in rows])
    assert attention_query_error(head, target, TEXTS)["stale"] == pytest.approx((found / anchors).tolist(), abs=1e-5)


def test_capturing_changes_nothing_and_ends(target):
    head = make_head(target, context="kv", num_hidden_layers=2)
    ids, base = torch.tensor([TEXTS[0].input_ids]), torch.tensor([4, 9])
    view, path = view_target(target, head.config, ids), ids[0, base[:, None] + torch.arange(BLOCK)]
    with torch.no_grad():
        before = draft_logits(head, target, view, ids, base, path)
        with captured_attention(head, ids.shape[1]) as captured:
            during = draft_logits(head, target, view, ids, base, path)
    assert torch.equal(before, during)
    assert not any("attend" in vars(layer.self_attn) for layer in head.layers)
    assert [tuple(layer.shape) for layer in captured] == [(4, 2 * BLOCK, 24)] * 2
    rows = captured[1].view(4, 2, BLOCK, 24)
    torch.testing.assert_close(rows.sum(-1), torch.ones(4, 2, BLOCK))
    assert (rows[:, 0, :, 4:] == 0).all() and (rows[:, 1, :, 9:] == 0).all() and (rows[:, 1, :, :9] > 0).all()


def test_gradient_share_counts_the_key_and_value_projections(target):
    head = make_head(target, context="kv")
    share = gradient_share(head, target, TEXTS, 1.0)
    projections = 2 * 32 * 2 * 16
    of_layers = sum(parameter.numel() for parameter in head.layers.parameters())
    assert share["parameters"] == pytest.approx(projections / sum(p.numel() for p in head.parameters()))
    assert share["parameters_of_layers"] == pytest.approx(projections / of_layers)
    # The output projection starts at zero: nothing before it gets a gradient.
    assert share["gradient"] == share["gradient_of_layers"] == 0
    with torch.no_grad():
        head.layers[0].self_attn.o_proj.weight.normal_(std=0.3)
    share = gradient_share(head, target, TEXTS, 1.0)
    assert 0 < share["gradient"] < share["gradient_of_layers"] < 1
    assert share == gradient_share(head, target, TEXTS, 1.0)
    assert all(parameter.grad is None for parameter in head.parameters())


def test_gates_of_a_gated_head(target):
    head = make_head(target, context="hybrid", fusion="gated", drafting="autoregressive")
    with torch.no_grad():
        head.layers[0].self_attn.fusion_gate.weight.zero_()
        bias = head.layers[0].self_attn.fusion_gate.bias
        bias.fill_(0.0)
        bias[:8] = -4.0
    gates = gate_statistics(head, target, TEXTS)
    assert gates["mean"] == pytest.approx((24 * 0.5 + 8 * torch.sigmoid(torch.tensor(-4.0)).item()) / 32)
    assert gates["closed"] == 8 / 32
    found = bottlenecks(head, target, TEXTS, 0.0)
    assert "attention_query_error" not in found and found["gate"] == gates
    assert "gate" not in bottlenecks(make_head(target, context="kv"), target, TEXTS, 0.0)
