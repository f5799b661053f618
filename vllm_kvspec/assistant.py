# SPDX-License-Identifier: Apache-2.0
"""Google's Gemma 4 assistants: published draft heads whose layers have queries alone and read their target's KV cache.

Their checkpoints do not say which target layers they read: the last one of a layer's type, sliding or full attention,
that has keys and values of its own.
"""

from typing import Any

from vllm_kvspec.rope import layer_heads, layer_types, owns_kv

MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
# Every level of a tree is a pass of the assistant. As many as one is asked for where nobody says otherwise.
DEFAULT_DEPTH = 6
# A head's config says its own; theirs do not. Measured on one small pair (docs/assistants.md).
SCALES = {"greedy_scale": 0.35, "coupled_scale": 0.5}


def is_assistant(model: str) -> bool:
    """Whether the directory or repository ``model`` is one, by its config.json."""
    from transformers import PreTrainedConfig

    config, _ = PreTrainedConfig.get_config_dict(model)
    return config.get("model_type") in MODEL_TYPES


def scales(assistant: Any) -> dict[str, float]:
    """What an assistant's scores are divided by when trees are ranked (`tree.RankingScales`): what its config says, or
    SCALES."""
    return {name: getattr(assistant, name, usual) for name, usual in SCALES.items()}


def source_layers(assistant: Any, target_config: Any) -> list[int]:
    """The target layer that each layer of an assistant reads.

    ``assistant`` is its Hugging Face config, ``target_config`` the target's text config. Raises ValueError where sizes
    do not fit.
    """
    own = assistant.get_text_config()
    wrong = [
        f"{what} {found} where the target has {wanted}"
        for what, found, wanted in (
            ("backbone_hidden_size", assistant.backbone_hidden_size, target_config.hidden_size),
            ("vocab_size", own.vocab_size, target_config.vocab_size),
        )
        if found != wanted
    ]
    last = {kind: i for i, kind in enumerate(layer_types(target_config)) if owns_kv(target_config, i)}
    layers = [last.get(kind) for kind in layer_types(own)]
    for layer, source in enumerate(layers):
        if source is None:
            wrong.append(f"a layer of {layer_types(own)[layer]}, of which the target has none")
            continue
        (_, head_dim), (kv_heads, wanted) = layer_heads(own, layer), layer_heads(target_config, source)
        if head_dim != wanted or own.num_attention_heads % kv_heads:
            wrong.append(
                f"{own.num_attention_heads} heads of {head_dim} in layer {layer}, which reads {kv_heads} KV heads of "
                f"{wanted}"
            )
    if wrong:
        raise ValueError(
            f"Assistant {assistant.name_or_path or '(unnamed)'} was trained for another target than "
            f"{getattr(target_config, 'name_or_path', '') or '(unnamed)'}: it has {'; '.join(wrong)}. Use the "
            "assistant of this target."
        )
    return layers
