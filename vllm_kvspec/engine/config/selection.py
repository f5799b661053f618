# SPDX-License-Identifier: Apache-2.0
"""What ``method="kvspec"`` selects in vLLM: our config, worker, attention backend and scheduler."""

from typing import Any

from vllm.config import ModelConfig, ParallelConfig
from vllm.logger import init_logger
from vllm.platforms import current_platform
from vllm.utils.torch_utils import resolve_kv_cache_dtype_string
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_kvspec import __version__
from vllm_kvspec.config import has_attention_sinks
from vllm_kvspec.engine.budget.choice import Acceptance, acceptance_profile, budget_sizes, read_costs
from vllm_kvspec.engine.config.keys import KVSpecConfig
from vllm_kvspec.engine.config.refusals import CPU_WORKER, CUDA_WORKER, refuse_engine_options, refuse_short_steps
from vllm_kvspec.engine.verify.attention_registry import CUDA_BACKENDS, register_cuda_backend

logger = init_logger("vllm.kvspec.config")

NO_HEAD = "head=none (a head trained for this target, by `vllm-kvspec prepare` and `train`, gets more accepted)"
SCHEDULER = "vllm_kvspec.engine.budget.scheduler.create_scheduler"


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
        # Heads of two sizes vLLM gives to version 4 alone, larger ones only it can serve; we run versions 2 and 3.
        and "head_dim" not in (getattr(target.hf_text_config, "per_layer_attributes", None) or ())
        and target.get_head_size() <= 256
        and FlashAttentionBackend.supports_head_size(target.get_head_size())
        and FlashAttentionBackend.supports_kv_cache_dtype(cache_dtype)
        # Its version 2, which compute capability 8 and 12 run, knows no sinks.
        and (not has_attention_sinks(target.hf_text_config) or FlashAttentionBackend.supports_sink())
    )


def keep_head_while_asleep(target: ModelConfig) -> None:
    """After sleep at level 2 vLLM's user loads the target's weights again; nobody would load the head's."""
    if "draft.*" not in target.sleep_preserve_parameter_names:
        target.sleep_preserve_parameter_names = [*target.sleep_preserve_parameter_names, "draft.*"]


def select_budget(engine_args: Any, config: KVSpecConfig, parallel: ParallelConfig) -> None:
    """Settle ``budget``, for "auto" with the sizes to choose from, and select our scheduler unless the user named one.

    Raises ValueError.
    """
    _settle_budget(engine_args, config, parallel)
    # With a schedule vLLM's scheduler does not fill up to a whole tree.
    if config.num_speculative_tokens_per_batch_size is None:
        refuse_short_steps(engine_args, config.num_speculative_tokens)
    if engine_args.scheduler_cls is None:
        engine_args.scheduler_cls = SCHEDULER


def _settle_budget(engine_args: Any, config: KVSpecConfig, parallel: ParallelConfig) -> None:
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
    if engine_args.scheduler_cls not in (None, SCHEDULER):
        raise ValueError(
            f'kvspec\'s budget "auto" needs its own scheduler; found --scheduler-cls {engine_args.scheduler_cls}. '
            'Leave the flag out, or set "budget" to "fixed" in the speculative config.'
        )
    # Refuses a malformed profile now, not in the scheduler.
    Acceptance(acceptance_profile(config.head_config))
    ceiling = config.num_speculative_tokens
    sizes = budget_sizes(ceiling)
    if config.budget_costs:
        sizes = [nodes for nodes in reversed(read_costs(config.budget_costs).nodes) if nodes <= ceiling]
    config.auto_sizes = sorted(sizes)
    # Has vLLM ask a table for the number of drafts. Ours takes its place (NodesByLoad); to vLLM it looks as if there
    # were plain decode steps only, so its list of graph sizes is the one without kvspec.
    config.num_speculative_tokens_per_batch_size = [(1, 1, 0)]


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
    keep_head_while_asleep(target_model_config)
    select_attention_backend(engine_args, kvspec)
    select_budget(engine_args, kvspec, target_parallel_config)
    target_parallel_config.worker_cls = CPU_WORKER if current_platform.is_cpu() else CUDA_WORKER
    _log_choice(kvspec)
    return kvspec


def _log_choice(kvspec: KVSpecConfig) -> None:
    head = kvspec.head_config
    described = (
        NO_HEAD
        if head is None
        else (
            f"head={kvspec.model} context={head.context} target_kv_layers={head.target_kv_layer_ids} "
            f"block={head.draft_block_size}" + " graft" * kvspec.graft
        )
    )
    logger.info(
        "kvspec %s: target=%s %s tree=%s nodes=%d draft_noise=%s drafter=%s budget=%s",
        __version__,
        kvspec.target_model_config.model,
        described,
        kvspec.tree,
        kvspec.num_speculative_tokens,
        kvspec.draft_noise,
        kvspec.drafter,
        kvspec.budget,
    )
