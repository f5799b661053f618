# SPDX-License-Identifier: Apache-2.0
"""What a batch teaches: the anchors, the rows, their labels, and which parameters learn from them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import Qwen3ForCausalLM

from vllm_kvspec.models.draft_head import KVSpecDraftModel, head_config_for
from vllm_kvspec.models.drafting import draft_logits
from vllm_kvspec.models.target import view_target
from vllm_kvspec.train.data import collate
from vllm_kvspec.train.trainer import LossSettings, head_loss, init_from_target, sample_anchors, supervised_rows

BLOCK = 3
PARADIGMS = {
    "kv block": {"context": "kv"},
    "kv ttt": {"context": "kv", "drafting": "autoregressive"},
    "hybrid block": {"context": "hybrid"},
    "hybrid ttt": {"context": "hybrid", "drafting": "autoregressive"},
    "hidden block": {"context": "hidden"},
    "hidden ttt": {"context": "hidden", "drafting": "autoregressive"},
    "concat ttt": {"context": "kv", "fusion": "concat", "drafting": "autoregressive"},
    "projection block": {"context": "kv", "fusion": "projection"},
    "projection ttt": {"context": "kv", "fusion": "projection_rope", "drafting": "autoregressive"},
    "gated block": {"context": "hybrid", "fusion": "gated"},
    "gated ttt": {"context": "hybrid", "fusion": "gated", "drafting": "autoregressive"},
    "eagle3": {"context": "hidden", "fusion": "eagle3", "drafting": "autoregressive", "transition_rank": 0},
}


@pytest.fixture(scope="module")
def target(target_dir):
    return Qwen3ForCausalLM.from_pretrained(target_dir).eval().requires_grad_(False)


def make_head(target, **fields):
    torch.manual_seed(1)
    fields = {"num_hidden_layers": 1, "draft_block_size": BLOCK, "transition_rank": 4, **fields}
    head = KVSpecDraftModel(head_config_for(target.config, **fields))
    if head.config.draft_vocab_size < head.config.vocab_size:
        head.set_draft_vocabulary(torch.tensor([14, 2, 3, 5, 7, 9]))
    return head


def make_batch():
    """Three rows: two stretches with a gap; the text's end in the mask; short and sharpened."""
    generator = torch.Generator().manual_seed(2)
    masks = [[0] * 3 + [1] * 6 + [0] * 2 + [1] * 5 + [0] * 2, [0] * 2 + [1] * 9, [0] * 4 + [1] * 4]
    rows = [
        {
            "input_ids": torch.randint(2, 16, (len(mask),), generator=generator).tolist(),
            "loss_mask": mask,
            "temperature": temperature,
        }
        for mask, temperature in zip(masks, (1.0, 0.0, 2.0), strict=True)
    ]
    return collate(rows)


@st.composite
def masks(draw):
    """Loss masks [B, S] with at least one token in every row, and the rows' lengths."""
    rows = draw(st.lists(st.lists(st.booleans(), min_size=1, max_size=12).filter(any), min_size=1, max_size=4))
    width = max(map(len, rows)) + draw(st.integers(0, 2))
    mask = torch.tensor([row + [False] * (width - len(row)) for row in rows])
    return mask, torch.tensor([len(row) for row in rows])


@settings(max_examples=200, deadline=None)
@given(masks(), st.integers(1, 9), st.integers(1, 6))
def test_nothing_outside_the_loss_mask_is_learned_from(mask_and_lengths, count, block):
    mask, lengths = mask_and_lengths
    base = sample_anchors(mask, count)
    assert base.shape == (len(mask), count) and mask.gather(1, base).all()
    positions, valid = supervised_rows(base, block, mask, lengths)
    for b, row in enumerate(mask.tolist()):
        text = row[: lengths[b]]
        for a in range(count):
            for d in range(block):
                position = base[b, a].item() + d
                inputs = text[base[b, a] : position + 1]
                predicted = text[position + 1 : position + 2]
                learned = len(inputs) == d + 1 and all(inputs) and all(predicted)
                assert valid[b, a, d] == learned
                assert positions[b, a, d] == position or not learned


def test_anchors_spread_over_the_whole_mask():
    mask = torch.zeros(1, 40, dtype=torch.bool)
    mask[0, 3:10] = mask[0, 20:29] = True
    # One in each of 16 equal parts of 16 tokens: every token.
    assert sample_anchors(mask, 16)[0].tolist() == mask[0].nonzero()[:, 0].tolist()


