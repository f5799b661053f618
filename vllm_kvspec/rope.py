# SPDX-License-Identifier: Apache-2.0
"""Rotary positions, sliding windows and key heads of a target's layers, read from its Hugging Face text config.

A head layer reads the keys of one target layer as they lie in the cache, so its queries must be rotated as that layer's
are. Configurations say how in several ways: one set of parameters for all layers, one per type of layer, and layers
that the model's code leaves unrotated.
"""

from typing import Any

SLIDING, FULL = "sliding_attention", "full_attention"
# Pairs of a rotation are neighbours (0, 1), (2, 3), ... here; everywhere else they lie half a head apart. As in vLLM.
INTERLEAVED = (
    "cohere", "cohere2", "cohere2_moe", "ernie4_5", "ernie4_5_moe", "glm", "glm4", "gptj", "helium",
)  # fmt: skip
# Their code rotates the layers with a sliding window only.
ROTATES_SLIDING_ONLY = ("afmoe", "cohere2", "exaone4", "exaone_moe")


def rope_parameters(config: Any) -> dict[str, Any]:
    """RoPE of a text config in one form: the default type spelled out, older flat keys understood, no empty keys.

    Flat, or, where the config has one set per layer type, ``{type: flat}`` with the types that its layers have.
    """
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    theta = getattr(config, "rope_theta", None)
    if not any(isinstance(value, dict) for value in rope.values()):
        return _flat(rope, theta)
    types = set(layer_types(config))
    return {kind: _flat(value, theta) for kind, value in sorted(rope.items()) if value and kind in types}


def _flat(rope: dict[str, Any], theta: float | None) -> dict[str, Any]:
    rope = dict(rope)
    rope.setdefault("rope_type", rope.pop("type", None) or "default")
    if theta is not None:
        rope.setdefault("rope_theta", theta)
    return {key: value for key, value in rope.items() if value is not None}


def is_per_layer_type(rope: dict[str, Any]) -> bool:
    """Whether ``rope`` (of ``rope_parameters``) has one set of parameters per layer type."""
    return any(isinstance(value, dict) for value in rope.values())


def layer_types(config: Any) -> list[str]:
    """The type of every layer. Without a list in the config, a window is all layers'."""
    one = SLIDING if getattr(config, "sliding_window", None) else FULL
    return list(getattr(config, "layer_types", None) or [one] * config.num_hidden_layers)


def layer_window(config: Any, layer: int) -> int:
    """The window of a layer in tokens, 0 for full attention."""
    is_sliding = layer_types(config)[layer] == SLIDING
    return (getattr(config, "sliding_window", None) or 0) if is_sliding else 0


def layer_heads(config: Any, layer: int) -> tuple[int, int]:
    """(KV heads, head dimension) of a layer."""
    # Reading what differs between layers from the config as a whole is an error of transformers'.
    one = config.per_layer_config[layer] if getattr(config, "per_layer_attributes", None) else config
    kv_heads = getattr(one, "num_key_value_heads", None) or config.num_attention_heads
    return kv_heads, getattr(one, "head_dim", None) or config.hidden_size // config.num_attention_heads


def owns_kv(config: Any, layer: int) -> bool:
    """Whether a layer has keys and values of its own; the last ``num_kv_shared_layers`` read an earlier layer's."""
    return layer < config.num_hidden_layers - (getattr(config, "num_kv_shared_layers", None) or 0)


def layer_rope(config: Any, layer: int) -> dict[str, Any] | None:
    """RoPE parameters of a layer, None for one whose queries and keys are not rotated."""
    rope, kind = rope_parameters(config), layer_types(config)[layer]
    if is_per_layer_type(rope):
        return rope.get(kind)
    if getattr(config, "model_type", None) in ROTATES_SLIDING_ONLY:
        return rope if kind == SLIDING or not getattr(config, "sliding_window", None) else None
    # 1 where a layer is rotated, whatever the name says.
    rotated = getattr(config, "no_rope_layers", None)
    return rope if not rotated or rotated[layer] else None


def is_interleaved(config: Any) -> bool:
    """Whether the pairs of a rotation are neighbouring elements of a head."""
    return getattr(config, "model_type", None) in INTERLEAVED
