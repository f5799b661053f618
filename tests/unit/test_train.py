# SPDX-License-Identifier: Apache-2.0
"""Training: the anchors, the loss, the data files, and one run of the whole command on a toy target."""

import json

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, TrainingArguments

from vllm_kvspec.cli import main
from vllm_kvspec.models.draft_head import KVSpecDraftModel, head_config_for
from vllm_kvspec.models.target import anchor_inputs, view_target
from vllm_kvspec.train.data import collate, cut_prompts, load_rows
from vllm_kvspec.train.trainer import KVSpecTrainer, distillation_loss, init_from_target, sample_anchors

WORDS = ["<eos>", "<pad>", *"abcdefghij"]


@pytest.fixture(scope="module")
def target_dir(tmp_path_factory):
    """A toy target with a word-level tokenizer, as a directory."""
    path = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=len(WORDS), tie_word_embeddings=True, max_position_embeddings=128, eos_token_id=0,
        pad_token_id=1,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    fast.save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def text_file(tmp_path_factory):
    path = tmp_path_factory.mktemp("texts") / "texts.jsonl"
    chat = [{"role": "user", "content": "a b c"}, {"role": "assistant", "content": "d e f"}]
    rows = [{"text": "a b c d e\n" * 40, "messages": None}, {"text": None, "messages": chat}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_anchors_lie_in_the_targets_own_text():
    torch.manual_seed(0)
    lengths, prompts = torch.tensor([20, 50, 9]), torch.tensor([5, 10, 8])
    base = sample_anchors(lengths, prompts, 16)
    assert base.shape == (3, 16)
    assert (base >= prompts[:, None]).all() and (base < lengths[:, None]).all()
    # Stratified: 15 own positions, 16 anchors, so all but a few positions are hit.
    assert base[0].unique().numel() >= 10


def test_loss_is_the_weighted_cross_entropy():
    torch.manual_seed(0)
    student, teacher = torch.randn(2, 3, 4, 7), torch.randn(2, 3, 4, 7)
    valid = torch.rand(2, 3, 4) > 0.3
    total = weights = 0.0
    for index in valid.nonzero().tolist():
        weight = torch.exp(torch.tensor(-index[-1] / 2.0))
        row = -(teacher[tuple(index)].softmax(0) * student[tuple(index)].log_softmax(0)).sum()
        total, weights = total + weight * row, weights + weight
    torch.testing.assert_close(distillation_loss(student, teacher, valid, 2.0), total / weights)


def test_loss_is_least_at_the_teacher():
    teacher = torch.randn(1, 2, 3, 7)
    student = teacher.clone().requires_grad_()
    distillation_loss(student, teacher, torch.ones(1, 2, 3, dtype=torch.bool), 4.0).backward()
    assert student.grad.abs().max() < 1e-6


def test_collate_pads_on_the_right():
    rows = [{"input_ids": [5, 6, 7], "prompt_length": 1}, {"input_ids": [8], "prompt_length": 1}]
    batch = collate([row | {"temperature": i} for i, row in enumerate(rows)])
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["lengths"].tolist() == [3, 1]
    assert batch["temperatures"].tolist() == [0.0, 1.0]


def test_a_head_starts_with_its_targets_final_norm(target_dir):
    target = Qwen3ForCausalLM.from_pretrained(target_dir)
    torch.nn.init.uniform_(target.model.norm.weight)
    head = KVSpecDraftModel(head_config_for(target.config, num_hidden_layers=1, target_kv_layer_ids=[1]))
    init_from_target(head, target)
    torch.testing.assert_close(head.norm.weight, target.model.norm.weight)
    assert not head.layers[0].self_attn.o_proj.weight.any()


def test_prompts_are_cut_at_lines_and_before_the_last_answer(target_dir):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(target_dir)
    chat = [{"role": "user", "content": "a b"}, {"role": "assistant", "content": "c d"}]
    texts = cut_prompts([{"text": "a b c\nd e f\n" * 5}], tokenizer, 4, 3, seed=0)
    assert {tuple(tokenizer.convert_ids_to_tokens(ids)) for ids in texts} <= {("a", "b", "c"), ("d", "e", "f")}
    assert [tokenizer.decode(ids) for ids in cut_prompts([{"messages": chat}], tokenizer, 1, 8, seed=0)] == ["a b"]
    with pytest.raises(ValueError, match="give longer texts"):
        cut_prompts([{"text": "a b"}], tokenizer, 2, 5, seed=0)


def test_generate_train_and_reload(target_dir, text_file, tmp_path):
    rows, head_dir = tmp_path / "rows.jsonl", tmp_path / "head"
    main(
        f"generate --target_model {target_dir} --data_path {text_file} --output {rows} --num_prompts 8 "
        "--prompt_length 6 --max_new_tokens 24 --batch_size 4 --temperatures 0 1".split()
    )
    written = [json.loads(line) for line in rows.read_text().splitlines()]
    assert len(written) == 8 and {row["temperature"] for row in written} == {0.0, 1.0}
    assert all(len(row["input_ids"]) > row["prompt_length"] for row in written)
    assert len(load_rows([str(rows)], 4)) == sum(len(r["input_ids"]) - r["prompt_length"] >= 4 for r in written)

    main(
        f"train --target_model {target_dir} --data_path {rows} --output_dir {head_dir} --num_layers 1 "
        "--draft_block_size 4 --transition_rank 4 --max_steps 12 --per_device_train_batch_size 4 --learning_rate 5e-3 "
        "--logging_steps 3 --save_strategy no --report_to none --use_cpu --disable_tqdm true".split()
    )
    report = json.loads((head_dir / "training.json").read_text())
    losses = [entry["loss"] for entry in report["loss_history"]]
    assert losses[-1] < losses[0]
    head = KVSpecDraftModel.from_pretrained(head_dir)
    assert head.dtype == torch.bfloat16
    assert head.config.target["num_hidden_layers"] == 3
    assert head.layers[0].self_attn.o_proj.weight.any() and head.transition_out.weight.any()


def test_row_d_learns_what_the_target_says_after_position_base_plus_d(target_dir, tmp_path, monkeypatch):
    """The batched loss against one built anchor by anchor, with the target's own forward on each prefix."""
    torch.manual_seed(0)
    target = Qwen3ForCausalLM.from_pretrained(target_dir).eval()
    head = KVSpecDraftModel(head_config_for(target.config, num_hidden_layers=1, draft_block_size=3))
    torch.nn.init.normal_(head.transition_out.weight)
    rows = [
        {"input_ids": [2, 5, 7, 3, 9, 4, 6, 8], "prompt_length": 2, "temperature": 0.0},
        {"input_ids": [4, 4, 6, 10, 11], "prompt_length": 2, "temperature": 2.0},
    ]
    bases = torch.tensor([[2, 6], [3, 3]])
    monkeypatch.setattr("vllm_kvspec.train.trainer.sample_anchors", lambda *_: bases)
    trainer = KVSpecTrainer(
        model=head,
        args=TrainingArguments(str(tmp_path), use_cpu=True, report_to="none"),
        target=target,
        anchors_per_sequence=2,
        depth_decay=2.0,
        min_teacher_temperature=0.5,
    )
    total = weights = 0.0
    for row, row_bases in zip(rows, bases.tolist(), strict=True):
        ids = torch.tensor([row["input_ids"]])
        view = view_target(target, head.config, ids)
        for base in row_bases:
            anchor = torch.tensor([[base]])
            embeds, target_hidden = anchor_inputs(target, view, ids, anchor)
            hidden = head(embeds, anchor, view.context, target_hidden)
            for depth in range(min(3, ids.shape[1] - base)):
                with torch.no_grad():
                    teacher = target(ids[:, : base + depth + 1]).logits[0, -1] / max(row["temperature"], 0.5)
                student = target.lm_head(hidden[0, 0, depth]) + head.transition_bias(ids[0, base + depth])
                weight = torch.exp(torch.tensor(-depth / 2.0))
                total = total - weight * (teacher.softmax(0) * student.log_softmax(0)).sum()
                weights += weight
    with torch.no_grad():
        loss = trainer.compute_loss(head, collate(rows))
    torch.testing.assert_close(loss, (total / weights).detach(), atol=1e-5, rtol=1e-5)
