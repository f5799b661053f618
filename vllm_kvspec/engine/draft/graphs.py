# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs of the drafter: one for most batch sizes of the target's decode graphs.

A graph holds everything from the draft rows to the stored trees. vLLM's manager captures and replays it; here is only
which sizes there are. A batch is padded to the next size, by rows that belong to no request; one beyond the largest
size is drafted eagerly.
"""

from collections.abc import Callable

import torch
from vllm.config import CUDAGraphMode, VllmConfig
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

# The most a batch is padded by: a few more rows cost the drafter little, a graph more costs start-up time and memory.
MAX_PADDING = 1.25


def _thinned(sizes: set[int]) -> list[int]:
    """Ascending sizes with the largest; from 5 on without those that a larger one serves within MAX_PADDING."""
    kept: list[int] = []
    for size in sorted(sizes, reverse=True):
        if not kept or size <= 4 or size * MAX_PADDING <= kept[-1]:
            kept.append(size)
    return kept[::-1]


class DrafterGraphs(CudaGraphManager):
    """``dispatch_batch`` says how a batch runs; ``capture_batches`` records, ``run_fullgraph`` replays."""

    def __init__(self, vllm_config: VllmConfig, device: torch.device, cudagraph_mode: CUDAGraphMode):
        has_full = cudagraph_mode.decode_mode() == CUDAGraphMode.FULL
        mode = CUDAGraphMode.FULL_DECODE_ONLY if has_full else CUDAGraphMode.NONE
        super().__init__(vllm_config, device, mode, decode_query_len=vllm_config.num_speculative_tokens + 1)

    def _init_candidates(self) -> None:
        """Whatever number of nodes a target graph verifies, a draft has one row per request."""
        super()._init_candidates()
        decode = self._capture_descs.pop(CUDAGraphMode.FULL, [])
        sizes = _thinned({desc.num_reqs for desc in decode if desc.uniform_token_count > 1})
        self._candidates.clear()
        for below, size in zip([0, *sizes], sizes, strict=False):
            desc = BatchExecutionDescriptor(CUDAGraphMode.FULL, num_tokens=size, num_reqs=size, uniform_token_count=1)
            self._candidates.update({(batch, 0): [desc] for batch in range(below + 1, size + 1)})
            # The largest first, as vLLM does: the smaller ones then fit into its memory.
            self._capture_descs.setdefault(CUDAGraphMode.FULL, []).insert(0, desc)

    def dispatch_batch(self, num_reqs: int) -> BatchExecutionDescriptor:
        """The graph (``num_reqs`` of it: the padded size) for a batch, or mode NONE with the batch's own size."""
        return self.dispatch(num_reqs, num_reqs, uniform_token_count=1, num_active_loras=0)

    def capture_batches(self, draft: Callable[[int], None]) -> None:
        """``draft(size)`` drafts for the first ``size`` draft rows. Runs each size once before recording it."""
        self.capture(lambda desc, warmup: lambda mode: draft(desc.num_reqs), "Capturing kvspec drafter CUDA graphs")
