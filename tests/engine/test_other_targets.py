# SPDX-License-Identifier: Apache-2.0
"""Targets of other shapes, with random weights: another head_dim, GQA ratio, attention bias, untied embeddings, a
sliding window shorter than the text, soft-capped scores, attention sinks. An untrained head fits any of them; the
oracle drafter walks long paths."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_runner import PLAIN_ENGINE, TARGET, generate, model_runner, run_script, spec_counters
from requests_mix import request
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_kvspec.engine.draft.head import KVSpecAttention, cuda_kernel_of
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
    # Served to the last position of its rotary table, which cannot be made longer.
    "llama-yarn": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 10000.0,
            "factor": 4.0,
            "original_max_position_embeddings": 64,
        },
    },
    # Two sets of factors, of which the served length chooses one; no kernel of its own on CUDA.
    "phi3-longrope": {
        "num_attention_heads": 3,
        "num_key_value_heads": 1,
        "original_max_position_embeddings": 128,
        "pad_token_id": 0,
        "rope_parameters": {
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0] * 16,
            "long_factor": [1.0 + 0.25 * i for i in range(16)],
            "original_max_position_embeddings": 128,
        },
    },
    # A cap and sinks that decide: without either, another text.
    "gemma2": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": 20,
        "query_pre_attn_scalar": 16,
        "attn_logit_softcapping": 2.0,
        "tie_word_embeddings": True,
    },
    "gpt_oss": {
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
        "sliding_window": 20,
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "rope_parameters": {
            "rope_type": "yarn",
            "rope_theta": 150000.0,
            "factor": 4.0,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
            "truncate": False,
            "original_max_position_embeddings": 128,
        },
    },
}
# Another base, and scaling of one, in layers of another type; two KV cache groups.
PER_TYPE = {
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "sliding_window": 20,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "rope_parameters": {
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    },
}
TARGETS |= {
    "gemma3_text": PER_TYPE | {"head_dim": 32, "query_pre_attn_scalar": 24},
    "olmo3": PER_TYPE | {"num_attention_heads": 3, "num_key_value_heads": 1},
}
# Flags that leave a target's text alone, in one more engine.
FLAGS = {
    "qwen2": {"model_impl": "transformers"},
    # No longer than the window, which then is none.
    "mistral": {"disable_sliding_window": True, "max_model_len": 20},
    "llama-interleaved": {"disable_hybrid_kv_cache_manager": True},
    "olmo3": {"prefix_match_unit": 8},
}
# In keys and values of the null block. Finite, since a masked row may still be multiplied by a weight of zero.
POISON = 1e3


def write_target(name: str, directory: Path) -> Path:
    torch.manual_seed(0)
    config = AutoConfig.for_model(name.split("-")[0], **{**COMMON, **TARGETS[name]})
    model = AutoModelForCausalLM.from_config(config)
    for parameter_name, parameter in model.named_parameters():
        if parameter_name.endswith("sinks"):
            torch.nn.init.normal_(parameter, mean=2.0)
    if config.tie_word_embeddings:
        # With larger rows every token follows itself.
        model.get_input_embeddings().weight.data *= 0.2
    model.save_pretrained(directory)
    for path in Path(TARGET).glob("tokenizer*"):
        shutil.copy(path, directory)
    return directory


def poison_null_block(runner) -> None:
    """Block 0 is nobody's. Block tables name it where a sliding window has passed (from 0.33 on in every step, in 0.32
    after a prefix hit), and nothing may read it: neither verification, nor the compaction, nor the head."""
    for layers in runner.cache_classes:
        for cache in layers.kv_caches:
            cache[0] = POISON


@pytest.fixture
def checked_positions(monkeypatch):
    """Fails when the head's rows go beyond its rotary table: the kernels would read what lies behind it."""
    forward = KVSpecAttention.forward

    def checked(self, hidden, positions, *rest):
        tables = [table for name, table in self.rotary_emb.named_buffers() if name.endswith("cos_sin_cache")]
        assert int(positions.max()) < min(len(table) for table in tables)
        return forward(self, hidden, positions, *rest)

    monkeypatch.setattr(KVSpecAttention, "forward", checked)


