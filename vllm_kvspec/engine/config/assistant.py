# SPDX-License-Identifier: Apache-2.0
"""Google's Gemma 4 assistants: published draft heads whose layers have queries alone and read the target's KV cache.

Their checkpoints say neither which target layers they read nor how deep a tree should be; here is what makes of one
what the rest of the engine asks of a head's configuration.
"""

from functools import partial
from typing import Any

from vllm.config import ModelConfig, SpeculativeConfig

from vllm_kvspec.rope import layer_heads, layer_types, owns_kv

MODEL_TYPES = ("gemma4_assistant", "gemma4_unified_assistant")
ARCHITECTURE = "KVSpecGemma4Assistant"
# Every level of a tree is a pass of the assistant. As many as one is asked for where nobody says otherwise.
DEFAULT_DEPTH = 6
# A head says its own (``KVSpecDraftConfig``); this is its default.
GREEDY_SCALE = 0.5


def as_head(assistant: Any, target: ModelConfig, depth: int) -> partial:
    """A function that adds to an assistant's config what a head's says, for ``ModelConfig``'s ``hf_overrides``.

    ``assistant`` is its Hugging Face config, ``depth`` the most levels of a tree. Raises ValueError for an assistant of
    another target.
    """
    target_config, own = target.hf_text_config, assistant.get_text_config()
    differences = [
        f"{what} {found} where the target has {wanted}"
        for what, found, wanted in (
            ("backbone_hidden_size", assistant.backbone_hidden_size, target_config.hidden_size),
            ("vocab_size", own.vocab_size, target_config.vocab_size),
        )
        if found != wanted
    ]
    # The last layer of each type that has keys and values of its own.
    last = {kind: i for i, kind in enumerate(layer_types(target_config)) if owns_kv(target_config, i)}
    layers = [last.get(kind) for kind in layer_types(own)]
    for layer, source in enumerate(layers):
        if source is None:
            differences.append(f"a layer of type {layer_types(own)[layer]}, of which the target has none")
            continue
        kv_heads, head_dim = layer_heads(target_config, source)
        if layer_heads(own, layer)[1] != head_dim or own.num_attention_heads % kv_heads:
            differences.append(
                f"{own.num_attention_heads} heads of {layer_heads(own, layer)[1]} in layer {layer}, which reads "
                f"{kv_heads} KV heads of {head_dim}"
            )
    if differences:
        raise ValueError(
            f"Assistant {assistant.name_or_path or '(unnamed)'} was trained for another target than {target.model}: it "
            f"has {'; '.join(differences)}. Use the assistant of this target."
        )
    keys = {
        "architectures": [ARCHITECTURE],
        "context": "queries",
        "target_kv_layer_ids": layers,
        "draft_block_size": depth,
        "draft_vocab_size": own.vocab_size,
        "greedy_scale": GREEDY_SCALE,
    }
    return partial(_with_keys, keys=keys)


def _with_keys(config: Any, keys: dict[str, Any]) -> Any:
    # vLLM's own name for an assistant selects the convertor that knows its sizes.
    config = SpeculativeConfig.hf_config_override(config)
    config.update(keys)
    return config
