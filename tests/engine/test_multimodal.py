# SPDX-License-Identifier: Apache-2.0
"""A target that hears. Audio, and embeddings of audio that come ready (``--enable-mm-embeds``), are prompt: the text
after them is that of plain decoding. Audio, because vLLM's models of images import torchvision."""

from pathlib import Path

import pytest
import torch
from engine_runner import PLAIN_ENGINE, TARGET, generate, spec_counters
from safetensors.torch import load_file, save_file
from transformers import (
    AutoTokenizer,
    Qwen2AudioConfig,
    Qwen2AudioForConditionalGeneration,
    Qwen2AudioProcessor,
    WhisperFeatureExtractor,
)

from vllm_kvspec.models.create import write_untrained_head

HIDDEN, MEL_BINS = 96, 16
AUDIO = "<|AUDIO|>"
FLAGS = {"enable_mm_embeds": True, "skip_mm_profiling": True}


def write_target(directory: Path) -> str:
    """Random weights, the bundled target's tokenizer, and the 30 seconds of audio that every model of this kind has."""
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    tokenizer.add_special_tokens({"additional_special_tokens": ["<|audio_bos|>", AUDIO, "<|audio_eos|>"]})
    text = dict(
        model_type="qwen2", vocab_size=len(tokenizer), hidden_size=HIDDEN, intermediate_size=160, num_hidden_layers=4,
        num_attention_heads=3, num_key_value_heads=3, max_position_embeddings=512, initializer_range=0.1,
    )  # fmt: skip
    audio = dict(
        num_mel_bins=MEL_BINS, encoder_layers=1, d_model=32, encoder_attention_heads=2, encoder_ffn_dim=32,
        max_source_positions=1500,
    )  # fmt: skip
    index = tokenizer.convert_tokens_to_ids(AUDIO)
    torch.manual_seed(0)
    config = Qwen2AudioConfig(text_config=text, audio_config=audio, audio_token_index=index, initializer_range=0.1)
    Qwen2AudioForConditionalGeneration(config).save_pretrained(directory)
    # transformers writes one "model" more than the published checkpoints have.
    tensors = load_file(directory / "model.safetensors")
    tensors = {name.replace("model.model.", "model."): tensor for name, tensor in tensors.items()}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    Qwen2AudioProcessor(WhisperFeatureExtractor(feature_size=MEL_BINS), tokenizer).save_pretrained(directory)
    return str(directory)


def heard(target: str) -> list[dict]:
    """Two embeddings after the same words, a second of noise, and words alone."""
    tokenizer = AutoTokenizer.from_pretrained(target)
    words, ear = tokenizer("def f(x):")["input_ids"], tokenizer.convert_tokens_to_ids(AUDIO)
    generator = torch.Generator().manual_seed(0)
    embeddings = torch.randn(6, HIDDEN, generator=generator)
    noise = torch.randn(16000, generator=generator)
    sounds = (embeddings, -embeddings, noise, None)
    wanted = ({"temperature": 0.0}, {"temperature": 1.0, "seed": 5}, {"temperature": 0.0, "repetition_penalty": 1.2})
    common = {"max_tokens": 24, "ignore_eos": True}
    return [
        {"prompt": words, "params": common | params}
        if sound is None
        else {"prompt": [*words, ear, *words], "params": common | params, "audio": sound.tolist()}
        for params in wanted
        for sound in sounds
    ]


@pytest.mark.once
def test_audio_and_its_embeddings(make_engine, script, same, tmp_path):
    target = write_target(tmp_path / "target")
    head = write_untrained_head(target, str(tmp_path / "head"), dtype=torch.float32, context="hybrid")
    batch = heard(target)
    expected = script({"engine": {"model": target, **FLAGS, **PLAIN_ENGINE}, "batches": [batch]})["outputs"]
    assert len({str(samples[0]["token_ids"]) for samples in expected[0]}) == len(batch)
    spec = {"method": "kvspec", "model": str(head), "num_speculative_tokens": 8, "budget": "fixed"}
    with make_engine(spec, model=target, **FLAGS) as llm:
        # The second time prompts and what was heard are cached.
        same(generate(llm, [batch, batch]), expected * 2)
        assert spec_counters(llm)["accepted_tokens"] > 0
