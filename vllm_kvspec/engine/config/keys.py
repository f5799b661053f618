# SPDX-License-Identifier: Apache-2.0
"""The user's ``--speculative-config`` for kvspec: parsing, defaults, and every refusal that can be made at start."""

from collections import Counter
from dataclasses import field
from pathlib import Path
from typing import Any, Literal

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig
from vllm.config import ModelConfig, ParallelConfig, SpeculativeConfig
from vllm.config.utils import config
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.torch_utils import resolve_kv_cache_dtype_string
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_kvspec import __version__
from vllm_kvspec.config import KVSpecDraftConfig, check_fingerprint, target_fingerprint
from vllm_kvspec.engine.budget.choice import Acceptance, budget_sizes, graph_schedule, read_costs
from vllm_kvspec.engine.verify.attention_registry import CUDA_BACKENDS, register_cuda_backend
from vllm_kvspec.tree import MAX_NODES, check_parents, depths, num_candidates, parents_from_widths

logger = init_logger("vllm.kvspec.config")

# Best prefixes of a level that are expanded into children (see tree.plan_levels).
TREE_BEAM = 8
# Default of num_speculative_tokens, as the head's speculators keys say it.
DEFAULT_NODES_PER_POSITION = 2
CUDA_WORKER = "vllm_kvspec.engine.worker.KVSpecWorker"
SCHEDULER = "vllm_kvspec.engine.budget.scheduler.create_scheduler"
# Where the user gives no --max-num-seqs, vLLM chooses it later; this only sizes the list of CUDA graphs.
DEFAULT_MAX_NUM_SEQS = 256
CPU_CACHE_DTYPES = ("auto", "float16", "bfloat16")
# Plain K and V, or with one scale per tensor.
CACHE_DTYPES = (*CPU_CACHE_DTYPES, "fp8", "fp8_e4m3")
CPU_WORKER = "vllm_kvspec.engine.cpu.worker.KVSpecCPUWorker"


