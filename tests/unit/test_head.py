# SPDX-License-Identifier: Apache-2.0
"""The draft head's forward: what each row may see, what the checkpoint holds, and that it loads as written."""

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen3Config, Qwen3ForCausalLM

from vllm_kvspec.models.draft_head import KVSpecDraftModel, head_config_for
from vllm_kvspec.models.target import anchor_inputs, view_target

BLOCK = 4


def make_target(seed=0):
    torch.manual_seed(seed)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=60, tie_word_embeddings=True, max_position_embeddings=128,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def make_head(target, **overrides):
    torch.manual_seed(1)
    config = head_config_for(target.config, num_hidden_layers=2, draft_block_size=BLOCK, transition_rank=8, **overrides)
    head = KVSpecDraftModel(config).eval()
    # Zero output projections would hide every mistake in the attention.
    for layer in head.layers:
        torch.nn.init.normal_(layer.self_attn.o_proj.weight, std=0.2)
    return head


def run(head, target, ids, base):
    view = view_target(target, head.config, ids)
    embeds, hidden = anchor_inputs(target, view, ids, base)
    with torch.no_grad():
        return head(embeds, base, view.context, hidden)


@pytest.fixture(params=["kv", "hybrid"])
def pair(request):
    target = make_target()
    return target, make_head(target, context=request.param)


def test_anchors_do_not_see_each_other(pair):
    target, head = pair
    ids = torch.randint(60, (2, 20))
    base = torch.tensor([[0, 3, 19], [7, 7, 12]])
    together = run(head, target, ids, base)
    assert together.shape == (2, 3, BLOCK, 32)
    for column in range(3):
        alone = run(head, target, ids, base[:, column : column + 1])
        torch.testing.assert_close(together[:, column], alone[:, 0], atol=1e-5, rtol=1e-4)


def test_a_block_depends_on_the_text_up_to_its_anchor_and_on_no_more(pair):
    target, head = pair
    ids = torch.randint(60, (1, 20))
    base = torch.tensor([[10]])
    out = run(head, target, ids, base)
    for changed, matters in ((0, True), (9, True), (10, True), (11, False), (19, False)):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % 60
        difference = (run(head, target, other, base) - out).abs().max()
        assert (difference > 1e-6) == matters, changed


def test_every_row_sees_its_whole_block(pair):
    target, head = pair
    ids, base = torch.randint(60, (1, 12)), torch.tensor([[8]])
    out = run(head, target, ids, base)
    with torch.no_grad():
        head.block_embedding[-1] += 1.0
    assert ((run(head, target, ids, base) - out).abs().amax(-1) > 1e-6).all()


def test_only_the_hybrid_head_uses_the_last_hidden_state():
    target = make_target()
    ids, base = torch.randint(60, (1, 12)), torch.tensor([[8]])
    for context, matters in (("kv", False), ("hybrid", True)):
        head = make_head(target, context=context)
        view = view_target(target, head.config, ids)
        embeds, hidden = anchor_inputs(target, view, ids, base)
        torch.testing.assert_close(hidden[0, 0], view.hidden[0, 7])
        with torch.no_grad():
            outs = [head(embeds, base, view.context, hidden + shift) for shift in (0, 1)]
        assert (not torch.equal(*outs)) == matters


def test_attention_equals_a_float64_loop(pair):
    """One row of the first layer, written out: softmax over the context's keys, then the block's."""
    target, head = pair
    ids, base = torch.randint(60, (1, 9)), torch.tensor([[6]])
    view = view_target(target, head.config, ids)
    embeds, hidden = anchor_inputs(target, view, ids, base)
    attention, captured = head.layers[0].self_attn, {}
    attention.o_proj.register_forward_pre_hook(lambda _, args: captured.update(out=args[0]))
    with torch.no_grad():
        head(embeds, base, view.context, hidden)
        x = head.layers[0].input_layernorm(head.block_inputs(embeds, hidden))[0, 0]
        q, k, v = (layer(x).view(BLOCK, -1, 16) for layer in (attention.q_proj, attention.k_proj, attention.v_proj))
        q, k = attention.q_norm(q), attention.k_norm(k)

    def rotate(vectors):
        frequency = 1.0 / 10000.0 ** (torch.arange(8, dtype=torch.float64) / 8)
        angle = torch.arange(6, 6 + BLOCK, dtype=torch.float64)[:, None] * frequency
        first, second = vectors.double()[..., :8], vectors.double()[..., 8:]
        cos, sin = angle.cos()[:, None], angle.sin()[:, None]
        return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1)

    q, k = rotate(q), rotate(k)
    past_k, past_v = (past[0, :, :6].transpose(0, 1).double() for past in view.context[0])
    keys, values = torch.cat((past_k, k)), torch.cat((past_v, v.double()))
    expected = torch.empty(BLOCK, 4, 16, dtype=torch.float64)
    for head_index in range(4):
        weights = (q[:, head_index] @ keys[:, head_index // 2].T / 4).softmax(-1)
        expected[:, head_index] = weights @ values[:, head_index // 2]
    torch.testing.assert_close(captured["out"][0].double(), expected.flatten(1), atol=1e-5, rtol=1e-4)


def test_a_new_head_starts_without_attention_and_without_bias():
    target = make_target()
    head = KVSpecDraftModel(head_config_for(target.config, num_hidden_layers=2))
    assert all(not layer.self_attn.o_proj.weight.any() for layer in head.layers)
    assert not head.transition_bias(torch.arange(60)).any()
    assert head.block_embedding.std() > 0


def test_checkpoint_holds_the_documented_names(tmp_path, pair):
    target, head = pair
    head.save_pretrained(tmp_path)
    names = set(load_file(tmp_path / "model.safetensors"))
    expected = {"block_embedding", "norm.weight", "transition_in.weight", "transition_out.weight"}
    expected |= {"context_proj.weight"} if head.config.context == "hybrid" else set()
    for i in range(2):
        expected |= {f"layers.{i}.self_attn.{n}.weight" for n in ("q_proj", "k_proj", "v_proj", "o_proj")}
        expected |= {f"layers.{i}.self_attn.{n}.weight" for n in ("q_norm", "k_norm")}
        expected |= {f"layers.{i}.mlp.{n}.weight" for n in ("gate_proj", "up_proj", "down_proj")}
        expected |= {f"layers.{i}.{n}.weight" for n in ("input_layernorm", "post_attention_layernorm")}
    assert names == expected
    ids, base = torch.randint(60, (1, 12)), torch.tensor([[8]])
    loaded = KVSpecDraftModel.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(run(loaded, target, ids, base), run(head, target, ids, base))


def test_previous_tokens_add_the_bias_to_one_forward(pair):
    target, head = pair
    torch.nn.init.normal_(head.transition_out.weight)
    ids, base = torch.randint(60, (1, 12)), torch.tensor([[3, 8]])
    view = view_target(target, head.config, ids)
    embeds, hidden = anchor_inputs(target, view, ids, base)
    previous = torch.randint(60, (1, 2, BLOCK))
    out, bias = head(embeds, base, view.context, hidden, previous)
    torch.testing.assert_close(out, run(head, target, ids, base))
    expected = head.transition_in.weight[previous] @ head.transition_out.weight.T
    torch.testing.assert_close(bias, expected)
