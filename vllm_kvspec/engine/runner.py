# SPDX-License-Identifier: Apache-2.0
"""Overrides of Model Runner V2, the same for CUDA and CPU.

One step: ``prepare_attn`` turns flat positions of tree rows into depth positions and publishes the ancestor masks; the
target's forward verifies every row; ``sample`` walks the tree and moves the accepted KV rows to contiguous slots; vLLM
then updates the request states and calls the speculator. Nothing here waits for the device.
"""

import numpy as np
import torch
from vllm.logger import init_logger
from vllm.sampling_params import SamplingParams
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.bad_words import BadWordsState
from vllm.v1.worker.gpu.sample.logit_bias import LogitBiasState
from vllm.v1.worker.gpu.sample.penalties import PenaltiesState

from vllm_kvspec.engine import ops
from vllm_kvspec.engine.budget.step_costs import MeasuresStepCosts
from vllm_kvspec.engine.target_kv import cache_classes, check_groups
from vllm_kvspec.engine.verify.attention import HasTreeState
from vllm_kvspec.engine.verify.decode_graphs import plan_decode_graphs
from vllm_kvspec.engine.verify.sampler import TreeRejectionSampler

logger = init_logger("vllm.kvspec.runner")

# vLLM's own logits processors. `needs_chain` knows for which requests they depend on the order of the drafts.
VLLM_PROCESSORS = (LogitBiasState, PenaltiesState, BadWordsState)


def needs_chain(params: SamplingParams | None) -> bool:
    """Whether sampling depends on the linear order of the drafts, so that the request must get a chain.

    Penalties, bad words and thinking budgets read the drafts before a row as its prefix; structured outputs validate
    and mask them as one sequence (vllm/v1/worker/gpu/sample/{penalties,bad_words,thinking_budget}.py and
    vllm/v1/worker/gpu/structured_outputs.py).
    """
    if params is None:
        return False
    return bool(
        params.structured_outputs is not None
        or params.repetition_penalty != 1.0
        or params.frequency_penalty != 0.0
        or params.presence_penalty != 0.0
        or params.bad_words
        or params.thinking_token_budget is not None
    )


def check_backend(group) -> None:
    """Raise ValueError if vLLM gave some layers another backend, or blocks that are not the cache's."""
    if not all(isinstance(builder, HasTreeState) for builder in group.metadata_builders):
        raise ValueError(
            f"kvspec needs its own attention backend on every layer; {group.layer_names[0]} has "
            f"{group.backend.__name__}. Leave backend_per_kind out of --attention-config, or serve without kvspec."
        )
    if group.kernel_block_size is not None:
        raise ValueError(
            f"kvspec needs an attention kernel with the KV cache's block size, {group.kv_cache_spec.block_size}; "
            f"found {group.kernel_block_size}. Pass --block-size {group.kernel_block_size}."
        )