@config
class KVSpecConfig(SpeculativeConfig):
    """``SpeculativeConfig`` with kvspec's keys. An instance passes vLLM's type check and is pickled to the workers."""

    method: str | None = "kvspec"
    tree: str | list[int] = "auto"
    """``"auto"``: the head's scores choose the tree, anew in every step. ``"chain"``: no branches. A list of widths per
    depth (``[4, 2, 1]``) or of parents (``[0, 0, 1]``: the parent of nodes 1, 2, 3): a fixed shape."""
    tree_width: int = 4
    """Children considered per node when ``tree`` is ``"auto"``."""
    draft_noise: Literal["coupled", "none"] = "coupled"
    """At temperature > 0, rank candidates under the very Gumbel noise the target will sample with, or without it."""
    drafter: Literal["head", "oracle", "random"] = "head"
    """``"oracle"`` and ``"random"`` are for tests: they place known or random tokens on random trees."""
    budget: Literal["auto", "fixed"] = "auto"
    """``"auto"``: at most ``num_speculative_tokens`` nodes, fewer or none when the load makes that faster. ``"fixed"``:
    always that many. ``num_speculative_tokens_per_batch_size``, when given, wins over both."""
    budget_costs: str | None = None
    """For ``budget: "auto"``: a JSON table of step costs (``budget.MeasuredCosts``), used instead of timed steps."""
    oracle_file: str | None = None
    """For ``drafter: "oracle"``: a JSON list of token id lists, each a prompt with its continuation."""
    stock_attention: str = field(default="TRITON_ATTN", init=False)
    """vLLM's attention backend for the rows that are on no tree; settled by `select_attention_backend`."""

    def __post_init__(self):
        """Replaces the base class's: no method detection by substrings of the path. Raises ValueError."""
        target = self.target_model_config
        self._refuse_options()
        self.prompt_lookup_max = self.prompt_lookup_min = 0
        head = load_head_config(self.model, self.revision)
        check_servable(head)
        self._resolve_tree(head)
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
            max_model_len=self.max_model_len,
            spec_target_max_model_len=target.max_model_len,
            enforce_eager=target.enforce_eager,
            max_logprobs=target.max_logprobs,
            config_format=target.config_format,
        )
        tp = self.target_parallel_config.tensor_parallel_size
        if self.draft_tensor_parallel_size not in (None, tp):
            raise ValueError(
                f"kvspec shards the head as the target's KV heads are sharded: draft_tensor_parallel_size must be {tp}"
                f"; found {self.draft_tensor_parallel_size}. Leave the key out."
            )
        self.draft_tensor_parallel_size = tp
        self.draft_parallel_config = self.create_draft_parallel_config(
            self.target_parallel_config, tp, self.draft_model_config
        )

    def _refuse_options(self) -> None:
        """SpeculativeConfig's own keys that do not go with sample-and-walk verification."""
        refusals = {
            "rejection_sample_method": self.rejection_sample_method not in ("standard", "synthetic"),
            "draft_sample_method": self.draft_sample_method != "greedy",
            "enable_adaptive_verification": self.enable_adaptive_verification,
            "parallel_drafting": self.parallel_drafting,
            "use_heterogeneous_vocab": self.use_heterogeneous_vocab,
            "use_local_argmax_reduction": self.use_local_argmax_reduction,
            "quantization": self.quantization is not None,
            "attention_backend": self.attention_backend is not None,
            "kv_cache_dtype": self.kv_cache_dtype is not None,
        }
        for key, set_by_user in refusals.items():
            if set_by_user:
                raise ValueError(
                    f"kvspec does not support {key!r} in the speculative config; found {getattr(self, key)!r}. "
                    "Verification samples the target's own token at every tree node and accepts equal tokens only, "
                    "with no draft probabilities. Leave the key out."
                )
        if self.tree_width < 1:
            raise ValueError(f"kvspec's tree_width must be at least 1; found {self.tree_width}.")
        if self.drafter == "oracle" and not self.oracle_file:
            raise ValueError('kvspec\'s drafter "oracle" needs oracle_file, a JSON list of token id lists; found none.')

    def _resolve_tree(self, head: KVSpecDraftConfig) -> None:
        """Settle ``num_speculative_tokens`` and check that the head can fill the tree."""
        parents = self.parents
        nodes = self.num_speculative_tokens
        if nodes is None:
            nodes = len(parents) if parents else DEFAULT_NODES_PER_POSITION * head.draft_block_size
        if not 1 <= nodes <= MAX_NODES:
            raise ValueError(
                "kvspec's num_speculative_tokens is the number of tree nodes without the root and must be 1 to "
                f"{MAX_NODES} (an ancestor mask is one 64-bit integer); found {nodes}."
            )
        if parents and len(parents) != nodes:
            raise ValueError(
                f"kvspec's tree {self.tree} has {len(parents)} nodes, but num_speculative_tokens is {nodes}. "
                "Give the same number, or leave num_speculative_tokens out."
            )
        depth = max(depths(parents)) if parents else nodes if self.tree == "chain" else 1
        if depth > head.draft_block_size:
            raise ValueError(
                f"kvspec's tree is {depth} deep, but the head {self.model} scores {head.draft_block_size} positions. "
                f"Use a tree of depth {head.draft_block_size} or less, or a head with a larger draft_block_size."
            )
        available = num_candidates(head.draft_block_size, TREE_BEAM, self.tree_width)
        width = max(Counter(parents).values()) if parents else 1 if self.tree == "chain" else self.tree_width
        if width > head.draft_vocab_size:
            raise ValueError(
                f"kvspec's tree gives a node {width} children, but the head {self.model} scores "
                f"{head.draft_vocab_size} tokens. Use a narrower tree."
            )
        if self.tree == "auto" and nodes > available:
            raise ValueError(
                f"kvspec's num_speculative_tokens {nodes} is more than the {available} candidates of a head of block "
                f"size {head.draft_block_size} with tree_width {self.tree_width}. Raise tree_width or lower "
                "num_speculative_tokens."
            )
        self.num_speculative_tokens = nodes
        self._resolve_synthetic(nodes, min(nodes, head.draft_block_size) if self.tree == "auto" else depth)

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

    @property
    def budget_sizes(self) -> list[int]:
        """Numbers of nodes, ascending from 0, that the budget may choose."""
        return sorted({0, *(nodes for _, _, nodes in self.num_speculative_tokens_per_batch_size or [])})

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


