# SPDX-License-Identifier: Apache-2.0
"""The keys of the user's ``--speculative-config`` for kvspec, with their defaults and checks."""

from collections import Counter
from dataclasses import field, fields
from typing import Any, Literal

from vllm.config import ModelConfig, SpeculativeConfig
from vllm.config.utils import config
from vllm.logger import init_logger
from vllm.platforms import current_platform

from vllm_kvspec.assistant import DEFAULT_DEPTH, source_layers
from vllm_kvspec.config import KVSpecDraftConfig
from vllm_kvspec.engine.config import assistant
from vllm_kvspec.engine.config.refusals import check_head_fits, check_servable, load_head_config
from vllm_kvspec.engine.verify.attention_registry import register_cuda_backend
from vllm_kvspec.kernels.reference_recycle import HEAD_WIDTH
from vllm_kvspec.tree import MAX_NODES, check_parents, depths, num_candidates, parents_from_widths

logger = init_logger("vllm.kvspec.config")

# Best prefixes of a level that are expanded into children (see tree.plan_levels).
TREE_BEAM = 8
# Default of tree_width.
TREE_WIDTH = 4
# Defaults of num_speculative_tokens: with a head as its speculators keys say it, and without one.
DEFAULT_NODES_PER_POSITION, DEFAULT_NODES_WITHOUT_HEAD = 2, 16

# SpeculativeConfig's own keys. Every one is in exactly one of the two tables: vLLM acts on most of them in the
# ``__post_init__`` that ours replaces, so a key in neither would be ignored without a word.
HONOURED = frozenset(
    (
        "code_revision",
        "draft_load_config",
        "draft_tensor_parallel_size",
        "method",
        "model",
        "num_speculative_tokens",
        "num_speculative_tokens_per_batch_size",
        "rejection_sample_method",
        "revision",
        "synthetic_acceptance_length",
        "synthetic_acceptance_rates",
        "target_model_config",
        "target_parallel_config",
    )
)
_OTHER_METHOD = "It is a setting of other methods."
_TARGETS_OWN = "The head computes as the target does, whose own flag decides."
_TARGETS_CACHE = "The head reads the target's KV cache as it lies there and has none of its own."
_SAME_TOKEN = (
    "Verification samples the target's own token at every tree node and accepts equal tokens only, with no draft "
    "probabilities."
)
# Key -> why nothing but its default is accepted.
REFUSED = {
    "attention_backend": _TARGETS_CACHE,
    "disable_eagle_block_drop": _OTHER_METHOD,
    "disable_lookahead_block_hashes": _OTHER_METHOD,  # from 0.33 on
    "disable_padded_drafter_batch": _OTHER_METHOD,
    "draft_lm_head_quantization": "The head's logits come from the target's LM head itself.",  # from 0.33 on
    "draft_model_config": "It is made from the other keys.",
    "draft_parallel_config": "It is made from the other keys.",
    "draft_sample_method": _SAME_TOKEN,
    "dspark_draft_topk": _OTHER_METHOD,
    "enable_adaptive_verification": 'The number of nodes follows the load by kvspec\'s own key "budget".',
    "enforce_eager": _TARGETS_OWN,
    "fly_entropy_threshold": _SAME_TOKEN,  # from 0.33 on
    "fly_entropy_top_k": _SAME_TOKEN,  # from 0.33 on
    "fly_window_size": _SAME_TOKEN,  # from 0.33 on
    "index_share_for_mtp_iteration": _OTHER_METHOD,
    "kv_cache_dtype": _TARGETS_CACHE,
    "max_model_len": "The head drafts wherever the target decodes.",
    "moe_backend": "A head has no experts.",
    "parallel_drafting": _OTHER_METHOD,
    "prompt_lookup_max": _OTHER_METHOD,
    "prompt_lookup_min": _OTHER_METHOD,
    "quantization": "A head's weights are served as they are in its checkpoint.",
    "suffix_decoding_max_cached_requests": _OTHER_METHOD,
    "suffix_decoding_max_spec_factor": _OTHER_METHOD,
    "suffix_decoding_max_tree_depth": _OTHER_METHOD,
    "suffix_decoding_min_token_prob": _OTHER_METHOD,
    "tensor_parallel_size": "It is spelled draft_tensor_parallel_size.",
    "use_heterogeneous_vocab": "The head's vocabulary is the target's or a part of it.",
    "use_local_argmax_reduction": _SAME_TOKEN,
    "xpress_topc": _OTHER_METHOD,  # from 0.33 on
}


def base_defaults() -> dict[str, Any]:
    """The fields of vLLM's SpeculativeConfig with their defaults (pydantic wraps some in a FieldInfo)."""
    return {f.name: getattr(f.default, "default", f.default) for f in fields(SpeculativeConfig)}


