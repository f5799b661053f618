# SPDX-License-Identifier: Apache-2.0
"""Configuration of a draft head's checkpoint, and the fingerprint that ties a head to its target.

A head reads the target's KV cache, embedding and LM head, so it fits exactly one target. The configuration therefore
carries a fingerprint of that target, and ``check_fingerprint`` refuses any other with both sides named.
"""

import hashlib
import json
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig

from vllm_kvspec.rope import is_per_layer_type, layer_heads, layer_types, rope_parameters

TRANSITIONS = ("table", "tied")
# What a head with each context can do with what it reads.
FUSIONS = {
    "hidden": ("direct", "eagle3"),
    "kv": ("direct", "concat", "projection", "projection_rope"),
    "hybrid": ("direct", "gated"),
}
DRAFTINGS = ("block", "autoregressive")
# Of fusion "eagle3", the heads that other engines know.
EAGLE3_SHAPE = {
    "num_hidden_layers": 1, "drafting": "autoregressive", "transition_rank": 0, "qk_norm": False,
    "rope_interleaved": False, "layer_rope_parameters": None,
}  # fmt: skip
# In which a score depends on the distance alone: EAGLE-3 numbers its rows one less than we do.
EAGLE3_ROPES = ("default", "linear", "llama3", "yarn")
# Written beside our own keys, so that tools which know the speculators format can read the checkpoint. All are derived.
SPECULATORS_KEYS = (
    "speculators_model_type",
    "speculators_version",
    "speculators_config",
    "transformer_layer_config",
)
SPECULATORS_VERSION = "0.9.0"
# Where a target came from and what its class is called do not change its KV cache.
NOT_COMPARED = ("name_or_path", "architectures")


