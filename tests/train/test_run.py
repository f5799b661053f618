# SPDX-License-Identifier: Apache-2.0
"""The train command around the training: arguments, what it refuses, what it writes."""

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig

from vllm_kvspec.cli import main
from vllm_kvspec.models.draft_head import KVSpecDraftModel, head_config_for
from vllm_kvspec.train.arguments import RunArguments
from vllm_kvspec.train.data import load_rows
from vllm_kvspec.train.run import count_parameters, fit_intermediate_size
from vllm_kvspec.train.trainer import KVSpecTrainer
from vllm_kvspec.train.vocabulary import frequent_tokens, token_counts


def test_a_run_writes_the_head_and_how_it_was_made(finished_head, rows_file):
    record = json.loads((finished_head / "training.json").read_text())
    head = KVSpecDraftModel.from_pretrained(finished_head)
    assert head.dtype == torch.bfloat16
    assert head.layers[0].self_attn.o_proj.weight.any() and head.transition_hidden.weight.any()
    assert record["parameters"] == head.num_parameters() and record["steps"] == 6 and record["rows"] == 18
    masks = [json.loads(line)["loss_mask"] for line in rows_file.read_text().splitlines()]
    assert record["supervised_tokens"] == sum(map(sum, masks))
    assert record["memory"]["peak_rss_bytes"] > record["memory"]["target_bytes"] + record["memory"]["head_bytes"]
    assert record["settings"]["learning_rate"] == 1e-2 and record["versions"]["torch"] == torch.__version__
    card = (finished_head / "README.md").read_text()
    assert record["command"] in card and f"{head.num_parameters():,} parameters" in card and "vllm serve" in card


def test_a_finished_head_is_not_overwritten(finished_head, run_train):
    before = {path.name: path.stat().st_mtime_ns for path in finished_head.iterdir()}
    run_train(finished_head)
    with pytest.raises(ValueError, match=r"made with transition_rank 4 \(now 5\); name another"):
        run_train(finished_head, "--transition_rank 5")
    assert {path.name: path.stat().st_mtime_ns for path in finished_head.iterdir()} == before
    checkpoints = finished_head.with_name("head.checkpoints")
    (checkpoints / "notes.txt").write_text("mine")
    assert run_train(finished_head, "--transition_rank 5 --max_steps 1 --overwrite_output_dir")["steps"] == 1
    assert sorted(path.name for path in finished_head.parent.iterdir()) == ["head", "head.checkpoints"]
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-1", "notes.txt", "settings.json"]


def test_another_directory_is_never_overwritten(run_train, tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="must be new, empty or a head"):
        run_train(tmp_path, "--overwrite_output_dir")
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_a_dry_run_writes_an_untrained_head_that_training_replaces(run_train, tmp_path):
    output = tmp_path / "head"
    record = run_train(output, "--dry_run")
    assert record["dry_run"] and record["steps"] == 0
    assert not KVSpecDraftModel.from_pretrained(output).transition_hidden.weight.any()
    assert [path.name for path in tmp_path.iterdir()] == ["head"]
    assert "dry_run" not in run_train(output, "--max_steps 1")


@pytest.mark.parametrize(
    ("flags", "sentence"),
    [
        ("--num_layers 0", "num_layers must be at least 1"),
        ("--intermediate_size 8 --num_parameters 9000", "must not be given together"),
        ("--num_parameters 10", "num_parameters must be at least"),
        ("--loss_fn mse", "loss_fn must name losses"),
        ("--context nothing", "context must be one of"),
        ("--context kv --fusion gated", "fusion with context 'kv'"),
        ("--draft_vocab_size 17", "draft_vocab_size must be 1 to 16"),
        ("--target_kv_layer_ids 3", "must be layers of the target"),
        ("--depth_decay 0", "depth_decay must be positive"),
        ("--draft_block_size 21", "no 21 consecutive tokens"),
        ("--resume_from_checkpoint somewhere", "goes on from its newest complete checkpoint by itself"),
    ],
)
def test_what_cannot_be_is_refused_before_anything_is_written(run_train, tmp_path, flags, sentence):
    with pytest.raises(ValueError, match=sentence):
        run_train(tmp_path / "head", flags)
    assert not any(tmp_path.iterdir())


def test_several_gpus_in_one_process_are_refused(run_train, tmp_path, monkeypatch):
    monkeypatch.setattr(RunArguments, "n_gpu", 2)
    with pytest.raises(ValueError, match="torchrun --standalone --nproc_per_node 2"):
        run_train(tmp_path / "head")