# What a new vLLM does to an architecture shows in test_models.py as well.
ON_EVERY_VLLM = ("gemma3_text", "gpt_oss")
LENGTHS = ((3, 0.0), (18, 1.0), (45, 0.0), (70, 1.0), (240, 1.0))


@pytest.fixture(scope="module")
def batch() -> list[dict]:
    return [request(n, 131 * n % 5000, temperature=t, seed=n) for n, t in LENGTHS]


@pytest.fixture(scope="module")
def plain(selected, batch, tmp_path_factory) -> dict[str, tuple[str, list]]:
    """Directory and plain vLLM's answers of each target that the selected tests serve, all in one process."""
    root = tmp_path_factory.mktemp("targets")
    targets = {name: str(write_target(name, root / name)) for name in selected("name")}
    jobs = [{"engine": {"model": target, **PLAIN_ENGINE}, "batches": [batch]} for target in targets.values()]
    outputs = run_script({"jobs": jobs}, root)["outputs"]
    return dict(zip(targets, zip(targets.values(), outputs, strict=True), strict=True))


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=() if name in ON_EVERY_VLLM else pytest.mark.once) for name in TARGETS],
)
def test_identity(name, batch, plain, tmp_path, make_engine, same, checked_positions):
    target, expected = plain[name]
    # The bundled head is a hybrid one; here the other context is served as well.
    context = "kv" if name.startswith("llama") else "hybrid"
    head = str(write_untrained_head(target, str(tmp_path / "head"), dtype=torch.float32, context=context))
    sequences = [one["prompt"] + samples[0]["token_ids"] for one, samples in zip(batch, expected[0], strict=True)]
    (tmp_path / "sequences.json").write_text(json.dumps(sequences))
    oracle = {"drafter": "oracle", "oracle_file": str(tmp_path / "sequences.json")}
    spec = {"method": "kvspec", "model": head, "num_speculative_tokens": 12, "budget": "fixed"}
    with make_engine(spec | oracle, model=target) as llm:
        runner = model_runner(llm)
        poison_null_block(runner)
        same(generate(llm, [batch]), expected, "oracle")
        assert spec_counters(llm)["accepted_tokens"] > 0
        # From now on the head drafts, on the same engine.
        runner.speculator.test_drafter = None
        same(generate(llm, [batch]), expected, "head")
    if flags := FLAGS.get(name):
        # Twice: the second time the prompts are cached.
        with make_engine(spec, model=target, **flags) as llm:
            poison_null_block(model_runner(llm))
            for _ in range(2):
                check_what_fits(llm, batch, expected[0], flags.get("max_model_len", 256))


def check_what_fits(llm, batch: list[dict], expected: list, length: int) -> None:
    """Prompts shorter than ``length``, and their answers as far as it lets them."""
    fitting = [i for i, one in enumerate(batch) if len(one["prompt"]) < length]
    (found,) = generate(llm, [[batch[i] for i in fitting]])
    for i, samples in zip(fitting, found, strict=True):
        room = length - len(batch[i]["prompt"])
        assert samples[0]["token_ids"] == expected[i][0]["token_ids"][:room], i


def test_rotary_layers_without_a_kernel(monkeypatch):
    """On CUDA a layer's kernel where it has one, else its torch version."""
    from vllm.model_executor.layers.rotary_embedding import Phi3LongRoPEScaledRotaryEmbedding, RotaryEmbedding

    monkeypatch.setattr("vllm_kvspec.engine.draft.head.current_platform", SimpleNamespace(is_cuda=lambda: True))
    plain, long = (object.__new__(cls) for cls in (RotaryEmbedding, Phi3LongRoPEScaledRotaryEmbedding))
    for layer in (plain, long):
        torch.nn.Module.__init__(layer)
    assert cuda_kernel_of(plain) == plain.forward_cuda
    assert cuda_kernel_of(long) is long
