# SPDX-License-Identifier: Apache-2.0
"""The draft head's forward: what each row may see, what the checkpoint holds, and that it loads as written."""

from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, Qwen3Config, Qwen3ForCausalLM

from vllm_kvspec.models.attention import KVSpecAttention
from vllm_kvspec.models.draft_head import KVSpecDraftModel, Previous, head_config_for
from vllm_kvspec.models.drafting import draft_candidates, draft_logits
from vllm_kvspec.models.target import head_logits, view_target

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
    fields = dict(num_hidden_layers=2, draft_block_size=BLOCK, transition_rank=8) | overrides
    head = KVSpecDraftModel(head_config_for(target.config, **fields)).eval()
    # Zero output projections would hide every mistake in the attention.
    for module in head.modules():
        if isinstance(module, KVSpecAttention):
            torch.nn.init.normal_(module.o_proj.weight, std=0.2)
    return head


def run(head, target, ids, base, view=None, **options):
    view = view or view_target(target, head.config, ids)
    count = BLOCK if head.config.drafting == "autoregressive" else 1
    rows = (base[..., None] + torch.arange(count)).clamp(max=ids.shape[1] - 1)
    with torch.no_grad():
        return head(view, base, view.embeds[torch.arange(len(ids))[:, None, None], rows], **options)


PARADIGMS = [
    dict(context="kv"),
    dict(context="hybrid"),
    dict(context="hidden"),
    dict(context="kv", fusion="concat"),
    dict(context="kv", fusion="projection"),
    dict(context="kv", fusion="projection_rope"),
    dict(context="hybrid", fusion="gated", num_hidden_layers=1),
]
PARADIGMS = [fields | dict(drafting=drafting) for drafting in ("block", "autoregressive") for fields in PARADIGMS]
PARADIGMS.append(
    dict(context="hidden", fusion="eagle3", drafting="autoregressive", num_hidden_layers=1, transition_rank=0)
)


@pytest.fixture(params=PARADIGMS, ids=lambda fields: "-".join(str(value) for value in fields.values()))
def pair(request):
    target = make_target()
    return target, make_head(target, **request.param)


@pytest.fixture(params=["kv", "hybrid"])
def served_pair(request):
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
    """Autoregressive rows also see the block's tokens up to their own."""
    target, head = pair
    ids = torch.randint(60, (1, 20))
    base = torch.tensor([[10]])
    out = run(head, target, ids, base)
    for changed in (0, 9, 10, 11, 12, 19):
        other = ids.clone()
        other[0, changed] = (other[0, changed] + 1) % 60
        difference = (run(head, target, other, base) - out).abs().amax(dim=-1)[0, 0] > 1e-6
        first = max(changed - 10, 0) if changed <= 10 or head.config.drafting == "autoregressive" else BLOCK
        assert difference.tolist() == [row >= first for row in range(BLOCK)], changed


def test_every_row_of_a_block_sees_all_of_it(served_pair):
    target, head = served_pair
    ids, base = torch.randint(60, (1, 12)), torch.tensor([[8]])
    out = run(head, target, ids, base)
    with torch.no_grad():
        head.block_embedding[-1] += 1.0
    assert ((run(head, target, ids, base) - out).abs().amax(-1) > 1e-6).all()


@pytest.mark.parametrize("fields", PARADIGMS[:7], ids=lambda fields: "-".join(str(value) for value in fields.values()))
def test_each_context_reads_what_it_says_and_nothing_else(fields):
    """At base 8: the target's KV, its last hidden state at 7, or fused hidden states of all positions before."""
    target = make_target()
    ids, base = torch.randint(60, (1, 12)), torch.tensor([[8]])
    head = make_head(target, **fields)
    view = view_target(target, head.config, ids)
    out = run(head, target, ids, base, view)

    def changes(**parts):
        return not torch.equal(run(head, target, ids, base, replace(view, **parts)), out)

    def bump(states, position):
        states = states.clone()
        states[:, position] += 1
        return states

    own = fields["context"] == "hidden" or fields.get("fusion") == "gated"
    shifted = [(k + 1, v - 1) for k, v in view.kv]
    assert changes(kv=shifted) == (fields["context"] != "hidden")
    assert changes(hidden=bump(view.hidden, 7)) == (fields["context"] == "hybrid" and not own)
    assert not changes(hidden=bump(view.hidden, 8))
    assert (view.fused is not None) == own
    if own:
        assert [changes(fused=bump(view.fused, position)) for position in (3, 7, 8)] == [True, True, False]


def test_autoregressive_hybrid_rows_feed_on_their_own_output():
    """The row after the anchor, computed by hand as a fresh first row with the head's output as its hidden state."""
    target = make_target()
    head = make_head(target, context="hybrid", drafting="autoregressive", num_hidden_layers=1)
    # Without keys of the rows before, only the fed back state links a row to the one before it.
    torch.nn.init.zeros_(head.layers[0].self_attn.o_proj.weight)
    ids, base = torch.randint(60, (1, 12)), torch.tensor([[5]])
    out = run(head, target, ids, base)
    view = view_target(target, head.config, ids)
    view.hidden[:, 5] = out[:, 0, 0]
    torch.testing.assert_close(run(head, target, ids, base + 1, view)[:, 0, 0], out[:, 0, 1], atol=1e-5, rtol=1e-4)