def test_rows_of_a_larger_vocabulary_are_refused(run_train, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text(json.dumps({"input_ids": [3, 4, 16, 5, 6], "loss_mask": [1] * 5}) + "\n")
    with pytest.raises(ValueError, match=r"tokens of the target \(0..15\), found 16"):
        run_train(tmp_path / "head", f"--data_path {rows}")


@pytest.mark.parametrize("context", ["kv", "hybrid", "hidden"])
def test_num_parameters_chooses_the_closest_width(target_dir, context):
    target_config = AutoConfig.from_pretrained(target_dir)
    fields = {"context": context, "num_hidden_layers": 2, "transition_rank": 3}
    for wanted in (20000, 20050, 31234):
        width = fit_intermediate_size(target_config, fields, wanted)
        sizes = {
            m: KVSpecDraftModel(head_config_for(target_config, **fields, intermediate_size=m)).num_parameters()
            for m in range(width - 2, width + 3)
        }
        assert abs(sizes[width] - wanted) == min(abs(size - wanted) for size in sizes.values())
    assert count_parameters(head_config_for(target_config, **fields, intermediate_size=width)) == sizes[width]


def test_a_recipe_gives_the_flags_and_the_command_line_wins(toy_flags, tmp_path):
    words = toy_flags.split()
    assert words[-2:] == ["--disable_tqdm", "true"] and words[-3] == "--use_cpu"
    recipe = dict(zip(words[:-3:2], words[1:-3:2], strict=True)) | {"--use_cpu": True, "--disable_tqdm": True}
    recipe = {key[2:]: value for key, value in recipe.items()} | {
        "output_dir": str(tmp_path / "head"),
        "target_kv_layer_ids": [0, 2],
        "num_layers": 2,
        "lr_scheduler_type": "cosine_with_min_lr",
        "lr_scheduler_kwargs": {"min_lr_rate": 0.1},
        "draft_vocab_size": None,
    }
    (tmp_path / "recipe.json").write_text(json.dumps(recipe))
    main(["train", str(tmp_path / "recipe.json"), "--max_steps", "2"])
    record = json.loads((tmp_path / "head" / "training.json").read_text())
    assert record["steps"] == 2 and record["settings"]["lr_scheduler_kwargs"] == {"min_lr_rate": 0.1}
    assert json.loads((tmp_path / "head" / "config.json").read_text())["target_kv_layer_ids"] == [0, 2]
    with pytest.raises(ValueError, match="found nothing at"):
        main(["train", "absent.yaml"])


def test_a_reduced_vocabulary_holds_the_most_frequent_learned_tokens(run_train, rows_file, tmp_path):
    record = run_train(tmp_path / "head", "--draft_vocab_size 5 --max_steps 2")
    learned = [
        token
        for row in map(json.loads, rows_file.read_text().splitlines())
        for token, mask in zip(row["input_ids"], row["loss_mask"], strict=True)
        if mask
    ]
    by_count = sorted(set(learned), key=lambda token: (-learned.count(token), token))
    head = KVSpecDraftModel.from_pretrained(tmp_path / "head")
    assert head.draft_token_ids.tolist() == sorted(by_count[:5])
    assert head.t2d.nonzero()[:, 0].tolist() == sorted(by_count[:5])
    assert record["draft_vocab_coverage"] == pytest.approx(
        sum(token in by_count[:5] for token in learned) / len(learned)
    )


def test_ties_in_frequency_go_to_the_lower_token():
    assert frequent_tokens(torch.tensor([0, 3, 1, 3, 1, 1]), 3).tolist() == [1, 2, 3]


def test_a_vocabulary_larger_than_the_rows_is_filled_up_with_a_warning(caplog):
    counts = torch.tensor([0, 3, 1, 3, 1, 1])
    assert frequent_tokens(counts, 5).tolist() == [1, 2, 3, 4, 5] and not caplog.records
    assert frequent_tokens(counts, 6).tolist() == [0, 1, 2, 3, 4, 5]
    assert "draft_vocab_size 6 is more than the 5 different tokens of the rows; the other 1 are" in caplog.text


def test_token_counts_over_several_batches(rows_file, monkeypatch):
    rows = load_rows([str(rows_file)], 4)
    at_once = token_counts(rows, 16)
    monkeypatch.setattr("vllm_kvspec.train.vocabulary.ROWS_PER_BATCH", 7)
    assert token_counts(rows, 16).equal(at_once)


def test_training_goes_on_from_another_heads_weights(finished_head, run_train, tmp_path):
    record = run_train(tmp_path / "next", f"--from_pretrained {finished_head} --learning_rate 0 --max_steps 1")
    assert record["started_from"]["steps"] == 6
    before, after = (load_file(x / "model.safetensors") for x in (finished_head, tmp_path / "next"))
    torch.testing.assert_close(after, before, atol=0, rtol=0)
    with pytest.raises(ValueError, match="--from_pretrained, which has num_hidden_layers 1"):
        run_train(tmp_path / "other", f"--from_pretrained {finished_head} --num_layers 2")


def test_a_head_is_not_trained_on_for_another_target(finished_head, run_train, tmp_path):
    config = json.loads((finished_head / "config.json").read_text())
    config["target"]["num_hidden_layers"] += 1
    (finished_head / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="use a head trained for this target"):
        run_train(tmp_path / "next", f"--from_pretrained {finished_head}")


def test_a_crash_while_writing_leaves_the_old_head(finished_head, run_train, monkeypatch):
    before = (finished_head / "model.safetensors").read_bytes()
    monkeypatch.setattr("vllm_kvspec.train.record._card", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run_train(finished_head, "--overwrite_output_dir --max_steps 1")
    assert (finished_head / "model.safetensors").read_bytes() == before
    monkeypatch.undo()
    run_train(finished_head, "--overwrite_output_dir --max_steps 1")
    assert (finished_head / "model.safetensors").read_bytes() != before
    assert sorted(path.name for path in finished_head.parent.iterdir()) == ["head", "head.checkpoints"]


def test_a_loss_that_is_not_finite_ends_the_run(run_train, tmp_path, monkeypatch):
    compute_loss = KVSpecTrainer.compute_loss
    monkeypatch.setattr(KVSpecTrainer, "compute_loss", lambda *a, **k: compute_loss(*a, **k) * float("nan"))
    with pytest.raises(ValueError, match="must stay finite, found nan at step 1"):
        run_train(tmp_path / "head")
    assert not (tmp_path / "head").exists()


def test_bf16_with_accumulation_learns(run_train, tmp_path):
    record = run_train(tmp_path / "head", "--bf16 --gradient_accumulation_steps 2 --max_steps 16")
    losses = [entry["loss"] for entry in record["loss_history"]]
    assert sum(losses[-4:]) < 0.9 * sum(losses[:4])
