# SPDX-License-Identifier: Apache-2.0
"""Configuration of a draft head's checkpoint, and the fingerprint that ties a head to its target.

A head reads the target's KV cache, embedding and LM head, so it fits exactly one target. The configuration therefore
carries a fingerprint of that target, and ``check_fingerprint`` refuses any other with both sides named.
"""

import hashlib
import json
from typing import Any

from transformers import PreTrainedConfig

CONTEXTS = ("kv", "hybrid")
# Written beside our own keys, so that tools which know the speculators format can read the checkpoint. All are derived.
SPECULATORS_KEYS = (
    "speculators_model_type",
    "speculators_version",
    "speculators_config",
    "transformer_layer_config",
    "draft_vocab_size",
)
SPECULATORS_VERSION = "0.9.0"
# Where a target came from and what its class is called do not change its KV cache.
NOT_COMPARED = ("name_or_path", "architectures")


class KVSpecDraftConfig(PreTrainedConfig):
    """Shape of a draft head.

    ``context`` says what conditions the head: ``"kv"`` (the target's KV cache only) or ``"hybrid"`` (also the target's
    last hidden state before the anchor). ``draft_block_size`` is the number of positions scored in one pass,
    ``target_kv_layer_ids[i]`` the target layer whose KV head layer ``i`` reads. ``greedy_scale`` divides the head's
    logits when a tree for greedy decoding is ranked (``tree.ranking_scale``). Everything that shapes queries, keys and
    values equals the target's. Raises ValueError for shapes that no head can have.
    """

    model_type = "kvspec"

    context: str = "hybrid"
    draft_block_size: int = 8
    target_kv_layer_ids: list[int] | None = None
    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope_parameters: dict | None = None
    qk_norm: bool = True
    attention_bias: bool = False
    transition_rank: int = 64
    greedy_scale: float = 0.5
    vocab_size: int = 256
    max_position_embeddings: int = 1024
    tie_word_embeddings: bool = False
    initializer_range: float = 0.02
    target: dict | None = None

    def __post_init__(self, **kwargs):
        for key in SPECULATORS_KEYS:
            kwargs.pop(key, None)
        super().__post_init__(**kwargs)
        self.architectures = self.architectures or ["KVSpecDraftModel"]
        if self.target_kv_layer_ids is None:
            self.target_kv_layer_ids = list(range(self.num_hidden_layers))
        self.target_kv_layer_ids = list(self.target_kv_layer_ids)
        self.target = dict(self.target or {})
        self._check()

    def _check(self) -> None:
        if self.context == "hidden":
            raise ValueError(
                'context "hidden" (a head with its own context KV) is not built yet; use "kv" or "hybrid", which read '
                "the target's KV."
            )
        if self.context not in CONTEXTS:
            raise ValueError(f"context must be one of {list(CONTEXTS)}, got {self.context!r}; use one of these.")
        if self.draft_block_size < 1:
            raise ValueError(f"draft_block_size must be at least 1, got {self.draft_block_size}; use for example 8.")
        if len(self.target_kv_layer_ids) != self.num_hidden_layers:
            raise ValueError(
                f"target_kv_layer_ids must name one target layer per head layer ({self.num_hidden_layers}), got "
                f"{self.target_kv_layer_ids}; list that many target layers."
            )
        num_target_layers = self.target.get("num_hidden_layers")
        bad = [i for i in self.target_kv_layer_ids if i < 0 or (num_target_layers and i >= num_target_layers)]
        if bad:
            raise ValueError(
                f"target_kv_layer_ids must be layers of the target (0..{(num_target_layers or 0) - 1}), got {bad}; "
                "count from the first layer."
            )
        if not self.greedy_scale > 0:
            raise ValueError(f"greedy_scale must be positive, got {self.greedy_scale}; use for example 0.5.")
        if self.attention_bias:
            raise ValueError("attention_bias must be false for a kvspec head, got true; leave it out.")

    def to_dict(self) -> dict[str, Any]:
        """The checkpoint's keys, the derived speculators keys included."""
        output = super().to_dict()
        output.update(self._speculators_keys())
        return output

    def _speculators_keys(self) -> dict[str, Any]:
        proposal = {
            "proposal_type": "greedy",
            "speculative_tokens": 2 * self.draft_block_size,
            "verifier_accept_k": 1,
            "accept_tolerance": 0.0,
        }
        layer_keys = (
            "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "head_dim", "rms_norm_eps", "hidden_act", "rope_parameters", "vocab_size", "max_position_embeddings",
        )  # fmt: skip
        return {
            "speculators_model_type": self.model_type,
            "speculators_version": SPECULATORS_VERSION,
            "speculators_config": {
                "algorithm": self.model_type,
                "default_proposal_method": "greedy",
                "proposal_methods": [proposal],
                "verifier": {
                    "name_or_path": self.target.get("name_or_path", ""),
                    "architectures": self.target.get("architectures") or [],
                },
            },
            "transformer_layer_config": {"model_type": "qwen3", **{key: getattr(self, key) for key in layer_keys}},
            "draft_vocab_size": self.vocab_size,
        }