def test_concatenated_heads_equal_the_sum_of_one_source_each():
    target = make_target()
    head = make_head(target, context="kv", fusion="concat", num_hidden_layers=1, target_kv_layer_ids=[0, 3])
    ids, base = torch.randint(60, (1, 12)), torch.tensor([[8]])
    attention, captured = head.layers[0].self_attn, []
    attention.register_forward_hook(lambda _, args, out: captured.append((args, out[0])))
    run(head, target, ids, base)
    (hidden, rotary, context, mask), expected = captured[0]
    total = 0.0
    for source in range(2):
        single = make_head(target, context="kv", num_hidden_layers=1, target_kv_layer_ids=[source]).layers[0].self_attn
        with torch.no_grad():
            for name, size in (("q_proj", 64), ("k_proj", 32), ("v_proj", 32)):
                rows = slice(source * size, (source + 1) * size)
                getattr(single, name).weight.copy_(getattr(attention, name).weight[rows])
            single.o_proj.weight.copy_(attention.o_proj.weight[:, source * 64 : (source + 1) * 64])
            part = [tuple(x[:, source * 2 : source * 2 + 2] for x in kv) for kv in context]
            total = total + single(hidden, rotary, part, mask)[0]
    torch.testing.assert_close(total, expected, atol=1e-5, rtol=1e-4)


def test_projection_with_rope_redone_keeps_the_phase_of_a_key():
    """A mix that picks one source's keys must give back that source exactly, rotation included."""
    target = make_target()
    head = make_head(target, context="kv", fusion="projection_rope", num_hidden_layers=1, target_kv_layer_ids=[1, 2])
    view = view_target(target, head.config, torch.randint(60, (1, 12)))
    attention = head.layers[0].self_attn
    with torch.no_grad():
        attention.k_fuse.weight.copy_(torch.cat((torch.zeros(32, 32), torch.eye(32)), dim=1))
        key, _ = attention.project_context(view.kv, head.rotary_emb(view.embeds, torch.arange(12)[None])[0])
    torch.testing.assert_close(key, view.kv[1][0], atol=1e-5, rtol=1e-4)


def test_the_gate_mixes_as_the_paper_says():
    """g = 0 leaves the EAGLE-3 attention n; g = 1 with W_D the identity gives the cross-attention o."""
    target = make_target()
    head = make_head(target, context="hybrid", fusion="gated", num_hidden_layers=1)
    gated, captured = head.layers[0].self_attn, {}
    gated.own_attn.register_forward_hook(lambda _, args, out: captured.update(own=out[0]))
    gated.cross_attn.register_forward_hook(lambda _, args, out: captured.update(cross=out[0]))
    gated.register_forward_hook(lambda _, args, out: captured.update(out=out[0]))
    torch.nn.init.eye_(gated.delta_proj.weight)
    for bias, name in ((-1e9, "own"), (1e9, "cross")):
        torch.nn.init.constant_(gated.fusion_gate.bias, bias)
        run(head, target, torch.randint(60, (1, 12)), torch.tensor([[8]]))
        torch.testing.assert_close(captured["out"], captured[name])