class KVSpecRunnerMixin(MeasuresStepCosts):
    """Put before GPUModelRunner or CPUModelRunner in the bases."""

    # Of the batch that was prepared last, until its adapters are set: where the rows of logits of its requests begin.
    _first_logits: np.ndarray | None = None

    def load_model(self, *args, **kwargs) -> None:
        super().load_model(*args, **kwargs)
        self.tree_state = self.speculator.state
        # Custom processors see the drafts in linear order, for every request. They come by flag or as a plugin.
        has_custom = any(not isinstance(p, VLLM_PROCESSORS) for p in self.sampler.logits_processors)
        only_chains = has_custom or self.speculative_config.tree == "chain"
        self.tree_state.only_chains = only_chains
        self.rejection_sampler = TreeRejectionSampler(
            self.sampler, self.speculative_config, self.device, self.tree_state
        )
        self.speculator.set_sampler(self.rejection_sampler)
        # As the head's own tables: restored after sleep at level 2.
        self.speculator.model.register_buffer(
            "synthetic_rates", self.rejection_sampler.synthetic_conditional_rates, persistent=False
        )
        self._warn_if_budget_is_short()

    def _warn_if_budget_is_short(self) -> None:
        """A step that cannot hold every request's tree gets trimmed trees, and leaves the decode CUDA graphs."""
        rows = self.max_num_reqs * (self.num_speculative_steps + 1)
        if self.max_num_tokens < rows and self.speculative_config.budget == "fixed":
            logger.warning(
                "kvspec verifies %d rows when all %d requests have a tree, but max_num_batched_tokens is %d: trees "
                "will be trimmed. Raise --max-num-batched-tokens, or lower --max-num-seqs or num_speculative_tokens.",
                rows,
                self.max_num_reqs,
                self.max_num_tokens,
            )

        longest = self.compilation_config.max_cudagraph_capture_size or 0
        if 0 < longest < rows and self.speculative_config.budget == "fixed":
            logger.info(
                "kvspec: decoding with more than %d trees in a batch runs without full CUDA graphs; raise "
                "--max-cudagraph-capture-size (%d) for more.",
                longest // (self.num_speculative_steps + 1),
                longest,
            )

    def reload_weights(self, *args, **kwargs) -> None:
        super().reload_weights(*args, **kwargs)
        self.speculator.weights_changed()

    def initialize_kv_cache(self, kv_cache_config, *args, **kwargs) -> None:
        check_groups(kv_cache_config)
        # The small cache that vLLM measures CUDA graphs with must be free before the real one is allocated.
        self.cache_classes = []
        self.speculator.release_target_kv()
        super().initialize_kv_cache(kv_cache_config, *args, **kwargs)
        if self.cudagraph_manager is not None:
            plan_decode_graphs(self.cudagraph_manager, self.speculative_config)
        context = self.compilation_config.static_forward_context
        self.cache_classes = cache_classes(self.kv_cache_config, context)
        self.speculator.bind_target_kv(self.kv_cache_config, context)
        for groups in self.attn_groups:
            for group in groups:
                check_backend(group)
                for builder in group.metadata_builders:
                    builder.tree_state = self.tree_state

    def capture_model(self, *args, **kwargs) -> int:
        # Which kernel a graph holds must not depend on the batch that ran last.
        self.tree_state.clear_batch()
        return super().capture_model(*args, **kwargs)

    def add_requests(self, scheduler_output) -> None:
        super().add_requests(scheduler_output)
        new = scheduler_output.scheduled_new_reqs
        if new:
            rows = [self.req_states.req_id_to_index[request.req_id] for request in new]
            chain = [self.tree_state.only_chains or needs_chain(request.sampling_params) for request in new]
            self.tree_state.add_requests(rows, chain)
            self.speculator.add_requests(rows, new)

    def prepare_attn(self, input_batch: InputBatch):
        # Slots come from flat positions, so vLLM computes them before the positions are rewritten.
        block_tables, slot_mappings = super().prepare_attn(input_batch)
        self._first_logits = input_batch.cu_num_logits_np
        state = self.tree_state
        if input_batch.num_draft_tokens == 0:
            state.clear_batch()
            return block_tables, slot_mappings
        state.num_draft_reqs = int(np.flatnonzero(np.diff(input_batch.cu_num_logits_np) > 1)[-1]) + 1
        ops.tree_inputs(
            input_batch.positions,
            input_batch.logits_indices,
            input_batch.cu_num_logits,
            input_batch.idx_mapping,
            state.depth,
            state.ancestor_mask,
            batch_mask=state.batch_mask,
            batch_len=state.batch_len,
            local_pos=state.local_pos,
        )
        return block_tables, slot_mappings

    def _set_active_loras(self, prompt_lora_mapping: tuple[int, ...], *args, **kwargs) -> None:
        """``prompt_lora_mapping``: the adapter of every row of logits. vLLM gives one row a request, which holds
        without drafts only (``LoraState.make_lora_inputs``); an adapter of the LM head needs them all."""
        if self._first_logits is not None:
            prompt_lora_mapping = tuple(np.repeat(prompt_lora_mapping, np.diff(self._first_logits)))
            self._first_logits = None
        super()._set_active_loras(prompt_lora_mapping, *args, **kwargs)

    def prepare_dummy_attn(self, input_batch: InputBatch, *args, **kwargs):
        self.tree_state.clear_batch()
        return super().prepare_dummy_attn(input_batch, *args, **kwargs)

    def sample(self, hidden_states: torch.Tensor, input_batch: InputBatch, grammar_output):
        output, num_sampled, num_rejected = super().sample(hidden_states, input_batch, grammar_output)
        if input_batch.num_draft_tokens > 0:
            self._compact_kv(input_batch, num_sampled)
        else:
            self.rejection_sampler.path = self.rejection_sampler.logits = None
        return output, num_sampled, num_rejected

    def _compact_kv(self, input_batch: InputBatch, num_sampled: torch.Tensor) -> None:
        """Move accepted rows to the slots of their true positions, in every target layer."""
        if self.tree_state.only_chains:
            return
        root_rows = input_batch.logits_indices[input_batch.cu_num_logits[:-1].long()]
        base = input_batch.positions[root_rows]
        for cache_class in self.cache_classes:
            ops.kv_compact(
                cache_class.kv_caches,
                cache_class.base_ptrs,
                self.block_tables.input_block_tables[cache_class.group],
                base,
                self.rejection_sampler.path,
                num_sampled,
            )