def load_head_config(model: str | None, revision: str | None) -> KVSpecDraftConfig:
    """The head's config.json, with its weight files' headers checked when they are local. Raises ValueError."""
    if not model:
        raise ValueError('kvspec needs a draft head: give "model", a head\'s directory or repository; found none.')
    try:
        head = AutoConfig.from_pretrained(model, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"kvspec's model must be a draft head's directory or repository; {model!r} could not be read as one: "
            f"{error}"
        ) from error
    if not isinstance(head, KVSpecDraftConfig):
        raise ValueError(
            f"kvspec's model must be a draft head (model_type {KVSpecDraftConfig.model_type!r}); {model!r} is a "
            f"{head.model_type!r} model. Train a head for your target with `vllm-kvspec train`."
        )
    for path in sorted(Path(model).glob("*.safetensors")):
        check_safetensors(path)
    if Path(model).is_dir() and not any(Path(model).glob("*.safetensors")):
        raise ValueError(f"kvspec's draft head {model!r} has a config.json but no *.safetensors file. Copy it whole.")
    return head


def check_safetensors(path: Path) -> None:
    """Raise ValueError when the file's header or length is broken. Reads the header only."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"The draft head's weights {path} are damaged or cut short ({error}). Copy the file again."
        ) from error


def check_servable(head: KVSpecDraftConfig) -> None:
    """Raise ValueError for heads that need more context than the target's KV cache as it lies there."""
    if head.has_own_context:
        raise ValueError(
            f"kvspec serves heads that read only the target's KV cache; {head.name_or_path} (context {head.context!r}, "
            f"fusion {head.fusion!r}) needs a context cache of its own. It can be evaluated, not served: train a head "
            'with context "kv" or "hybrid" and fusion "direct".'
        )
    if head.fusion != "direct":
        raise ValueError(
            f"kvspec serves heads whose layers each read one target layer as it lies in the cache; "
            f"{head.name_or_path} (fusion {head.fusion!r}) reads a mix of layers {head.target_kv_layer_ids}. It can be "
            'evaluated, not served: train a head with fusion "direct".'
        )


def check_head_fits(head: KVSpecDraftConfig, target: ModelConfig) -> None:
    """Raise ValueError when the head was trained for another target than ``target``."""
    tokenizer = None
    if not target.skip_tokenizer_init:
        from vllm.tokenizers import cached_tokenizer_from_config

        tokenizer = cached_tokenizer_from_config(target)
    found = target_fingerprint(target.hf_text_config, tokenizer)
    found["name_or_path"] = target.model
    check_fingerprint(head, found)


