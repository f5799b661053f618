# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the drafter, one per batch size of ``graph_batches``.

A graph holds everything from the draft rows to the stored trees. vLLM's manager captures and replays it; here is only
which sizes there are, and how many nodes each drafts: the most that its smallest batch may get. A batch is padded to
the next size, by rows that belong to no request; one beyond the largest size is drafted eagerly.
"""

from collections.abc import Callable
from itertools import pairwise

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_kvspec.engine.batch_sizes import graph_batches, max_step_rows


class DrafterGraphs(CudaGraphManager):
    """``dispatch_batch`` says how a batch runs; ``capture_batches`` records, ``run_fullgraph`` replays."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, cudagraph_mode: CUDAGraphMode):
        has_full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if has_full else CUDAGraphMode.NONE
        super().__init__(vllm_config, device, mode, decode_query_len=vllm_config.num_speculative_tokens + 1)

    def _init_candidates(self) -> None:
        """Batch size -> nodes in ``nodes``. Whatever number a target graph verifies, a draft has one row a request."""
        self.nodes: dict[int, int] = {}
        config = self.vllm_config.speculative_config
        largest = self.compilation_config.max_cudagraph_capture_size
        drafting = [nodes for nodes in config.node_sizes if nodes]
        if not self.cudagraph_mode or not largest or not drafting:
            return
        max_rows = max_step_rows(self.vllm_config)
        for below, size in pairwise([0, *graph_batches(min(self.max_num_reqs, largest // (drafting[0] + 1)), 1)]):
            desc = BatchExecutionDescriptor(CUDAGraphMode.FULL, num_tokens=size, num_reqs=size, uniform_token_count=1)
            self.nodes[size] = config.max_nodes(below + 1, max_rows)
            self._candidates.update({(batch, 0): [desc] for batch in range(below + 1, size + 1)})
            # The largest first, as vLLM does: the smaller ones then fit into its memory.
            self._capture_descs.setdefault(CUDAGraphMode.FULL, []).insert(0, desc)

    def dispatch_batch(self, num_reqs: int, nodes: int) -> BatchExecutionDescriptor | None:
        """The graph (``num_reqs`` of it: the padded size) that drafts ``nodes`` nodes for a batch, if there is one."""
        graph = self.dispatch(num_reqs, num_reqs, uniform_token_count=1, num_active_loras=0)
        return graph if graph.cg_mode == CUDAGraphMode.FULL and self.nodes[graph.num_reqs] >= nodes else None

    def capture_batches(self, draft: Callable[[int, bool, int], None]) -> None:
        """``draft(size, False, nodes)`` drafts trees of ``nodes`` nodes for the first ``size`` draft rows. Runs each
        size once before recording it."""
        self.capture(
            lambda desc, warmup: lambda mode: draft(desc.num_reqs, False, self.nodes[desc.num_reqs]),
            "Capturing kvspec drafter CUDA graphs",
        )