@pytest.mark.parametrize("loss_fn", ["kl_div", "ce"])
@pytest.mark.parametrize("draft_vocab_size", [None, 6])
@pytest.mark.parametrize("name", ["kv block", "hybrid block", "hybrid ttt", "hidden ttt"])
def test_row_d_learns_what_comes_after_position_base_plus_d(target, name, draft_vocab_size, loss_fn):
    """The batched loss against one made row by row, with the target's own forward on each prefix."""
    head = make_head(target, **PARADIGMS[name], draft_vocab_size=draft_vocab_size)
    torch.nn.init.normal_(head.transition_out.weight)
    torch.nn.init.normal_(head.layers[0].self_attn.o_proj.weight, std=0.3)
    batch, wanted = make_batch(), LossSettings(4, 2.0, 0.5, loss_fn)
    torch.manual_seed(3)
    with torch.no_grad():
        loss = head_loss(head, head.config, target, batch, wanted)
    torch.manual_seed(3)
    bases = sample_anchors(batch["loss_mask"], wanted.anchors_per_sequence)
    scored = range(16) if head.draft_token_ids is None else head.draft_token_ids.tolist()
    total = weights = 0.0
    for b, length in enumerate(batch["lengths"].tolist()):
        ids, mask = batch["input_ids"][b, :length], batch["loss_mask"][b, :length].tolist()
        temperature = max(batch["temperatures"][b].item(), 0.5)
        view = view_target(target, head.config, ids[None])
        for base in bases[b].tolist():
            for d in range(BLOCK):
                # Every token of the row's input, and the one it predicts, is the target's own.
                end = base + d + 1
                if end > length or not all(mask[base : end + 1]):
                    continue
                # The path after the row's own token is irrelevant to it, so it ends there.
                path = torch.nn.functional.pad(ids[base:end], (0, BLOCK - d - 1))
                logits = draft_logits(head, target, view, ids[None], torch.tensor([base]), path[None])[0, d]
                log_q = logits[list(scored)].log_softmax(0)
                if loss_fn == "ce":
                    if end == length or ids[end] not in scored:
                        continue
                    row = -log_q[list(scored).index(ids[end])]
                else:
                    log_p = (target(ids[None, :end]).logits[0, -1] / temperature)[list(scored)].log_softmax(0)
                    row = (log_p.exp() * (log_p - log_q)).sum()
                weight = torch.exp(torch.tensor(-d / 2.0))
                total, weights = total + weight * row.detach(), weights + weight
    torch.testing.assert_close(loss, total / weights, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize(
    "extra", [{}, {"transition_rank": 0}, {"draft_vocab_size": 6}], ids=["", "no bias", "6 tokens"]
)
@pytest.mark.parametrize("name", PARADIGMS)
def test_every_parameter_of_the_head_learns_and_none_of_the_target(target, name, extra):
    layers = 1 if "gated" in name or name == "eagle3" else 2
    head = make_head(target, **({"num_hidden_layers": layers} | PARADIGMS[name] | extra))
    batch, wanted = make_batch(), LossSettings(8, 4.0, 1.0)
    # Projections that start at zero hide what lies before them from the first step.
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2)
    for _ in range(2):
        optimizer.zero_grad()
        head_loss(head, head.config, target, batch, wanted).backward()
        optimizer.step()
    still = [key for key, parameter in head.named_parameters() if parameter.grad is None or not parameter.grad.any()]
    assert not still
    if head.config.drafting == "block":
        assert head.block_embedding.grad.any(dim=1).all(), "a row of the block learns nothing"
    assert all(parameter.grad is None for parameter in target.parameters())


def test_a_target_is_frozen_by_the_trainer(run_train, tmp_path, monkeypatch):
    """Through the command: the target's parameters are the same after training, and have no gradients."""
    from vllm_kvspec.train import run

    loaded = []
    load_target = run.load_target
    monkeypatch.setattr(run, "load_target", lambda *a, **k: loaded.append(load_target(*a, **k)) or loaded[0])
    run_train(tmp_path / "head", "--max_steps 2")
    target = loaded[0][0]
    fresh = Qwen3ForCausalLM.from_pretrained(target.name_or_path)
    for (name, parameter), same in zip(target.named_parameters(), fresh.parameters(), strict=True):
        assert not parameter.requires_grad and parameter.grad is None and parameter.equal(same), name


def test_a_head_starts_at_the_scale_of_its_target(target_dir):
    target = Qwen3ForCausalLM.from_pretrained(target_dir)
    torch.nn.init.uniform_(target.model.norm.weight, 1.0, 4.0)
    torch.nn.init.normal_(target.model.embed_tokens.weight, std=0.25)
    head, untouched = make_head(target), make_head(target)
    init_from_target(head, target)
    # The norm: the target's, smaller by one factor, so that random outputs have logits of about 1.
    factors = head.norm.weight / target.model.norm.weight
    torch.testing.assert_close(factors, factors[:1].expand_as(factors))
    random = torch.randn(4096, head.config.hidden_size, generator=torch.Generator().manual_seed(0))
    logits = target.lm_head(random * head.norm.weight)
    assert logits.square().mean().sqrt().item() == pytest.approx(1, rel=0.05)
    # The projection: an embedding counts as much as a hidden state, which is as large as the target's norm.
    size, weight = head.config.hidden_size, head.context_proj.weight
    parts = target.model.embed_tokens.weight, random * target.model.norm.weight
    heard = [
        (x @ w.T).square().mean().sqrt().item()
        for x, w in zip(parts, (weight[:, :size], weight[:, size:]), strict=True)
    ]
    assert heard[0] == pytest.approx(heard[1], rel=0.1)
    assert weight[:, size:].equal(untouched.context_proj.weight[:, size:])
    assert not head.layers[0].self_attn.o_proj.weight.any()


def test_a_target_of_small_scale_is_taken_as_it_is(target_dir):
    target = Qwen3ForCausalLM.from_pretrained(target_dir)
    torch.nn.init.constant_(target.model.norm.weight, 0.01)
    head, untouched = make_head(target), make_head(target)
    init_from_target(head, target)
    torch.testing.assert_close(head.norm.weight, target.model.norm.weight)
    assert head.context_proj.weight.equal(untouched.context_proj.weight)