def tokenizer_sha256(tokenizer: Any) -> str:
    """SHA-256 over a tokenizer's sorted vocabulary and added tokens (any Hugging Face tokenizer)."""
    items = [sorted(tokenizer.get_vocab().items()), sorted(tokenizer.get_added_vocab().items())]
    return hashlib.sha256(json.dumps(items, ensure_ascii=True).encode()).hexdigest()


def _rope_parameters(config: Any) -> dict[str, Any]:
    """RoPE of any Hugging Face text config, the default type spelled out and the older flat keys understood."""
    rope = dict(getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {})
    rope.setdefault("rope_type", rope.pop("type", None) or "default")
    if "rope_theta" not in rope and getattr(config, "rope_theta", None) is not None:
        rope["rope_theta"] = config.rope_theta
    return {key: value for key, value in rope.items() if value is not None}


def target_fingerprint(target_config: Any, tokenizer: Any | None) -> dict[str, Any]:
    """What a head depends on in its target.

    ``target_config`` is the target's Hugging Face text config; ``tokenizer`` its tokenizer, or None to leave the
    tokenizer's hash out (None). The values are plain JSON.
    """
    heads = target_config.num_attention_heads
    return {
        "name_or_path": str(getattr(target_config, "name_or_path", "") or ""),
        "architectures": list(getattr(target_config, "architectures", None) or []),
        "num_hidden_layers": target_config.num_hidden_layers,
        "num_attention_heads": heads,
        "num_key_value_heads": getattr(target_config, "num_key_value_heads", None) or heads,
        "head_dim": getattr(target_config, "head_dim", None) or target_config.hidden_size // heads,
        "hidden_size": target_config.hidden_size,
        "rope_parameters": _rope_parameters(target_config),
        "vocab_size": target_config.vocab_size,
        "tokenizer_sha256": None if tokenizer is None else tokenizer_sha256(tokenizer),
    }


def check_fingerprint(draft_config: KVSpecDraftConfig, found: dict[str, Any]) -> None:
    """Raise ValueError unless the head of ``draft_config`` was trained for a target like ``found``.

    ``found`` comes from ``target_fingerprint``. A tokenizer hash of None on either side skips that comparison.
    """
    expected = draft_config.target
    different = []
    for key, value in found.items():
        wanted = expected.get(key)
        if key in NOT_COMPARED or (key == "tokenizer_sha256" and None in (wanted, value)):
            continue
        if wanted != value:
            different.append(key)
    if different:
        wanted, has = (", ".join(f"{key} {side.get(key)}" for key in different) for side in (expected, found))
        raise ValueError(
            f"kvspec head {draft_config.name_or_path or '(unnamed)'} was trained for a target with {wanted} "
            f"({expected.get('name_or_path') or 'unnamed'}); target {found.get('name_or_path') or '(unnamed)'} has "
            f"{has}; use a head trained for this target."
        )
