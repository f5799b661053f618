# SPDX-License-Identifier: Apache-2.0
"""Makes every captured decode graph reachable when the number of nodes varies."""

from collections import defaultdict

from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager


def cover_query_lengths(manager: CudaGraphManager) -> None:
    """Let a uniform batch of q rows per request use the smallest captured graph of q rows that holds it.

    Target: the instance's ``_candidates``, before capture. Why: vLLM offers a batch only the graphs of the next larger
    captured size, and with several query lengths that size often belongs to another one (30 requests of 9 rows: the 272
    of 16 requests of 17 rows hides the 288 of 32 of 9), so the step falls back to piecewise graphs. Upstream: the same
    for every dynamic schedule in 0.32. Remove when dispatch looks further.
    """
    lengths = defaultdict(list)
    for graph in manager._capture_descs.get(CUDAGraphMode.FULL, ()):
        if graph.uniform_token_count is not None:
            lengths[graph.uniform_token_count, graph.num_active_loras].append(graph)
    for (rows, loras), graphs in lengths.items():
        graphs.sort(key=lambda graph: graph.num_tokens)
        previous = 0
        for graph in graphs:
            for num_tokens in range(previous + rows, graph.num_tokens + 1, rows):
                candidates = manager._candidates.setdefault((num_tokens, loras), [])
                if graph not in candidates:
                    candidates.insert(0, graph)
            previous = graph.num_tokens