class KVSpecDraftConfig(PreTrainedConfig):
    """Shape of a draft head.

    ``context`` says what conditions the head: ``"kv"`` (the target's KV cache only), ``"hybrid"`` (also the target's
    last hidden state before the anchor), or ``"hidden"`` (as EAGLE-3: no target KV; the hidden states after the target
    layers ``aux_hidden_state_layer_ids``, and context keys and values of the head's own).

    ``fusion`` says how a layer reads the target's KV: ``"direct"`` (head layer ``i`` reads target layer
    ``target_kv_layer_ids[i]`` as it lies in the cache), or one of KVShot's (arXiv 2604.26412, section 3), where
    ``target_kv_layer_ids`` are read together: ``"concat"`` (side by side on the head axis), ``"projection"`` (a learned
    mix of the layers), ``"projection_rope"`` (the same, with the rotation undone before and redone after); or
    ``"gated"`` (its gated delta between an EAGLE-3 layer and direct cross-attention; hybrid, one layer). With context
    ``"hidden"``: ``"direct"`` (an ordinary layer after a projection) or ``"eagle3"`` (EAGLE-3's layer to the letter;
    one, autoregressive: other engines know it).

    ``drafting`` says how a block of ``draft_block_size`` positions is scored: ``"block"`` (one pass, learned inputs
    after the anchor) or ``"autoregressive"`` (row d's input is the token at ``base + d``).

    ``transition`` says what makes a row's logits depend on the token before: ``"table"`` (a learned row of rank
    ``transition_rank`` per token) or ``"tied"`` (rows made of the target's embedding and LM head, times a gate of the
    row's hidden state); ``transition_rank`` 0 means no such bias. ``draft_vocab_size`` below ``vocab_size`` means that
    the head scores a part of the vocabulary. ``greedy_scale`` divides the head's logits when a tree for greedy decoding
    is ranked, ``coupled_scale`` when one for sampling under the target's noise is (``tree.ranking_scale``). Everything
    that shapes queries, keys and values equals the target's: ``rope_parameters``, or where it is not one for all layers
    ``layer_rope_parameters``, one entry per head layer, null for a layer without rotary positions; ``rope_interleaved``
    says that the pairs of a rotation are neighbours.

    Raises ValueError for shapes that no head can have.
    """

    model_type = "kvspec"

    context: str = "hybrid"
    fusion: str = "direct"
    drafting: str = "block"
    draft_block_size: int = 8
    target_kv_layer_ids: list[int] | None = None
    aux_hidden_state_layer_ids: list[int] | None = None
    hidden_size: int = 64
    intermediate_size: int = 128
    num_hidden_layers: int = 2
    num_attention_heads: int = 4
    num_key_value_heads: int = 2
    head_dim: int = 16
    rms_norm_eps: float = 1e-6
    hidden_act: str = "silu"
    rope_parameters: dict | None = None
    layer_rope_parameters: list[dict | None] | None = None
    rope_interleaved: bool = False
    qk_norm: bool = True
    attention_bias: bool = False
    transition: str = "table"
    transition_rank: int = 64
    greedy_scale: float = 0.5
    coupled_scale: float = 1.0
    vocab_size: int = 256
    draft_vocab_size: int | None = None
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
            self.target_kv_layer_ids = [] if self.context == "hidden" else list(range(self.num_hidden_layers))
        self.target_kv_layer_ids = list(self.target_kv_layer_ids)
        self.aux_hidden_state_layer_ids = list(self.aux_hidden_state_layer_ids or [])
        self.draft_vocab_size = self.draft_vocab_size or self.vocab_size
        self.target = dict(self.target or {})
        self._check()

    @property
    def is_eagle3(self) -> bool:
        """Whether the head is what EAGLE-3 checkpoints hold."""
        return self.fusion == "eagle3"

    @property
    def has_own_context(self) -> bool:
        """Whether the head keeps context keys and values of its own, made from the target's hidden states."""
        return self.context == "hidden" or self.fusion == "gated"

    @property
    def feeds_back(self) -> bool:
        """Whether a row's input needs the head's own output of the row before."""
        return self.drafting == "autoregressive" and self.context != "kv"

    @property
    def has_tied_transition(self) -> bool:
        """Whether a row's hidden state gates what the token before it adds."""
        return self.transition == "tied" and self.transition_rank > 0

    def layer_rope(self, layer: int) -> dict[str, Any] | None:
        """RoPE parameters of a head layer's rows: those of the keys it reads; None for no rotation."""
        return self.rope_parameters if self.layer_rope_parameters is None else self.layer_rope_parameters[layer]

    def _check(self) -> None:
        fusions = tuple(dict.fromkeys(fusion for known in FUSIONS.values() for fusion in known))
        chosen = (
            ("context", tuple(FUSIONS)),
            ("fusion", fusions),
            ("drafting", DRAFTINGS),
            ("transition", TRANSITIONS),
        )
        for key, values in chosen:
            if getattr(self, key) not in values:
                raise ValueError(f"{key} must be one of {list(values)}, got {getattr(self, key)!r}; use one of these.")
        if self.draft_block_size < 1:
            raise ValueError(f"draft_block_size must be at least 1, got {self.draft_block_size}; use for example 8.")
        self._check_context()
        if not 1 <= self.draft_vocab_size <= self.vocab_size:
            raise ValueError(
                f"draft_vocab_size must be 1 to {self.vocab_size}, got {self.draft_vocab_size}; leave it out for the "
                "whole vocabulary."
            )
        if self.transition_rank < 0:
            raise ValueError(f"transition_rank must not be negative, got {self.transition_rank}; 0 means no bias.")
        for key, usual in (("greedy_scale", 0.5), ("coupled_scale", 1.0)):
            if not getattr(self, key) > 0:
                raise ValueError(f"{key} must be positive, got {getattr(self, key)}; use for example {usual}.")
        if self.layer_rope_parameters is not None and len(self.layer_rope_parameters) != self.num_hidden_layers:
            raise ValueError(
                f"layer_rope_parameters must have one entry per head layer ({self.num_hidden_layers}), got "
                f"{len(self.layer_rope_parameters)}; leave it out where all layers have rope_parameters."
            )
        if self.attention_bias:
            raise ValueError("attention_bias must be false for a kvspec head, got true; leave it out.")

    def _check_context(self) -> None:
        wanted = FUSIONS[self.context]
        if self.fusion not in wanted:
            raise ValueError(
                f"fusion with context {self.context!r} must be one of {list(wanted)}, got {self.fusion!r}; use one of "
                "these."
            )
        if self.fusion == "gated" and self.num_hidden_layers != 1:
            raise ValueError(f'fusion "gated" must have 1 layer, as KVShot\'s; got {self.num_hidden_layers}.')
        one_each = self.fusion in ("direct", "gated") and self.context != "hidden"
        if one_each and len(self.target_kv_layer_ids) != self.num_hidden_layers:
            raise ValueError(
                f"target_kv_layer_ids must name one target layer per head layer ({self.num_hidden_layers}), got "
                f"{self.target_kv_layer_ids}; list that many target layers."
            )
        if self.context == "hidden" and self.target_kv_layer_ids:
            raise ValueError(
                f'target_kv_layer_ids must be empty with context "hidden", which reads no target KV; got '
                f"{self.target_kv_layer_ids}. Leave it out."
            )
        if self.has_own_context != bool(self.aux_hidden_state_layer_ids):
            raise ValueError(
                'aux_hidden_state_layer_ids must name target layers with context "hidden" or fusion "gated", and none '
                f"otherwise; got {self.aux_hidden_state_layer_ids} with {self.context!r}, {self.fusion!r}."
            )
        num_target_layers = self.target.get("num_hidden_layers")
        for key in ("target_kv_layer_ids", "aux_hidden_state_layer_ids"):
            bad = [i for i in getattr(self, key) if i < 0 or (num_target_layers and i >= num_target_layers)]
            if bad:
                raise ValueError(
                    f"{key} must be layers of the target (0..{(num_target_layers or 0) - 1}), got {bad}; count from "
                    "the first layer."
                )
        if self.is_eagle3:
            self._check_eagle3()

    def _check_eagle3(self) -> None:
        wrong = [key for key, value in EAGLE3_SHAPE.items() if getattr(self, key) != value]
        if wrong:
            raise ValueError(
                f'fusion "eagle3" must have {listed({key: EAGLE3_SHAPE[key] for key in wrong})}, as EAGLE-3; got '
                f"{listed({key: getattr(self, key) for key in wrong})}. Set these, or use another fusion."
            )
        last = self.target.get("num_hidden_layers", 0) - 1
        if last in self.aux_hidden_state_layer_ids:
            raise ValueError(
                f'aux_hidden_state_layer_ids of fusion "eagle3" must come before the last layer ({last}), whose hidden '
                f"states transformers gives after the final norm only; got {self.aux_hidden_state_layer_ids}."
            )
        kind = (self.rope_parameters or {}).get("rope_type", "default")
        if kind not in EAGLE3_ROPES:
            raise ValueError(
                f'rope_parameters of fusion "eagle3" must be of a type in {list(EAGLE3_ROPES)}, got {kind!r}; use '
                'context "kv" or "hybrid".'
            )

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
        }


