# SPDX-License-Identifier: Apache-2.0
"""Which vLLM this plugin fits, and a self-check of every name and signature it overrides.

A subclass that overrides a method vLLM has renamed fails silently: the method is simply never called. So the worker
checks, before it builds anything, that each name exists and takes the parameters we rely on.
"""

import inspect
from importlib import import_module

# From the first to below the second. A later vLLM is refused even if the contract below holds: that cannot see what a
# function means. `tools/vllm_changes.py` lists what to read before the bound is raised.
SUPPORTED = ((0, 32), (0, 34))

# (module, attribute path) -> parameters that must be there. Read from vLLM 0.32.0 and 0.33.0. The behaviour of each is
# tested: see tests/engine/test_contract.py.
RUNNER_CONTRACT = {
    ("vllm.v1.worker.gpu.model_runner", "init_speculator"): ("vllm_config", "device", "req_states"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.load_model"): ("self",),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.initialize_kv_cache"): ("self", "kv_cache_config"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.reload_weights"): ("self",),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.capture_model"): ("self",),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.add_requests"): ("self", "scheduler_output"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.prepare_attn"): ("self", "input_batch"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.prepare_dummy_attn"): ("self", "input_batch"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.sample"): (
        "self",
        "hidden_states",
        "input_batch",
        "grammar_output",
    ),
    ("vllm.v1.worker.lora_model_runner_mixin", "LoRAModelRunnerMixin._set_active_loras"): (
        "self",
        "prompt_lora_mapping",
        "token_lora_mapping",
        "lora_requests",
    ),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.execute_model"): ("self", "scheduler_output"),
    ("vllm.v1.worker.gpu.model_runner", "GPUModelRunner.sample_tokens"): ("self", "grammar_output"),
    ("vllm.v1.worker.gpu_worker", "Worker._make_model_runner"): ("self",),
    ("vllm.v1.worker.gpu_worker", "Worker.compile_or_warm_up_model"): ("self",),
    ("vllm.v1.worker.gpu_worker", "Worker.finish_weight_update"): ("self",),
    ("vllm.v1.core.sched.scheduler", "Scheduler.schedule"): ("self",),
    ("vllm.v1.core.sched.scheduler", "Scheduler.update_from_output"): (
        "self",
        "scheduler_output",
        "model_runner_output",
    ),
    ("vllm.v1.core.sched.scheduler", "Scheduler.make_spec_decoding_stats"): (
        "self",
        "spec_decoding_stats",
        "num_draft_tokens",
        "num_accepted_tokens",
    ),
    ("vllm.v1.worker.gpu.spec_decode.rejection_sampler", "RejectionSampler._verify"): (
        "self",
        "logits",
        "draft_logits",
        "draft_sampled",
        "pos",
        "cu_num_logits",
        "idx_mapping",
        "idx_mapping_np",
        "expanded_idx_mapping",
        "expanded_local_pos",
        "seq_lens_upper_bound_np",
        "verify_draft_sampled",
    ),
    ("vllm.v1.worker.gpu.spec_decode.rejection_sampler", "RejectionSampler._get_logprobs_tensors"): (
        "self",
        "sampled",
        "num_sampled",
        "logits",
        "cu_num_logits",
        "cu_num_logits_np",
        "max_num_logprobs",
    ),
    ("vllm.v1.worker.gpu.spec_decode.speculator", "DraftModelSpeculator.set_attn"): (
        "self",
        "model_state",
        "kv_cache_config",
        "block_tables",
    ),
    ("vllm.v1.worker.gpu.cudagraph_utils", "CudaGraphManager._init_candidates"): ("self",),
    ("vllm.v1.worker.gpu.cudagraph_utils", "CudaGraphManager.capture"): ("self", "create_forward_fn"),
    ("vllm.v1.worker.gpu.cudagraph_utils", "CudaGraphManager.dispatch"): (
        "self",
        "num_reqs",
        "num_tokens",
        "uniform_token_count",
        "num_active_loras",
    ),
    **{
        (f"vllm.v1.attention.backends.{module}", f"{name}.{method}"): parameters
        for module, prefix in (("flash_attn", "FlashAttention"), ("triton_attn", "TritonAttention"))
        for name, method, parameters in (
            (f"{prefix}MetadataBuilder", "build", ("self", "common_prefix_len", "common_attn_metadata", "fast_build")),
            (f"{prefix}Impl", "forward", ("self", "layer", "query", "kv_cache", "attn_metadata", "output")),
        )
    },
    ("vllm.v1.worker.gpu.model_runner", "sort_batch_req_ids"): ("num_tokens_per_req", "draft_tokens"),
    ("vllm.v1.worker.gpu.sample.sampler", "Sampler.get_logprobs_dims"): ("self", "idx_mapping_np"),
    ("vllm.v1.worker.gpu.sample.logprob", "compute_topk_scores"): (
        "logits",
        "num_logprobs",
        "sampled_token_ids",
        "cu_num_logits",
        "logprob_token_ids_state",
        "expanded_idx_mapping",
        "max_per_req_token_ids",
        "logits_mode",
    ),
    ("vllm.v1.worker.gpu.sample.gumbel", "gumbel_sample"): (
        "logits",
        "expanded_idx_mapping",
        "temperature",
        "seed",
        "pos",
        "apply_temperature",
        "is_drafting",
        "use_fp64",
    ),
}


def installed_minor() -> tuple[int, int]:
    """(0, 33) for vLLM 0.33.0. To be asked only where the two versions cannot be told apart by what they have."""
    import vllm

    major, minor = vllm.__version__.split(".")[:2]
    return int(major), int(minor)


def version_problem() -> str | None:
    """One sentence when the installed vLLM is outside the supported range, else None."""
    import vllm

    low, high = SUPPORTED
    if low <= installed_minor() < high:
        return None
    return (
        f"vllm-kvspec supports vllm>={low[0]}.{low[1]},<{high[0]}.{high[1]}; found {vllm.__version__}. "
        f"Install `vllm>={low[0]}.{low[1]},<{high[0]}.{high[1]}` or a vllm-kvspec made for your version."
    )


def contract_problems(contract: dict[tuple[str, str], tuple[str, ...]] = RUNNER_CONTRACT) -> list[str]:
    """One line per vLLM name that is missing or no longer takes the parameters listed in ``contract``."""
    problems = []
    for (module, path), parameters in contract.items():
        target = import_module(module)
        for name in path.split("."):
            target = getattr(target, name, None)
            if target is None:
                problems.append(f"{module}.{path} does not exist")
                break
        else:
            missing = [p for p in parameters if p not in inspect.signature(target).parameters]
            if missing:
                problems.append(f"{module}.{path} has no parameter {', '.join(missing)}")
    return problems


def require_contract() -> None:
    """Raise RuntimeError naming what changed in vLLM. Called by the worker, after vLLM's runner can be imported."""
    if problems := contract_problems():
        raise RuntimeError(
            "This vLLM does not have what vllm-kvspec overrides: " + "; ".join(problems) + ". "
            "Install the vLLM version named in the README's compatibility table."
        )
