# SPDX-License-Identifier: Apache-2.0
"""Batches that CUDA graphs are captured for, and how wide a step may be. Arithmetic, on the host."""

# The most a batch is padded by. Up to FREE_ROWS rows a pass is bound by reading weights, so more rows cost little, and
# a graph more costs start-up time and KV room; beyond, a GPU is bound by compute.
PADDING, PADDING_BEYOND = 1.25, 1.125
FREE_ROWS = 256


def graph_batches(largest: int, rows: int) -> list[int]:
    """Ascending batch sizes to capture, of ``rows`` rows per request: ``largest``, all up to 4, and of the others only
    what a larger one does not serve within the padding allowed."""
    kept: list[int] = []
    for size in range(largest, 0, -1):
        padding = PADDING if size * rows <= FREE_ROWS else PADDING_BEYOND
        if not kept or size <= 4 or size * padding <= kept[-1]:
            kept.append(size)
    return kept[::-1]


def max_step_rows(vllm_config) -> float:
    """Rows that a step of trees may have where the load decides: a wider one would be trimmed, or leave the graphs."""
    graph_rows = vllm_config.compilation_config.max_cudagraph_capture_size or float("inf")
    return min(graph_rows, vllm_config.scheduler_config.max_num_batched_tokens)