def check_num_nodes(nodes: int) -> None:
    """Raise ValueError unless ``nodes`` is 1 to 63."""
    if not 1 <= nodes <= MAX_NODES:
        raise ValueError(
            "kvspec's num_speculative_tokens is the number of tree nodes without the root and must be 1 to "
            f"{MAX_NODES} (an ancestor mask is one 64-bit integer); found {nodes}."
        )


@config
class KVSpecConfig(SpeculativeConfig):
    """``SpeculativeConfig`` with kvspec's keys. An instance passes vLLM's type check and is pickled to the workers."""

    method: str | None = "kvspec"
    tree: str | list[int] = "auto"
    """``"auto"``: the head's scores choose the tree, anew in every step. ``"chain"``: no branches. A list of widths per
    depth (``[4, 2, 1]``) or of parents (``[0, 0, 1]``: the parent of nodes 1, 2, 3): a fixed shape."""
    tree_width: int = TREE_WIDTH
    """Children considered per node when ``tree`` is ``"auto"``."""
    tree_depth: int | None = None
    """Levels of the head's nodes at most when ``tree`` is ``"auto"``: by default the head's block, or
    ``assistant.DEFAULT_DEPTH``."""
    draft_noise: Literal["coupled", "none"] = "coupled"
    """At temperature > 0, rank candidates under the very Gumbel noise the target will sample with, or without it."""
    drafter: Literal["head", "recycle", "oracle", "random"] | None = None
    """None: ``"head"`` with a model, ``"recycle"`` without: successors from the target's own earlier logits and the
    request's own text. ``"oracle"`` and ``"random"`` are for tests: they place known or random tokens on random
    trees."""
    graft: bool | None = None
    """With a head: what ``"recycle"`` would draft takes part in the head's trees, the best of both. None: wherever it
    can, but not with assistants."""
    recycle_scope: Literal["salt", "request"] = "salt"
    """For ``drafter: "recycle"`` and ``graft``: who learns from whom. ``"salt"``: requests of the same ``cache_salt``,
    those without one among themselves. ``"request"``: nobody."""
    budget: Literal["auto", "fixed"] = "auto"
    """``"auto"``: at most ``num_speculative_tokens`` nodes, fewer or none when the load makes that faster. ``"fixed"``:
    always that many. ``num_speculative_tokens_per_batch_size``, when given, wins over both."""
    budget_costs: str | None = None
    """For ``budget: "auto"``: a JSON table of step costs (``budget.MeasuredCosts``), used instead of timed steps."""
    oracle_file: str | None = None
    """For ``drafter: "oracle"``: a JSON list of token id lists, each a prompt with its continuation."""
    auto_sizes: list[int] = field(default_factory=list, init=False)
    """For ``budget: "auto"``: the numbers of nodes to choose from, ascending from 0; settled by `select_budget`."""
    has_assistant: bool = field(default=False, init=False)
    """Whether ``model`` is a published assistant (`config.assistant`) and no head of ours."""
    stock_attention: str = field(default="TRITON_ATTN", init=False)
    """vLLM's attention backend for the rows that are on no tree; settled by `select_attention_backend`."""

    def __post_init__(self):
        """Replaces the base class's: no method detection by substrings of the path. Raises ValueError."""
        target = self.target_model_config
        if self.drafter is None:
            self.drafter = "head" if self.model else "recycle"
        self._refuse_options()
        tp = self.target_parallel_config.tensor_parallel_size
        if self.draft_tensor_parallel_size not in (None, tp):
            raise ValueError(
                f"kvspec shards the head as the target's KV heads are sharded: draft_tensor_parallel_size must be {tp}"
                f"; found {self.draft_tensor_parallel_size}. Leave the key out."
            )
        self.draft_tensor_parallel_size = tp
        if self.drafter == "recycle":
            self._resolve_without_head()
            # As vLLM does for drafters without a model.
            self.draft_model_config, self.draft_parallel_config = target, self.target_parallel_config
            return
        head, as_head = load_head_config(self.model, self.revision), None
        if not isinstance(head, KVSpecDraftConfig):
            layers = source_layers(head, target.hf_text_config)
            as_head = assistant.as_head(layers, target.get_vocab_size(), self._assistant_depth())
            self.has_assistant, head = True, as_head(head)
        else:
            check_servable(head)
        self._resolve_tree(head)
        if not self.has_assistant:
            check_head_fits(head, target)
        self.draft_model_config = ModelConfig(
            model=self.model,
            runner="draft",
            tokenizer=target.tokenizer,
            tokenizer_mode=target.tokenizer_mode,
            trust_remote_code=target.trust_remote_code,
            dtype=target.dtype,
            seed=target.seed,
            revision=self.revision,
            code_revision=self.code_revision,
            tokenizer_revision=target.tokenizer_revision,
            spec_target_max_model_len=target.max_model_len,
            enforce_eager=target.enforce_eager,
            max_logprobs=target.max_logprobs,
            config_format=target.config_format,
            hf_overrides=as_head or {},
        )
        self.draft_parallel_config = self.create_draft_parallel_config(
            self.target_parallel_config, tp, self.draft_model_config
        )

    def _refuse_options(self) -> None:
        """SpeculativeConfig's own keys that kvspec does not act on. One that vLLM has added counts among them."""
        refused = {
            key: REFUSED.get(key, "It is newer than this kvspec.")
            for key, default in base_defaults().items()
            if key not in HONOURED and getattr(self, key) != default
        }
        if self.rejection_sample_method not in ("standard", "synthetic"):
            refused["rejection_sample_method"] = _SAME_TOKEN
        for key, why in refused.items():
            raise ValueError(
                f"kvspec does not support {key!r} in the speculative config; found {getattr(self, key)!r}. {why} "
                "Leave the key out."
            )
        for key in ("tree_width", "tree_depth"):
            if getattr(self, key) is not None and getattr(self, key) < 1:
                raise ValueError(f"kvspec's {key} must be at least 1; found {getattr(self, key)}.")
        if self.tree_depth is not None and self.tree != "auto":
            raise ValueError(
                f'kvspec\'s tree_depth is for tree "auto"; found {self.tree_depth} with tree {self.tree}. Leave it out.'
            )
        if self.drafter == "oracle" and not self.oracle_file:
            raise ValueError('kvspec\'s drafter "oracle" needs oracle_file, a JSON list of token id lists; found none.')

    def _assistant_depth(self) -> int:
        """Passes of an assistant, one for each level of the tree."""
        if self.parents:
            return max(depths(self.parents))
        asked = self.num_speculative_tokens if self.tree == "chain" else self.tree_depth
        return asked or DEFAULT_DEPTH

    @property
    def beam(self) -> int:
        """Nodes of a level that are expanded."""
        return 1 if self.tree == "chain" else TREE_BEAM

    def max_depth(self, head: KVSpecDraftConfig) -> int:
        """Levels of a tree of ``head`` at most."""
        return min(head.draft_block_size, self.tree_depth or head.draft_block_size)

    def _resolve_without_head(self) -> None:
        """Settle ``num_speculative_tokens`` where any tree can be filled. Raises ValueError for keys of heads."""
        if self.model:
            raise ValueError(
                f'kvspec\'s drafter "recycle" uses no head; found model {self.model!r}. Leave one of the two out.'
            )
        if self.graft:
            raise ValueError('kvspec\'s graft needs a head to graft onto; found none. Give "model", or leave it out.')
        self.graft = False
        if self.parents or self.tree_width != TREE_WIDTH or self.tree_depth:
            raise ValueError(
                f"kvspec's tree of fixed shape, width or depth needs a head; found tree {self.tree!r}, tree_width "
                f'{self.tree_width}, tree_depth {self.tree_depth} without one. Leave them out, or set "tree" to '
                '"chain".'
            )
        nodes = self.num_speculative_tokens
        self.num_speculative_tokens = DEFAULT_NODES_WITHOUT_HEAD if nodes is None else nodes
        check_num_nodes(self.num_speculative_tokens)
        self._resolve_synthetic(self.num_speculative_tokens, self.num_speculative_tokens)

    def _resolve_tree(self, head: KVSpecDraftConfig) -> None:
        """Settle ``num_speculative_tokens`` and check that the head can fill the tree."""
        parents = self.parents
        nodes = self.num_speculative_tokens
        if nodes is None:
            per_position = 1 if self.tree == "chain" else DEFAULT_NODES_PER_POSITION
            nodes = len(parents) if parents else per_position * self.max_depth(head)
        check_num_nodes(nodes)
        if parents and len(parents) != nodes:
            raise ValueError(
                f"kvspec's tree {self.tree} has {len(parents)} nodes, but num_speculative_tokens is {nodes}. "
                "Give the same number, or leave num_speculative_tokens out."
            )
        can_graft = self.drafter == "head" and not parents and self.tree_width <= HEAD_WIDTH
        if self.graft is None:
            self.graft = can_graft and not self.has_assistant
        if self.graft and not can_graft:
            raise ValueError(
                f'kvspec\'s graft needs drafter "head" and trees that scores choose, of tree_width at most {HEAD_WIDTH}'
                f"; found drafter {self.drafter!r}, tree {self.tree!r}, tree_width {self.tree_width}. Leave them out."
            )
        depth = max(depths(parents)) if parents else nodes if self.tree == "chain" else 1
        if depth > head.draft_block_size:
            raise ValueError(
                f"kvspec's tree is {depth} deep, but the head {self.model} scores {head.draft_block_size} positions. "
                f"Use a tree of depth {head.draft_block_size} or less, or a head with a larger draft_block_size."
            )
        available = num_candidates(self.max_depth(head), TREE_BEAM, self.tree_width)
        width = max(Counter(parents).values()) if parents else 1 if self.tree == "chain" else self.tree_width
        if width > head.draft_vocab_size:
            raise ValueError(
                f"kvspec's tree gives a node {width} children, but the head {self.model} scores "
                f"{head.draft_vocab_size} tokens. Use a narrower tree."
            )
        if self.tree == "auto" and nodes > available:
            raise ValueError(
                f"kvspec's num_speculative_tokens {nodes} is more than the {available} candidates of a head of block "
                f"size {self.max_depth(head)} with tree_width {self.tree_width}. Raise tree_width or lower "
                "num_speculative_tokens."
            )
        self.num_speculative_tokens = nodes
        self._resolve_synthetic(nodes, min(nodes, self.max_depth(head)) if self.tree == "auto" else depth)

    def _resolve_synthetic(self, nodes: int, depth: int) -> None:
        """Forced acceptance: rates are per depth here, and may stop at the deepest. vLLM checks the rest later."""
        if self.rejection_sample_method != "synthetic":
            return
        rates, length = self.synthetic_acceptance_rates, self.synthetic_acceptance_length
        if any((rates or [])[depth:]) or (length or 1) > depth + 1:
            raise ValueError(
                f"kvspec's synthetic_acceptance_rates must be 0 beyond the tree's depth, {depth}, and "
                f"synthetic_acceptance_length at most {depth + 1}; found {rates or length}. Use a deeper tree."
            )
        if rates is not None:
            self.synthetic_acceptance_rates = [*rates, *[0.0] * (nodes - len(rates))][:nodes]
        logger.warning(
            "kvspec forces acceptance (rejection_sample_method synthetic): for benchmarks only, the text is NOT the "
            "target's."
        )

    def draft_shares_target_positions(self) -> bool:
        """Whether the head works at every position of the target; asked from 0.33 on, where another draft's own limit
        lowers the target's. The head's rotary cache is sized by the target's ``max_model_len``."""
        return True

    @property
    def head_config(self) -> KVSpecDraftConfig | None:
        """The head's config.json, None without a head."""
        return None if self.drafter == "recycle" else self.draft_model_config.hf_config

    @property
    def node_sizes(self) -> list[int]:
        """Numbers of nodes, ascending, that a step may verify."""
        if self.budget == "auto":
            return self.auto_sizes
        schedule = self.num_speculative_tokens_per_batch_size or [(1, 1, self.num_speculative_tokens)]
        return sorted({min(nodes, self.num_speculative_tokens) for _, _, nodes in schedule})

    def max_nodes(self, batch: int, max_rows: float) -> int:
        """The most nodes that each of ``batch`` requests may get in a step of at most ``max_rows`` rows."""
        if self.budget == "fixed":
            return self.node_sizes[-1]
        return max((nodes for nodes in self.node_sizes if batch * (nodes + 1) <= max_rows), default=0)

    def max_batch(self, nodes: int, max_rows: float) -> float:
        """The most requests of which each may get ``nodes`` nodes; see ``max_nodes``."""
        return float("inf") if self.budget == "fixed" else max_rows // (nodes + 1)

    @property
    def parents(self) -> list[int] | None:
        """Parents of nodes 1..N of a fixed shape, or None for ``"auto"`` and ``"chain"``. Raises ValueError."""
        if self.tree in ("auto", "chain"):
            return None
        if not isinstance(self.tree, list) or not self.tree:
            raise ValueError(
                'kvspec\'s tree must be "auto", "chain", a list of widths per depth such as [4, 2, 1], or a list of '
                f"parents such as [0, 0, 1]; found {self.tree!r}."
            )
        # Node 1's parent is always the root, 0, and no width is 0: the first number tells the two apart.
        if self.tree[0] != 0:
            return parents_from_widths(self.tree)
        check_parents(self.tree)
        return self.tree

    def __setstate__(self, state: dict[str, Any]) -> None:
        """Unpickled in the engine core and the workers: each may resolve the attention backend by its name."""
        self.__dict__.update(state)
        if not current_platform.is_cpu():
            register_cuda_backend(self.stock_attention)

    def __repr__(self) -> str:
        return (
            f"KVSpecConfig(model={self.model!r}, num_speculative_tokens={self.num_speculative_tokens}, "
            f"tree={self.tree!r}, draft_noise={self.draft_noise!r}, drafter={self.drafter!r})"
        )