def test_attention_equals_a_float64_loop(served_pair):
    """One row of the first layer, written out: softmax over the context's keys, then the block's."""
    target, head = served_pair
    ids, base = torch.randint(60, (1, 9)), torch.tensor([[6]])
    view = view_target(target, head.config, ids)
    embeds, hidden = view.embeds[:, 6:7], view.hidden[:, 5:6] if head.config.context == "hybrid" else None
    attention, captured = head.layers[0].self_attn, {}
    attention.o_proj.register_forward_pre_hook(lambda _, args: captured.update(out=args[0]))
    with torch.no_grad():
        head(view, base, embeds[:, :, None])
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
    past_k, past_v = (past[0, :, :6].transpose(0, 1).double() for past in view.kv[0])
    keys, values = torch.cat((past_k, k)), torch.cat((past_v, v.double()))
    expected = torch.empty(BLOCK, 4, 16, dtype=torch.float64)
    for head_index in range(4):
        weights = (q[:, head_index] @ keys[:, head_index // 2].T / 4).softmax(-1)
        expected[:, head_index] = weights @ values[:, head_index // 2]
    torch.testing.assert_close(captured["out"][0].double(), expected.flatten(1), atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("transition", ["table", "tied"])
def test_a_new_head_starts_without_attention_and_without_bias(transition):
    target = make_target()
    head = KVSpecDraftModel(head_config_for(target.config, num_hidden_layers=2, transition=transition))
    assert all(not layer.self_attn.o_proj.weight.any() for layer in head.layers)
    previous = Previous(torch.arange(60), target.get_input_embeddings().weight)
    assert not head.transition(previous, torch.randn(60, target.config.hidden_size)).any()
    assert head.block_embedding.std() > 0


def test_checkpoint_holds_the_documented_names(tmp_path, served_pair):
    target, head = served_pair
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


def test_every_paradigm_loads_as_written(tmp_path, pair):
    target, head = pair
    head.save_pretrained(tmp_path)
    loaded = KVSpecDraftModel.from_pretrained(tmp_path).eval()
    ids, base = torch.randint(60, (1, 12)), torch.tensor([[8]])
    torch.testing.assert_close(run(loaded, target, ids, base), run(head, target, ids, base))


def test_a_reduced_draft_vocabulary_round_trips_and_scores_only_its_tokens(tmp_path):
    target = make_target()
    head = make_head(target, draft_vocab_size=5)
    chosen = torch.tensor([59, 3, 0, 17, 4])
    head.set_draft_vocabulary(chosen)
    head.save_pretrained(tmp_path)
    loaded = KVSpecDraftModel.from_pretrained(tmp_path).eval()
    assert loaded.draft_token_ids.tolist() == sorted(chosen.tolist())
    assert loaded.t2d.nonzero()[:, 0].tolist() == sorted(chosen.tolist())
    ids, base = torch.randint(60, (1, 12)), torch.tensor([3, 8])
    view = view_target(target, head.config, ids)
    with torch.no_grad():
        logits = draft_logits(loaded, target, view, ids, base, ids[0, base[:, None] + torch.arange(BLOCK)])
        _, token, _ = draft_candidates(loaded, target, view, ids, base, beam=2, width=2)
    assert logits.isfinite().any(dim=(0, 1)).nonzero()[:, 0].tolist() == sorted(chosen.tolist())
    assert set(token.flatten().tolist()) <= set(chosen.tolist())


@pytest.mark.parametrize(
    "fields",
    [{"drafting": "autoregressive"}, {"draft_vocab_size": 20}, {"draft_vocab_size": 20, "transition": "tied"}],
)
def test_candidates_are_scored_along_their_paths(fields):
    """The cumulative score of each candidate, recomputed from the logits of its whole path."""
    target = make_target()
    head = make_head(target, context="hybrid", **fields)
    for name, parameter in head.named_parameters():
        if "transition" in name:
            torch.nn.init.normal_(parameter)
    if "draft_vocab_size" in fields:
        head.set_draft_vocabulary(torch.arange(2, 60, 3)[:20])
    ids, base, noise = torch.randint(60, (1, 12)), torch.tensor([8]), torch.randn(1, BLOCK, 60)
    view = view_target(target, head.config, ids)
    with torch.no_grad():
        score, token, parent = draft_candidates(head, target, view, ids, base, noise, beam=2, width=2)
        for last in range(score.shape[1]):
            path, node = [], last
            while node >= 0:
                path.insert(0, token[0, node].item())
                node = parent[0, node].item()
            rows = [ids[0, 8].item(), *path[:-1]]
            if head.config.drafting == "block":
                rows += [0] * (BLOCK - len(rows))
            logits = draft_logits(head, target, view, ids, base, torch.tensor([rows]))[0]
            logp = (logits + noise[0, : len(rows)]).log_softmax(-1)
            expected = sum(logp[d, t].item() for d, t in enumerate(path))
            assert abs(expected - score[0, last].item()) < 1e-4


def test_previous_tokens_add_the_bias_to_one_forward(served_pair):
    target, head = served_pair
    torch.nn.init.normal_(head.transition_out.weight)
    ids, base = torch.randint(60, (1, 12)), torch.tensor([[3, 8]])
    previous = torch.randint(60, (1, 2, BLOCK))
    out, bias = run(head, target, ids, base, previous=Previous(previous, None))
    torch.testing.assert_close(out, run(head, target, ids, base))
    expected = head.transition_in.weight[previous] @ head.transition_out.weight.T
    torch.testing.assert_close(bias, expected)


@pytest.mark.parametrize(
    ("model_type", "options"),
    [
        ("qwen3", {}),
        ("gemma2", {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 0.5}),
        ("cohere2", {"logit_scale": 0.25}),
        ("granite", {"logits_scaling": 8.0}),
        ("gpt_oss", {"num_local_experts": 2, "num_experts_per_tok": 1}),
    ],
)
def test_logits_of_a_head_are_scaled_and_capped_as_the_targets_are(model_type, options):
    shape = dict(num_hidden_layers=2, hidden_size=32, num_attention_heads=2, num_key_value_heads=1, head_dim=16)
    config = AutoConfig.for_model(
        model_type, **shape, intermediate_size=32, vocab_size=50, pad_token_id=0, initializer_range=0.3, **options
    )
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.randint(0, 50, (1, 12))
    view = view_target(target, head_config_for(config, num_hidden_layers=1), ids)
    with torch.no_grad():
        expected = target(ids).logits
        torch.testing.assert_close(head_logits(target, view.hidden), expected)
        some = torch.tensor([3, 41, 7])
        torch.testing.assert_close(head_logits(target, view.hidden, some), expected[..., some])
