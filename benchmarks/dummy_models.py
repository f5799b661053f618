# SPDX-License-Identifier: Apache-2.0
"""A target and heads of it without weights: config files that vLLM's ``load_format="dummy"`` fills, no tokenizer.

What a step costs depends on shapes only, so a served geometry can be timed where its weights are not. The worker draws
the weights anew (``engine_worker.randomise``): vLLM's own dummy values make every logit nearly equal.
"""

import json
from pathlib import Path

from safetensors.torch import save_file
from transformers import AutoConfig

from vllm_kvspec.models.draft_head import head_config_for

# Shapes as their public configurations give them.
TARGETS = {
    "qwen3-8b": {
        "hidden_size": 4096,
        "intermediate_size": 12288,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    },
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rope_parameters": {"rope_type": "default", "rope_theta": 100000.0},
        "tie_word_embeddings": True,
    },
    "tiny": {
        "hidden_size": 64,
        "intermediate_size": 128,
        # The fewest for which EAGLE-3's three taps and DFlash's five are different layers.
        "num_hidden_layers": 7,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 32,
        "vocab_size": 512,
        "max_position_embeddings": 1024,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
}
# Scores so sharp that an "auto" tree of an untrained head is deep, as a trained head's is.
GREEDY_SCALE = 1e-3


def write_models(
    directory: Path, target: str, dtype: str, depth: int, head_layers: int, draft_vocab: int | None = None
) -> dict[str, str]:
    """Write the target and one head per method that drafts ``depth`` positions; return their directories by name.

    ``draft_vocab``: tokens that kvspec's head scores, None for all.
    """
    shape = {"model_type": "qwen3", "tie_word_embeddings": False} | TARGETS[target]
    config = AutoConfig.for_model(**shape, dtype=dtype)
    config.architectures = [f"{shape['model_type'].capitalize()}ForCausalLM"]
    config.save_pretrained(directory / "target")
    head = head_config_for(
        config,
        draft_block_size=depth,
        num_hidden_layers=min(head_layers, shape["num_hidden_layers"]),
        greedy_scale=GREEDY_SCALE,
        draft_vocab_size=draft_vocab,
        dtype=dtype,
    )
    head.save_pretrained(directory / "kvspec")
    # A head without a weight file is refused as half a copy; the dummy loader reads none.
    save_file({}, directory / "kvspec" / "model.safetensors")
    layers = shape["num_hidden_layers"]
    _write_config(
        directory / "eagle3",
        {
            **shape,
            "architectures": ["LlamaForCausalLMEagle3"],
            "model_type": "llama",
            "num_hidden_layers": 1,
            "draft_vocab_size": min(32000, shape["vocab_size"]),
        },
        dtype,
    )
    _write_config(
        directory / "dflash",
        {
            **shape,
            "architectures": ["DFlashDraftModel"],
            "model_type": "qwen3",
            "num_hidden_layers": min(5, layers),
            "block_size": depth + 1,
            "dflash_config": {
                "mask_token_id": shape["vocab_size"] - 1,
                "target_layer_ids": sorted({i * (layers - 1) // 4 for i in range(5)}),
            },
        },
        dtype,
    )
    return {path.name: str(path) for path in directory.iterdir()}


def _write_config(directory: Path, config: dict, dtype: str) -> None:
    directory.mkdir()
    common = {"rms_norm_eps": 1e-6, "hidden_act": "silu", "tie_word_embeddings": False, "dtype": dtype}
    (directory / "config.json").write_text(json.dumps({**common, **config}, indent=1))
