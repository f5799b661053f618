# SPDX-License-Identifier: Apache-2.0
"""A toy target as a directory, rows for it, and the train command with toy settings."""

import json
import random
import shutil

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from vllm_kvspec.cli import main

WORDS = ["<eos>", "<pad>", *"abcdefghijklmn"]


@pytest.fixture(scope="session")
def target_dir(tmp_path_factory):
    """A random Qwen3 of three layers with a word-level tokenizer."""
    path = tmp_path_factory.mktemp("target")
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=len(WORDS), tie_word_embeddings=True, max_position_embeddings=128, eos_token_id=0,
        pad_token_id=1, initializer_range=0.3,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(path)
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>").save_pretrained(path)
    return path


@pytest.fixture(scope="session")
def rows_file(tmp_path_factory):
    """18 rows of 12 to 24 random tokens, the first four of each not to be learned from."""
    path, rng = tmp_path_factory.mktemp("rows") / "rows.jsonl", random.Random(0)
    rows = []
    for i in range(18):
        length = rng.randint(12, 24)
        # Small ids are more frequent, so that a reduced vocabulary has a choice to make.
        ids = [min(rng.randrange(2, 16), rng.randrange(2, 16)) for _ in range(length)]
        rows.append({"input_ids": ids, "loss_mask": [0] * 4 + [1] * (length - 4), "temperature": float(i % 2)})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="session")
def toy_flags(target_dir, rows_file):
    """Flags of a run of six steps, a second or so on one CPU thread; 18 rows in batches of 4 are five steps."""
    return (
        f"--target_model {target_dir} --data_path {rows_file} --num_layers 1 --draft_block_size 4 --transition_rank 4 "
        "--anchors_per_sequence 4 --max_steps 6 --per_device_train_batch_size 4 --learning_rate 1e-2 "
        "--logging_steps 1 --save_steps 2 --save_total_limit 9 --use_cpu --disable_tqdm true"
    )


@pytest.fixture(scope="session")
def run_train(toy_flags):
    """``run_train(output, flags)``: the train command with toy settings; later flags win. Returns training.json."""

    def run(output, flags=""):
        main(["train", *f"{toy_flags} --output_dir {output} {flags}".split()])
        return json.loads((output / "training.json").read_text())

    return run


@pytest.fixture(scope="session")
def _finished_head(run_train, tmp_path_factory):
    path = tmp_path_factory.mktemp("finished") / "head"
    run_train(path)
    return path


@pytest.fixture
def finished_head(_finished_head, tmp_path):
    """A copy of a head that ``run_train`` made with no further flags, its checkpoints beside it."""
    for suffix in ("", ".checkpoints"):
        shutil.copytree(f"{_finished_head}{suffix}", tmp_path / f"head{suffix}")
    return tmp_path / "head"
