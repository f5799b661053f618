# SPDX-License-Identifier: Apache-2.0
"""Targets of other shapes, with random weights: another head_dim, GQA ratio, attention bias, untied embeddings, and a
sliding window shorter than the text. An untrained head fits any of them; the oracle drafter walks long paths."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from engine_runner import PLAIN_ENGINE, TARGET, generate, spec_counters
from requests_mix import request
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_kvspec.models.create import write_untrained_head

COMMON = {
    "vocab_size": 4096,
    "hidden_size": 96,
    "intermediate_size": 160,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "initializer_range": 0.1,
}
TARGETS = {
    "llama": {"num_attention_heads": 6, "num_key_value_heads": 1, "head_dim": 32},
    "qwen2": {"num_attention_heads": 3, "num_key_value_heads": 3},
    "mistral": {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 64, "sliding_window": 20},
    # Two KV cache groups, whose layers share memory and not blocks.
    "llama-interleaved": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": 20,
        "layer_types": ["sliding_attention", "full_attention"] * 2,
    },
}


def write_target(name: str, directory: Path) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split("-")[0], **COMMON, **TARGETS[name])
    AutoModelForCausalLM.from_config(config).save_pretrained(directory)
    for path in Path(TARGET).glob("tokenizer*"):
        shutil.copy(path, directory)
    return directory


@pytest.mark.parametrize("name", TARGETS)
def test_identity(name, tmp_path, make_engine, script, same):
    target = str(write_target(name, tmp_path / "target"))
    # The bundled head is a hybrid one; here the other context is served as well.
    context = "kv" if name.startswith("llama") else "hybrid"
    head = str(write_untrained_head(target, str(tmp_path / "head"), dtype=torch.float32, context=context))
    batch = [request(n, 131 * n, temperature=t, seed=n) for n, t in ((3, 0.0), (18, 1.0), (45, 0.0), (70, 1.0))]
    expected = script({"engine": {"model": target, **PLAIN_ENGINE}, "batches": [batch]})["outputs"]
    sequences = [one["prompt"] + samples[0]["token_ids"] for one, samples in zip(batch, expected[0], strict=True)]
    (tmp_path / "sequences.json").write_text(json.dumps(sequences))
    spec = {"method": "kvspec", "model": head, "num_speculative_tokens": 12}
    oracle = {"drafter": "oracle", "oracle_file": str(tmp_path / "sequences.json")}
    with make_engine({**spec, **oracle}, model=target) as llm:
        same(generate(llm, [batch]), expected, "oracle")
        assert spec_counters(llm)["accepted_tokens"] > 0
    with make_engine(spec, model=target) as llm:
        same(generate(llm, [batch]), expected, "head")
