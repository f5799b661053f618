# SPDX-License-Identifier: Apache-2.0
"""What makes of an assistant's configuration the one that the engine asks a head for."""

from functools import partial
from typing import Any

from vllm.config import SpeculativeConfig

from vllm_kvspec.assistant import scales

ARCHITECTURE = "KVSpecGemma4Assistant"


def as_head(layers: list[int], vocab_size: int, depth: int) -> partial:
    """A function that adds to an assistant's config what a head's says, for ``ModelConfig``'s ``hf_overrides``.

    ``layers``: the target layers it reads (``assistant.source_layers``). ``depth``: the most levels of a tree.
    """
    keys = {
        "architectures": [ARCHITECTURE],
        "context": "queries",
        "target_kv_layer_ids": layers,
        "draft_block_size": depth,
        "draft_vocab_size": vocab_size,
    }
    return partial(_with_keys, keys=keys)


def _with_keys(config: Any, keys: dict[str, Any]) -> Any:
    # vLLM's own name for an assistant selects the convertor that knows its sizes.
    config = SpeculativeConfig.hf_config_override(config)
    config.update(keys | scales(config))
    return config
