# SPDX-License-Identifier: Apache-2.0
"""Which full CUDA graphs of the target are captured when the number of nodes varies."""

from itertools import pairwise, product

from vllm.config import CUDAGraphMode
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_kvspec.engine.batch_sizes import graph_batches


def plan_decode_graphs(manager: CudaGraphManager, config) -> None:
    """Capture plain decode steps as vLLM does, and for other numbers of nodes the batches of ``graph_batches``.

    Target: the instance's ``_candidates`` and ``_capture_descs``, before capture. Why: vLLM rounds its whole list of
    sizes up to every query length (272 graphs for five lengths, where plain decoding has 51), knows only lengths that
    its own schedule can reach with ``max_num_seqs`` (one of them with a single sequence), and offers a batch no graph
    beyond the next captured size of any length. Upstream: the same for every dynamic schedule in 0.33. Remove when a
    plugin can give the list.

    ``config``: the KVSpecConfig. With one number of nodes, and no schedule, vLLM's own list is right.
    """
    mode = manager.cudagraph_mode
    if not config.num_speculative_tokens_per_batch_size:
        return
    if not mode.separate_routine() or mode.decode_mode() != CUDAGraphMode.FULL:
        return
    for key, graphs in manager._candidates.items():
        manager._candidates[key] = [graph for graph in graphs if graph.cg_mode != CUDAGraphMode.FULL]
    captured = []
    for rows, loras in product((nodes + 1 for nodes in config.node_sizes), manager.lora_capture_cases):
        for below, batch in pairwise([0, *_batches(manager, rows)]):
            graph = BatchExecutionDescriptor(
                CUDAGraphMode.FULL, batch * rows, batch, uniform_token_count=rows, num_active_loras=loras
            )
            captured.append(graph)
            for requests in range(below + 1, batch + 1):
                manager._candidates.setdefault((requests * rows, loras), []).insert(0, graph)
    # The largest first, as vLLM does: the smaller ones then fit into its memory.
    manager._capture_descs[CUDAGraphMode.FULL] = sorted(captured, key=lambda graph: graph.num_tokens, reverse=True)


def _batches(manager: CudaGraphManager, rows: int) -> list[int]:
    """A plain decode step is padded as without kvspec: it must not be slower."""
    sizes = manager.compilation_config
    if rows > 1:
        return graph_batches(min(manager.max_num_reqs, sizes.max_cudagraph_capture_size // rows), rows)
    return sorted(size for size in sizes.cudagraph_capture_sizes if size <= manager.max_num_reqs)
