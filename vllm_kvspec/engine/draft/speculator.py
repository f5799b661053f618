# SPDX-License-Identifier: Apache-2.0
"""Proposes a tree per request, by a head from the target's own KV cache or without one. Called by vLLM after each
verification step."""

from typing import Any

import torch
from torch import nn
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.model_executor.model_loader import get_model
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.spec_decode.speculator import DraftModelSpeculator

from vllm_kvspec.engine import ops
from vllm_kvspec.engine.batch_sizes import max_step_rows
from vllm_kvspec.engine.draft.adapters import WithoutAdapters
from vllm_kvspec.engine.draft.assistant_drafter import AssistantDrafter
from vllm_kvspec.engine.draft.graphs import DrafterGraphs
from vllm_kvspec.engine.draft.head_drafter import Drafter
from vllm_kvspec.engine.draft.recycle import RecycleDrafter
from vllm_kvspec.engine.target_kv import empty_layer, layers_by_index, paged_layer
from vllm_kvspec.engine.verify.tree_state import TreeState
from vllm_kvspec.kernels.reference_draft_inputs import DraftRows
from vllm_kvspec.tree import ancestor_masks, depths


class KVSpecSpeculator(DraftModelSpeculator):
    """vLLM's interface for draft models, without draft KV: the head reads the target's blocks in place.

    A step gathers ``rows`` (what the drafter needs of each request) and then runs ``draft`` on them, as a CUDA graph
    where there is one for the batch. Rows and outputs (``draft_tokens``, ``state``) keep their addresses.
    """

    def __init__(self, vllm_config: VllmConfig, device: torch.device, req_states):
        super().__init__(vllm_config, device)
        config = vllm_config.speculative_config
        self.req_states = req_states
        self.max_rows = max_step_rows(vllm_config)
        self.state = TreeState(self.max_num_reqs, self.num_speculative_steps, device)
        self.rows = self._new_rows(config.head_config)
        # vLLM drops this attribute's value, by its type, between profiling and serving.
        self.graphs: DrafterGraphs | None = None
        self.recycler: RecycleDrafter | None = None
        self.test_drafter = None
        if config.drafter in ("oracle", "random"):
            from vllm_kvspec.engine.draft.test_drafters import TestDrafter

            self.test_drafter = TestDrafter(config, req_states, self.vocab_size)

    def _new_rows(self, head_config) -> DraftRows:
        dtypes = (torch.int64, torch.int32, torch.int64, torch.float32, torch.int64, torch.int32)
        columns = (torch.zeros(self.max_num_reqs, dtype=dtype, device=self.device) for dtype in dtypes)
        if head_config is None or head_config.context == "kv":
            return DraftRows(*columns, None)
        size = (self.max_num_reqs, self.hidden_size)
        return DraftRows(*columns, torch.zeros(size, dtype=self.dtype, device=self.device))

    def load_draft_model(self, target_model: nn.Module, target_attn_layer_names: set[str]) -> nn.Module:
        config = self.vllm_config.speculative_config
        self.without_adapters = WithoutAdapters(target_model)
        if config.head_config is None:
            self.drafter = self.recycler = RecycleDrafter(config, self.req_states, self.device)
            return self.drafter
        head = get_model(
            vllm_config=self.vllm_config,
            model_config=self.draft_model_config,
            prefix="draft",
            # Without one: the target's.
            load_config=config.draft_load_config,
        )
        if config.graft:
            # Part of the head, so that sleep at level 2 restores its buffers.
            head.recycler = self.recycler = RecycleDrafter(config, self.req_states, self.device)
        kind = AssistantDrafter if config.has_assistant else Drafter
        with self.without_adapters:
            self.drafter = kind(config, head, target_model, self.recycler)
        # Until there are KV caches: what the pass that measures memory reads.
        shapes = [(layer.self_attn.num_kv_heads, layer.self_attn.head_dim) for layer in head.layers]
        layers = [empty_layer(*shape, self.dtype, self.device) for shape in shapes]
        self.drafter.bind(layers, [torch.zeros(self.max_num_reqs, 1, dtype=torch.int32, device=self.device)])
        return head

    def set_sampler(self, rejection_sampler) -> None:
        """The accepted path and the logits of the last verification are read from it."""
        self.rejection_sampler = rejection_sampler
        rejection_sampler.keeps_logits = self.recycler is not None

    @torch.inference_mode()
    def weights_changed(self) -> None:
        """The target or the head was given other weights in place."""
        with self.without_adapters:
            self.drafter.weights_changed()

    def add_requests(self, rows: list[int], requests: list) -> None:
        """``requests`` (vLLM's NewRequestData) have got the request states ``rows``."""
        if self.recycler is not None:
            self.recycler.add_requests(rows, requests)

    def release_target_kv(self) -> None:
        """Keep no KV cache alive: a new one is about to be allocated."""
        if self.speculative_config.head_config is not None:
            self.drafter.bind([], [])

    def bind_target_kv(self, kv_cache_config, static_forward_context: dict) -> None:
        """Find the target layers the head reads. Called whenever KV caches are (re)allocated. Raises ValueError."""
        if self.speculative_config.head_config is None:
            return
        names = layers_by_index(kv_cache_config)
        wanted = self.model.config.target_kv_layer_ids
        if missing := [i for i in wanted if i not in names]:
            raise ValueError(
                f"The kvspec head reads the KV of target layers {wanted}, but layers {missing} have no KV cache of "
                f"their own here; layers that do: {sorted(names)}. Use a head trained for this target."
            )
        layers = [paged_layer(*names[i], static_forward_context) for i in wanted]
        self.drafter.bind(layers, self.block_tables.input_block_tables)

    def init_cudagraph_manager(self, cudagraph_mode: CUDAGraphMode) -> None:
        mode = cudagraph_mode if self.test_drafter is None else CUDAGraphMode.NONE
        self.graphs = DrafterGraphs(self.vllm_config, self.device, mode)

    def capture(self) -> None:
        """Called by vLLM after it has captured the target's graphs."""
        self.rows.request.fill_(self.state.padding_request)
        for column in self.rows[1:]:
            if column is not None:
                column.zero_()
        self.graphs.capture_batches(self.draft)

    @torch.inference_mode()
    def draft(self, num_rows: int, with_chains: bool = False, num_nodes: int | None = None) -> None:
        """Trees for the first ``num_rows`` of ``rows``, into ``draft_tokens`` and ``state``; see ``Drafter.trees``."""
        rows = self.rows.first(num_rows)
        with self.without_adapters:
            tokens, *shape = self.drafter.trees(rows, with_chains, num_nodes)
        self.draft_tokens[:num_rows] = tokens
        self.state.store(rows.request, *shape)

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
        positions [0, base) and the anchor, at position ``base``, has none yet. A dummy run drafts for padding only.
        """
        num_reqs = input_batch.num_reqs
        logits = self.rejection_sampler.take_logits()
        if is_profile and self.test_drafter is None:
            self._draft_widest(num_reqs)
            return self.draft_tokens[:num_reqs]
        nodes = num_speculative_tokens
        if nodes is None:
            nodes = self.speculative_config.max_nodes(num_reqs, self.max_rows)
        # The load allows no nodes: no pass of the head either. It has no state that could fall behind.
        if nodes == 0 or (dummy_run and self.test_drafter is not None):
            return self.draft_tokens[:num_reqs].zero_()
        if self.test_drafter is not None:
            return self._propose_test_trees(input_batch.idx_mapping)
        if self.recycler is not None and logits is not None:
            self.recycler.learn(logits, input_batch, self.state.parent)
        del logits
        with_chains = bool(self.drafter.parents) and self.state.any_chain(input_batch.idx_mapping_np)
        how = self._dispatch(num_reqs, nodes, with_chains)
        ops.draft_inputs(
            input_batch.idx_mapping[: 0 if dummy_run else num_reqs],
            self.req_states.num_computed_tokens.gpu,
            last_sampled,
            temperature,
            seeds,
            self.state.chain.gpu,
            num_sampled=num_sampled,
            path=self.rejection_sampler.path,
            cu_num_logits=input_batch.cu_num_logits,
            logits_indices=input_batch.logits_indices,
            hidden_states=last_hidden_states,
            rows=self.rows.first(how.num_reqs),
            padding_request=self.state.padding_request,
        )
        if how.cg_mode == CUDAGraphMode.FULL:
            self.graphs.run_fullgraph(how)
        else:
            self.draft(how.num_reqs, with_chains, nodes)
        return self.draft_tokens[:num_reqs]

    def _draft_widest(self, num_reqs: int) -> None:
        """The most that a step may need, for vLLM to measure: every number of nodes, for all that may get it."""
        self.rows.request.fill_(self.state.padding_request)
        for nodes in filter(None, self.speculative_config.node_sizes):
            batch = int(min(num_reqs, self.speculative_config.max_batch(nodes, self.max_rows)))
            if batch:
                self.draft(batch, bool(self.drafter.parents), nodes)

    def _dispatch(self, num_reqs: int, nodes: int, with_chains: bool) -> BatchExecutionDescriptor:
        eager = BatchExecutionDescriptor(CUDAGraphMode.NONE, num_tokens=num_reqs, num_reqs=num_reqs)
        if with_chains or self.graphs is None:
            return eager
        return self.graphs.dispatch_batch(num_reqs, nodes) or eager

    def _propose_test_trees(self, idx_mapping: torch.Tensor) -> torch.Tensor:
        tokens, parents = self.test_drafter.propose(idx_mapping, self.state.chain.gpu)
        shapes = [([0, *p], depths(p), ancestor_masks(p)) for p in parents]
        dtypes = (torch.int32, torch.int32, torch.int64)
        columns = zip(*shapes, strict=True)
        self.state.store(
            idx_mapping, *(torch.tensor(c, dtype=d, device=self.device) for c, d in zip(columns, dtypes, strict=True))
        )
        return torch.tensor(tokens, dtype=torch.int64, device=self.device)