def listed(settings: dict[str, Any]) -> str:
    """Settings as errors name them."""
    return ", ".join(f"{key} {value!r}" for key, value in settings.items())


def find_target(head: str, name: str) -> str:
    """Where the target is that the head in directory ``head`` calls ``name``: a name, or a directory as seen from here.

    A directory that is not seen from here is looked for beside the head, and from there upwards. Raises ValueError for
    a head that names none.
    """
    if not name:
        raise ValueError(f"The head in {head} must name its target, found no name in its config.json; name the target.")
    if Path(name).exists():
        return name
    found = (parent / name for parent in Path(head).absolute().parents)
    return next((str(path) for path in found if path.is_dir()), name)


def tokenizer_sha256(tokenizer: Any, ignored: str | None = None) -> str:
    """SHA-256 over a tokenizer's sorted vocabulary and added tokens (any Hugging Face tokenizer) but ``ignored``."""
    vocabularies = (tokenizer.get_vocab(), tokenizer.get_added_vocab())
    items = [sorted(item for item in tokens.items() if item[0] != ignored) for tokens in vocabularies]
    return hashlib.sha256(json.dumps(items, ensure_ascii=True).encode()).hexdigest()


def unsupported_attention(target_config: Any) -> str | None:
    """What of the target's attention neither heads nor the tree kernel compute, in a few words, or None.

    ``target_config`` is the target's Hugging Face text config.
    """
    if getattr(target_config, "alibi", False) or getattr(target_config, "model_type", None) in ("bloom", "mpt"):
        return "ALiBi positions"
    # Granite's, layer by layer; 0 for none.
    if len(set(getattr(target_config, "layer_rope_theta", None) or [])) > 1:
        return "rotary positions listed layer by layer"
    rope = rope_parameters(target_config)
    # Published configurations leave the older default out; those without rotary positions know no such key.
    has_rope = is_per_layer_type(rope) or "rope_theta" in rope
    return None if has_rope else "no rotary positions in its configuration"


def has_attention_sinks(target_config: Any) -> bool:
    """Whether the target's heads have sinks; ``target_config`` is its Hugging Face text config."""
    return getattr(target_config, "model_type", None) in ("gpt_oss", "granite_swa", "granitemoe_swa")


def target_fingerprint(target_config: Any, tokenizer: Any | None) -> dict[str, Any]:
    """What a head depends on in its target.

    ``target_config`` is the target's Hugging Face text config; ``tokenizer`` its tokenizer, or None to leave the
    tokenizer's hash out (None). The values are plain JSON.
    """
    rope = rope_parameters(target_config)
    layers = range(target_config.num_hidden_layers)
    kv_heads, head_dims = ([*x] for x in zip(*(layer_heads(target_config, layer) for layer in layers), strict=True))
    shared = getattr(target_config, "num_kv_shared_layers", None)
    return {
        "name_or_path": str(getattr(target_config, "name_or_path", "") or ""),
        "architectures": list(getattr(target_config, "architectures", None) or []),
        "num_hidden_layers": target_config.num_hidden_layers,
        "num_attention_heads": target_config.num_attention_heads,
        # One number, or one a layer.
        "num_key_value_heads": kv_heads if len(set(kv_heads)) > 1 else kv_heads[0],
        "head_dim": head_dims if len(set(head_dims)) > 1 else head_dims[0],
        **({"num_kv_shared_layers": shared} if shared else {}),
        "hidden_size": target_config.hidden_size,
        "rope_parameters": rope,
        # What says which of them a layer has.
        **({"layer_types": layer_types(target_config)} if is_per_layer_type(rope) else {}),
        "vocab_size": target_config.vocab_size,
        "tokenizer_sha256": None if tokenizer is None else tokenizer_sha256(tokenizer),
    }


def check_fingerprint(draft_config: KVSpecDraftConfig, found: dict[str, Any]) -> None:
    """Raise ValueError unless the head of ``draft_config`` was trained for a target like ``found``.

    ``found`` comes from ``target_fingerprint``. A tokenizer hash of None on either side skips that comparison.
    """
    expected = draft_config.target
    different = []
    for key in dict.fromkeys([*found, *expected]):
        wanted, value = expected.get(key), found.get(key)
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
