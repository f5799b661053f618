# SPDX-License-Identifier: Apache-2.0
"""Puts the kernels of this package in the place of vLLM's, by name, and an error in the place of all others.

Without a GPU vLLM has no Triton: ``triton.jit`` leaves a plain function, which cannot be launched. (One function is
replaced that is no kernel, for its speed: see ``top_p.py``.) Import ``vllm.v1.worker.cpu.shm`` before this module: it
replaces torch.cuda's streams before the model runner sees them.
"""

import importlib
import inspect
import sys
from collections.abc import Callable
from functools import partial

import vllm.v1.sample.ops.topk_topp_sampler as topk_topp_sampler
from vllm.triton_utils import triton
from vllm.triton_utils.dispatcher import KernelOverride
from vllm.utils.math_utils import next_power_of_2

from vllm_kvspec.engine.cpu.kernels import (
    block_table,
    gumbel,
    input_batch,
    logits,
    memory,
    outputs,
    thinking,
    top_p,
)

_GPU = "vllm.v1.worker.gpu."

KERNELS: dict[str, Callable[..., None]] = {
    _GPU + "block_table._compute_slot_mappings_kernel": block_table.compute_slot_mappings,
    _GPU + "buffer_utils._apply_write_kernel": block_table.apply_write,
    _GPU + "input_batch._prepare_prefill_inputs_kernel": input_batch.prepare_prefill_inputs,
    _GPU + "input_batch._prepare_pos_seq_lens_kernel": input_batch.prepare_pos_seq_lens,
    _GPU + "input_batch._combine_sampled_and_draft_tokens_kernel": input_batch.combine_sampled_and_draft_tokens,
    _GPU + "input_batch._get_num_sampled_and_rejected_kernel": input_batch.get_num_sampled_and_rejected,
    _GPU + "input_batch._post_update_kernel": input_batch.post_update,
    _GPU + "input_batch._post_update_num_computed_tokens_kernel": input_batch.post_update_num_computed_tokens,
    _GPU + "input_batch._expand_idx_mapping_kernel": input_batch.expand_idx_mapping,
    _GPU + "metrics.logits._num_nans_kernel": outputs.num_nans,
    _GPU + "model_states.prompt_embeds._apply_prompt_embeds_kernel": memory.apply_prompt_embeds,
    _GPU + "sample.bad_words._bad_words_kernel": logits.bad_words,
    _GPU + "sample.gumbel._gumbel_sample_kernel": gumbel.gumbel_sample,
    _GPU + "sample.gumbel._temperature_kernel": gumbel.temperature,
    _GPU + "sample.logit_bias._bias_kernel": logits.logit_bias,
    _GPU + "sample.logprob._topk_log_softmax_kernel": outputs.topk_log_softmax,
    _GPU + "sample.logprob._ranks_kernel": outputs.ranks,
    _GPU + "sample.logprob._fill_logprob_token_ids_kernel": outputs.fill_logprob_token_ids,
    _GPU + "sample.min_p._min_p_kernel": logits.min_p,
    _GPU + "sample.output._compact_sampling_mask_kernel": outputs.compact_sampling_mask,
    _GPU + "sample.penalties._penalties_kernel": logits.penalties,
    _GPU + "sample.penalties._bincount_kernel": logits.bincount,
    _GPU + "sample.prompt_logprob._prompt_logprobs_token_ids_kernel": input_batch.prompt_logprobs_token_ids,
    _GPU + "sample.thinking_budget._update_committed_marker_cache_kernel": thinking.update_committed_marker_cache,
    _GPU + "sample.thinking_budget._thinking_budget_kernel": thinking.thinking_budget,
    _GPU + "spec_decode.rejection_sampler._flatten_sampled_kernel": outputs.flatten_sampled,
    _GPU + "spec_decode.rejection_sampler._gather_draft_sampled_kernel": outputs.gather_draft_sampled,
    _GPU + "structured_outputs._apply_grammar_bitmask_kernel": logits.grammar_bitmask,
    "vllm.v1.worker.utils._zero_kv_blocks_kernel": memory.zero_kv_blocks,
}

# Implementations whose first argument is the launch grid.
KERNELS_WITH_GRID: dict[str, Callable[..., None]] = {
    _GPU + "block_table._gather_block_tables_kernel": block_table.gather_block_tables,
}

