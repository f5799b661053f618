# SPDX-License-Identifier: Apache-2.0
"""Proposes a tree per request from the target's own KV cache. Called by vLLM after each verification step."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.model_executor.model_loader import get_model
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_kvspec.engine import ops
from vllm_kvspec.engine.speculative_config import TREE_BEAM
from vllm_kvspec.engine.target_kv import PagedLayer, layers_by_index, paged_layer
from vllm_kvspec.engine.tree_state import TreeState
from vllm_kvspec.kernels.reference_candidates import Candidates
from vllm_kvspec.tree import ancestor_masks, depths, fixed_levels, plan_levels


class KVSpecSpeculator(DraftModelSpeculator):
    """vLLM's interface for draft models, without draft KV: the head reads the target's blocks in place."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states):
        super().__init__(vllm_config, device)
        config = vllm_config.speculative_config
        self.req_states = req_states
        self.state = TreeState(self.max_num_reqs, self.num_speculative_steps, device)
        self.coupled = config.draft_noise == "coupled"
        # A chain is the tree of one child per node.
        beam, width = (1, 1) if config.tree == "chain" else (TREE_BEAM, config.tree_width)
        block_size = self.draft_model_config.hf_config.draft_block_size
        self.levels, self.chain_levels = plan_levels(block_size, beam, width), plan_levels(block_size, 1, 1)
        self.target_layers: list[PagedLayer] = []
        self.parents = config.parents
        if self.parents:
            self.levels, self.fixed_nodes = fixed_levels(self.parents, device)
            shape = ([0, *self.parents], depths(self.parents))
            self.fixed_parent, self.fixed_depth = (torch.tensor(x, dtype=torch.int32, device=device) for x in shape)
            self.fixed_mask = torch.tensor(ancestor_masks(self.parents), dtype=torch.int64, device=device)
        self.test_drafter = None
        if config.drafter != "head":
            from vllm_kvspec.engine.drafters import TestDrafter

            self.test_drafter = TestDrafter(config, req_states, self.vocab_size)

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        self.target_model = target_model
        return get_model(vllm_config=self.vllm_config, model_config=self.draft_model_config, prefix="draft")

    def set_sampler(self, rejection_sampler) -> None:
        """The accepted path of the last verification is read from it."""
        self.rejection_sampler = rejection_sampler

    def bind_target_kv(self, kv_cache_config, static_forward_context: dict) -> None:
        """Find the target layers the head reads. Called whenever KV caches are (re)allocated. Raises ValueError."""
        names = layers_by_index(kv_cache_config)
        wanted = self.model.config.target_kv_layer_ids
        if missing := [i for i in wanted if i not in names]:
            raise ValueError(
                f"The kvspec head reads the KV of target layers {wanted}, but layers {missing} have no KV cache of "
                f"their own here; layers that do: {sorted(names)}. Use a head trained for this target."
            )
        self.target_layers = [paged_layer(*names[i], static_forward_context) for i in wanted]

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        """The drafter runs eagerly."""

    def capture(self) -> None:
        """The drafter runs eagerly: nothing to capture."""

    def propose(
        self,
        input_batch: InputBatch,
        attn_metadata: dict[str, Any],
        slot_mappings: dict[str, torch.Tensor],
        last_hidden_states: torch.Tensor,
        aux_hidden_states: list[torch.Tensor] | None,
        num_sampled: torch.Tensor,
        num_rejected: torch.Tensor,
        last_sampled: torch.Tensor,
        next_prefill_tokens: torch.Tensor,
        temperature: torch.Tensor,
        seeds: torch.Tensor,
        dp_sync_state=None,
        dummy_run: bool = False,
        skip_attn_for_dummy_run: bool = False,
        mm_inputs=None,
        is_profile: bool = False,
        num_speculative_tokens: int | None = None,
    ) -> torch.Tensor:
        """Draft tokens int64 [B, N], every entry a valid id; the trees' shapes go to ``self.state``.

        When it is called, ``num_computed_tokens`` has advanced past the accepted tokens: target KV is valid for
        positions [0, base) and the anchor, at position ``base``, has none yet.
        """
        num_reqs, idx_mapping = input_batch.num_reqs, input_batch.idx_mapping
        # The load allows no nodes: no pass of the head either. It has no state that could fall behind.
        if dummy_run or not self.target_layers or num_speculative_tokens == 0:
            return self.draft_tokens[:num_reqs].zero_()
        if self.test_drafter is not None:
            return self._propose_test_trees(idx_mapping)
        base = self.req_states.num_computed_tokens.gpu[idx_mapping]
        anchor = last_sampled[idx_mapping, 0]
        state = last_hidden_states[self._last_accepted_rows(input_batch, num_sampled)]
        rows = self.model.block_rows(self.target_model.embed_input_ids(anchor), state)
        hidden = self.model(rows, base, self.target_layers, self.block_tables.input_block_tables)
        logits = self.target_model.compute_logits(hidden.flatten(0, 1)).view(num_reqs, hidden.shape[1], -1)
        logits = logits[..., : self.vocab_size]
        expand = partial(
            ops.tree_candidates, logits, anchor, self.model.transition_in.weight, self.model.transition_out.weight,
            base=base, idx_mapping=idx_mapping, temperature=temperature, seeds=seeds, coupled=self.coupled,
            greedy_scale=self.model.config.greedy_scale,
        )  # fmt: skip
        return self._build_trees(expand, input_batch)

    def _last_accepted_rows(self, input_batch: InputBatch, num_sampled: torch.Tensor) -> torch.Tensor:
        """Row of the hidden states at position base - 1: the node whose sample became the anchor. int64 [B]."""
        first = input_batch.cu_num_logits[:-1].long()
        path = self.rejection_sampler.path
        if path is not None:
            last = (num_sampled.long() - 1).clamp(min=0)
            first = first + path.gather(1, last[:, None])[:, 0]
        return input_batch.logits_indices[first]

    def _build_trees(self, expand: Callable[..., Candidates], input_batch: InputBatch) -> torch.Tensor:
        """Draft tokens [B, N]; stores the shapes. ``expand`` lacks only the levels and chains."""
        if self.parents is None:
            candidates = expand(levels=self.levels, chain=self.state.chain.gpu)
            tokens, *shape = ops.tree_build(*candidates, self.num_speculative_steps)
        else:
            tokens, *shape = self._fixed_trees(expand, input_batch)
        self.state.store(input_batch.idx_mapping, *shape)
        return tokens

    def _fixed_trees(self, expand: Callable[..., Candidates], input_batch: InputBatch) -> tuple[torch.Tensor, ...]:
        """Tokens, parent, depth, mask: the user's fixed shape, and chains for the requests that need one."""
        batch = input_batch.num_reqs
        tokens = expand(levels=self.levels).token[:, self.fixed_nodes]
        fixed = (tokens, *(t.expand(batch, -1) for t in (self.fixed_parent, self.fixed_depth, self.fixed_mask)))
        if not self.state.any_chain(input_batch.idx_mapping_np):
            return fixed
        score, token, parent = expand(levels=self.chain_levels)
        # Positions beyond the block carry no scores: -inf candidates continue the chain.
        missing = max(0, self.num_speculative_steps - score.shape[1])
        padded = (pad(score, (0, missing), value=float("-inf")), pad(token, (0, missing)), pad(parent, (0, missing)))
        chains = ops.tree_build(*padded, self.num_speculative_steps)
        is_chain = (self.state.chain.gpu[input_batch.idx_mapping] != 0)[:, None]
        return tuple(torch.where(is_chain, chain, other) for chain, other in zip(chains, fixed, strict=True))

    def _propose_test_trees(self, idx_mapping: torch.Tensor) -> torch.Tensor:
        tokens, parents = self.test_drafter.propose(idx_mapping, self.state.chain.gpu)
        shapes = [([0, *p], depths(p), ancestor_masks(p)) for p in parents]
        dtypes = (torch.int32, torch.int32, torch.int64)
        columns = zip(*shapes, strict=True)
        self.state.store(
            idx_mapping, *(torch.tensor(c, dtype=d, device=self.device) for c, d in zip(columns, dtypes, strict=True))
        )
        return torch.tensor(tokens, dtype=torch.int64, device=self.device)
