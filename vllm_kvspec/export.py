# SPDX-License-Identifier: Apache-2.0
"""A head in the format of other engines: ``vllm-kvspec export``.

``eagle3``: the speculators format, which vLLM serves with its own method ``eagle3``. Only heads with
``fusion: "eagle3"`` compute what such a checkpoint says; others are refused. What differs in the files:

- names: ``fuse_proj`` is ``fc``;
- a target layer is counted from 1, because 0 is the embedding; an engine hands the layers' states over in ascending
  order, each once, so the columns of ``fc`` are ordered, and added where a layer came twice;
- with a reduced draft vocabulary, the rows of the target's LM head go along.
"""

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from vllm_kvspec.config import (
    EAGLE3_SHAPE,
    KVSpecDraftConfig,
    check_fingerprint,
    find_target,
    listed,
    target_fingerprint,
)
from vllm_kvspec.models.draft_head import KVSpecDraftModel
from vllm_kvspec.models.target import logit_scale


def export(draft_model: str, output_dir: str, *, target_model: str | None = None) -> Path:
    """Write the head in directory ``draft_model`` as an EAGLE-3 checkpoint to ``output_dir``, new or empty; return it.

    ``target_model`` (directory or name) is the one that the head names when None. Raises ValueError, before anything is
    written, for heads and targets whose arithmetic the format cannot say.
    """
    head = KVSpecDraftModel.from_pretrained(draft_model, dtype="auto")
    _check_head(head.config)
    target_model = target_model or find_target(draft_model, head.config.target.get("name_or_path", ""))
    target_config = AutoConfig.from_pretrained(target_model).get_text_config()
    check_fingerprint(head.config, target_fingerprint(target_config, AutoTokenizer.from_pretrained(target_model)))
    output = Path(output_dir)
    if output.exists() and any(output.iterdir()):
        raise ValueError(f"output_dir must be new or empty, found files in {output}; name another.")
    tensors, config = _tensors(head, target_model), _config(head.config, target_config, target_model)
    output.mkdir(parents=True, exist_ok=True)
    save_file(tensors, output / "model.safetensors", metadata={"format": "pt"})
    (output / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    return output


def _check_head(config: KVSpecDraftConfig) -> None:
    if not config.is_eagle3:
        raise ValueError(
            f'An EAGLE-3 checkpoint must come from a head with context "hidden" and fusion "eagle3" '
            f"({listed(EAGLE3_SHAPE)}); {config.name_or_path} has context {config.context!r} and fusion "
            f"{config.fusion!r}, whose layers compute something else. Train one with examples/eagle3.yaml."
        )


def _config(config: KVSpecDraftConfig, target_config: Any, target_model: str) -> dict[str, Any]:
    """config.json in the speculators format."""
    layers = [i + 1 for i in sorted(set(config.aux_hidden_state_layer_ids))]
    shape = (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
        "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "max_position_embeddings", "vocab_size",
    )  # fmt: skip
    layer = {
        "model_type": "llama",
        **{key: getattr(config, key) for key in shape},
        "attention_bias": False,
        "mlp_bias": False,
    }
    # vLLM looks for these beside the layer's.
    layer |= {"num_aux_hidden_states": len(layers), "logit_scale": logit_scale(target_config)}
    written = config.to_dict()
    speculators = written["speculators_config"]
    proposal = speculators["proposal_methods"][0] | {"speculative_tokens": config.draft_block_size}
    verifier = speculators["verifier"] | {"name_or_path": target_model}
    return {
        "architectures": ["Eagle3Speculator"],
        "speculators_model_type": "eagle3",
        "speculators_version": written["speculators_version"],
        "speculators_config": speculators
        | {"algorithm": "eagle3", "proposal_methods": [proposal], "verifier": verifier},
        "transformer_layer_config": layer,
        "draft_vocab_size": config.draft_vocab_size,
        "eagle_aux_hidden_state_layer_ids": layers,
        "norm_before_residual": False,
        "norm_before_fc": False,
        "dtype": written["dtype"],
    }


def _tensors(head: KVSpecDraftModel, target_model: str) -> dict[str, torch.Tensor]:
    """The weights under the names that speculators gives them."""
    tensors = dict(head.state_dict())
    columns = tensors.pop("fuse_proj.weight").split(head.config.hidden_size, dim=1)
    by_layer: dict[int, torch.Tensor] = {}
    for layer, part in zip(head.config.aux_hidden_state_layer_ids, columns, strict=True):
        by_layer[layer] = by_layer[layer] + part if layer in by_layer else part
    tensors["fc.weight"] = torch.cat([by_layer[layer] for layer in sorted(by_layer)], dim=1)
    if head.draft_token_ids is not None:
        target = AutoModelForCausalLM.from_pretrained(target_model, dtype="auto")
        tensors["lm_head.weight"] = target.get_output_embeddings().weight.detach()[head.draft_token_ids]
    return {name: tensor.contiguous() for name, tensor in tensors.items()}