def refuse_engine_options(engine_args: Any, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise ValueError for the first engine option that kvspec cannot serve with."""
    model_kind = (
        "multi-head latent attention"
        if model.use_mla
        else "encoder-decoder"
        if model.is_encoder_decoder
        else "hybrid or state-space layers"
        if model.is_hybrid or model.is_attention_free
        else "M-RoPE"
        if model.uses_mrope
        else "diffusion"
        if model.is_diffusion
        else "reference sliding-window attention"
        if model.rswa_window is not None
        else "a bidirectional prefix"
        if model.is_mm_prefix_lm
        else None
    )
    if model_kind:
        raise ValueError(
            f"kvspec needs a decoder whose KV cache is plain attention; {model.model} has {model_kind}. "
            "Serve it without speculation or with another method."
        )
    cache_dtype = resolve_kv_cache_dtype_string(engine_args.kv_cache_dtype, model)
    cache_dtypes = CPU_CACHE_DTYPES if current_platform.is_cpu() else CACHE_DTYPES
    options = [
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size, parallel.pipeline_parallel_size > 1),
        (
            "--prefill-context-parallel-size",
            parallel.prefill_context_parallel_size,
            parallel.prefill_context_parallel_size > 1,
        ),
        (
            "--decode-context-parallel-size",
            parallel.decode_context_parallel_size,
            parallel.decode_context_parallel_size > 1,
        ),
        ("--enable-dbo", True, parallel.enable_dbo),
        ("--enable-batch-sharded-sampling", True, parallel.enable_batch_sharded_sampling),
        ("--kv-transfer-config", "a connector", engine_args.kv_transfer_config is not None),
        ("--watermark-config", "a watermark", getattr(engine_args, "watermark_config", None) is not None),
        ("--kv-sharing-fast-prefill", True, engine_args.kv_sharing_fast_prefill),
        ("--kv-cache-dtype", cache_dtype, cache_dtype not in cache_dtypes),
        # The head shares the embedding and the LM head; vLLM's adapters map their rows by the target's batch.
        ("--enable-lora", True, engine_args.enable_lora),
        ("--worker-cls", parallel.worker_cls, parallel.worker_cls not in ("auto", CUDA_WORKER, CPU_WORKER)),
        ("--return-sampling-mask", True, getattr(model, "return_sampling_mask", False)),
        ("--enable-trace-replay", True, getattr(model, "enable_trace_replay", False)),
    ]
    for flag, value, set_by_user in options:
        if set_by_user:
            raise ValueError(
                f"kvspec does not support {flag}; found {value}. Leave the flag out, or serve without kvspec."
            )


def select_attention_backend(engine_args: Any, config: KVSpecConfig) -> None:
    """Choose our tree attention backend on CUDA, over FlashAttention where vLLM would choose that, else over Triton.

    ``--attention-backend FLASH_ATTN`` or ``TRITON_ATTN`` asks for one of them. On CPU the worker overrides CPU_ATTN.
    Raises ValueError for other backends.
    """
    if current_platform.is_cpu():
        return
    asked = engine_args.attention_backend or engine_args.attention_config.backend
    name = str(getattr(asked, "name", asked)).upper()
    # The same arguments may be turned into a config more than once.
    if name == "CUSTOM":
        name = getattr(engine_args, "kvspec_stock_attention", "AUTO")
    if name in ("NONE", "AUTO"):
        name = "FLASH_ATTN" if _prefers_flash_attention(engine_args, config.target_model_config) else "TRITON_ATTN"
    if name not in CUDA_BACKENDS:
        raise ValueError(
            f"kvspec verifies trees with its own kernel and runs all other rows on {' or '.join(CUDA_BACKENDS)}; found "
            f"--attention-backend {name}. Leave the flag out, or give one of the two."
        )
    config.stock_attention = engine_args.kvspec_stock_attention = name
    register_cuda_backend(name)
    engine_args.attention_backend = None
    engine_args.attention_config.backend = AttentionBackendEnum.CUSTOM


def _prefers_flash_attention(engine_args: Any, target: ModelConfig) -> bool:
    """Whether FlashAttention leads vLLM's list for this GPU and can run this model (``CudaPlatform``, vLLM 0.32)."""
    from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend

    cache_dtype = resolve_kv_cache_dtype_string(engine_args.kv_cache_dtype, target)
    return (
        current_platform.get_device_capability().major != 10
        and target.dtype in FlashAttentionBackend.supported_dtypes
        and FlashAttentionBackend.supports_head_size(target.get_head_size())
        and FlashAttentionBackend.supports_kv_cache_dtype(cache_dtype)
    )


def select_budget(engine_args: Any, config: KVSpecConfig, parallel: ParallelConfig) -> None:
    """Settle ``budget``: for "auto", select our scheduler and the sizes it chooses from. Raises ValueError."""
    if config.num_speculative_tokens_per_batch_size is not None:
        config.budget = "fixed"
    if config.budget == "fixed":
        if config.budget_costs:
            raise ValueError(
                f'kvspec\'s budget_costs {config.budget_costs!r} needs budget "auto" and no '
                "num_speculative_tokens_per_batch_size. Leave one of them out."
            )
        return
    if parallel.data_parallel_size > 1:
        logger.info("kvspec: budget is fixed, because data-parallel ranks must verify equally many nodes")
        config.budget = "fixed"
        return
    if current_platform.is_cpu() and not config.budget_costs:
        logger.info("kvspec: budget is fixed, because nothing is known about this CPU's step costs")
        config.budget = "fixed"
        return
    if engine_args.scheduler_cls not in (None, SCHEDULER):
        raise ValueError(
            f'kvspec\'s budget "auto" needs its own scheduler; found --scheduler-cls {engine_args.scheduler_cls}. '
            'Leave the flag out, or set "budget" to "fixed" in the speculative config.'
        )
    # Refuses a malformed profile now, not in the scheduler.
    Acceptance(getattr(config.draft_model_config.hf_config, "acceptance_profile", None))
    ceiling = config.num_speculative_tokens
    sizes = budget_sizes(ceiling)
    if config.budget_costs:
        sizes = [nodes for nodes in reversed(read_costs(config.budget_costs).nodes) if nodes <= ceiling]
    max_batch = engine_args.max_num_seqs or DEFAULT_MAX_NUM_SEQS
    config.num_speculative_tokens_per_batch_size = graph_schedule(sizes, max_batch)
    engine_args.scheduler_cls = SCHEDULER


def create_kvspec_config(
    engine_args: Any, target_model_config: ModelConfig, target_parallel_config: ParallelConfig
) -> KVSpecConfig:
    """What ``EngineArgs.create_speculative_config`` returns for ``method="kvspec"``.

    Merges ``--spec-method/--spec-model/--spec-tokens`` as vLLM does, refuses what cannot work, selects our worker and
    attention backend, and logs one line. Raises ValueError (pydantic's for unknown keys).
    """
    settings = {key.replace("-", "_"): value for key, value in (engine_args.speculative_config or {}).items()}
    flags = (
        ("--spec-method", "method", engine_args.spec_method),
        ("--spec-model", "model", engine_args.spec_model),
        ("--spec-tokens", "num_speculative_tokens", engine_args.spec_tokens),
    )
    for flag, key, value in flags:
        if value is None:
            continue
        if key in settings:
            raise ValueError(f"{flag} and --speculative-config['{key}'] are mutually exclusive; give one of them.")
        settings[key] = value

    refuse_engine_options(engine_args, target_model_config, target_parallel_config)
    kvspec = KVSpecConfig(
        **settings, target_model_config=target_model_config, target_parallel_config=target_parallel_config
    )
    select_attention_backend(engine_args, kvspec)
    select_budget(engine_args, kvspec, target_parallel_config)
    target_parallel_config.worker_cls = CPU_WORKER if current_platform.is_cpu() else CUDA_WORKER
    head = kvspec.draft_model_config.hf_config
    logger.info(
        "kvspec %s: target=%s head=%s context=%s target_kv_layers=%s block=%d tree=%s nodes=%d draft_noise=%s "
        "drafter=%s budget=%s",
        __version__,
        target_model_config.model,
        kvspec.model,
        head.context,
        head.target_kv_layer_ids,
        head.draft_block_size,
        kvspec.tree,
        kvspec.num_speculative_tokens,
        kvspec.draft_noise,
        kvspec.drafter,
        kvspec.budget,
    )
    return kvspec