# Why a kernel, or every kernel of a module, has no implementation here.
LEFT_OUT = {
    "cp_utils": "decode context parallelism is refused",
    "mm.rope": "models with M-RoPE are refused",
    "model_states.mamba_hybrid": "models with Mamba layers are refused",
    "model_states.recoverssm": "models with Mamba layers are refused",
    "sample.batch_shard": "batch-sharded sampling is refused",
    "sample.trace_replay": "trace replay is refused",
    "sample.watermark": "watermarks are refused",
    "spec_decode.acceptance_estimator": "adaptive verification is vLLM's own; kvspec has its budget",
    "spec_decode.rejection_sampler_utils": "trees are verified by sample-and-walk",
    "spec_decode.dflash.speculator": "another speculator",
    "spec_decode.dflash2.speculator": "another speculator",
    "spec_decode.multi_module_mtp.speculator": "another speculator",
    "spec_decode.ngram.speculator": "another speculator",
    "spec_decode.standalone_ar.speculator": "another speculator",
    "spec_decode.target_dependent_ar.speculator": "another speculator",
    # 0.33
    "spec_decode.xpress.kernels": "another speculator",
}

_installed = False


class _KeepsGrid(KernelOverride):
    """vLLM's wrapper drops the launch grid."""

    def __getitem__(self, grid):
        return partial(self._impl, grid)


class _CannotLaunch:
    """Stands where a kernel without an implementation was."""

    def __init__(self, name: str, reason: str):
        self.name, self.reason = name, reason

    def __getitem__(self, grid):
        raise NotImplementedError(
            f"vLLM's Triton kernel {self.name} has no CPU equivalent in vllm-kvspec ({self.reason}); "
            "run without the feature that needs it, or on a GPU."
        )


def signature_problem(name: str, implementation: Callable, *, with_grid: bool = False) -> str | None:
    """One sentence when the kernel takes other arguments than its implementation, else None.

    A kernel of an older vLLM may lack the last arguments. Tile sizes concern only the GPU.
    """
    wanted = KernelOverride(_resolve(name), implementation).arg_names
    ours = inspect.signature(implementation).parameters.values()
    positional = [p.name for p in ours if p.kind is p.POSITIONAL_OR_KEYWORD][with_grid:]
    keywords = [p.name for p in ours if p.kind is p.KEYWORD_ONLY]
    arguments = [p for p in wanted if p in positional]
    others = [p for p in wanted if p not in positional and p not in keywords and "BLOCK" not in p and "PADDED" not in p]
    missing = [p.name for p in ours if p.name not in wanted and p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    if others or missing[with_grid:] or arguments != positional[: len(arguments)]:
        return f"{name} takes ({', '.join(wanted)})"
    return None


def _resolve(name: str):
    module, _, attribute = name.rpartition(".")
    return getattr(importlib.import_module(module), attribute)


def _kernels_left_out() -> dict[str, str]:
    """Full name -> reason, of the kernels that this vLLM has in the modules of LEFT_OUT."""
    found = {}
    for path, reason in LEFT_OUT.items():
        try:
            module = importlib.import_module(_GPU + path)
        except ModuleNotFoundError:
            continue
        for attribute, value in vars(module).items():
            if attribute.endswith("_kernel") and inspect.isfunction(value) and value.__module__ == module.__name__:
                found[f"{_GPU}{path}.{attribute}"] = reason
    return found


def install() -> None:
    """In this process, once. Raises RuntimeError if a kernel's arguments are not those of its implementation."""
    global _installed
    if _installed:
        return
    problems = [signature_problem(name, kernel) for name, kernel in KERNELS.items()]
    problems += [signature_problem(name, kernel, with_grid=True) for name, kernel in KERNELS_WITH_GRID.items()]
    if found := [problem for problem in problems if problem]:
        raise RuntimeError(
            f"This vLLM's kernels are not those that vllm-kvspec replaces on CPU: {'; '.join(found)}. "
            "Install the vLLM version named in the README's compatibility table."
        )
    if not hasattr(triton, "next_power_of_2"):
        # Launching functions compute tile sizes with it.
        triton.next_power_of_2 = next_power_of_2
    left_out = _kernels_left_out()
    _replace(
        {name: KernelOverride(_resolve(name), kernel) for name, kernel in KERNELS.items()}
        | {name: _KeepsGrid(_resolve(name), kernel) for name, kernel in KERNELS_WITH_GRID.items()}
        | {name: _CannotLaunch(name, reason) for name, reason in left_out.items()}
    )
    topk_topp_sampler.apply_top_k_top_p_pytorch = top_p.apply_top_k_top_p
    _installed = True


def _replace(replacements: dict) -> None:
    """Wherever a vLLM module holds the kernel.

    As vLLM's ``register_kernels``, which goes through every module of the process and knows neither grids nor errors.
    """
    kernels = {name: _resolve(name) for name in replacements}
    by_kernel = {id(kernels[name]): value for name, value in replacements.items()}
    for module_name, module in list(sys.modules.items()):
        if module_name.startswith("vllm."):
            for attribute, value in list(vars(module).items()):
                if id(value) in by_kernel:
                    setattr(module, attribute, by_kernel[id(value)])
