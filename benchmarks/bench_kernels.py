# SPDX-License-Identifier: Apache-2.0
"""Time every kernel against the memory bandwidth of this GPU and against vLLM's own attention.

    python benchmarks/bench_kernels.py                     # Qwen3-8B's geometry, bf16, all kernels
    python benchmarks/bench_kernels.py --device cpu --small   # Triton's interpreter: parity and that it runs, no speed

Each shape is first compared with the kernel's torch twin (``kernels/reference.py``), foreign kernels too; on the first
difference nothing is reported and the exit status is 1. Needs torch and triton; vLLM only for its columns.
"""

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import product
from pathlib import Path

import torch

# A case may fill this much of the free memory; the twin needs the rest.
MEMORY_SHARE = 0.6
ATTENTION = ("tree_attention", "paged_draft_attention")
RECYCLE = ("recycle_update", "own_matches", "recycle_tree")
SMALL_KERNELS = ("tree_inputs", "tree_walk", "tree_build", "draft_inputs", *RECYCLE)
WHOLE_VOCABULARY = ("tree_candidates", "gumbel_noise")
METHOD = (
    "ms: median of a call over all of the row's layers, replayed from a CUDA graph as in the engine, L2 emptied before "
    "each (tree_inputs, tree_walk, tree_build, draft_inputs and those of trees without a head: many in one graph, not "
    "emptied). Bytes are those that must move: the KV of context and rows, queries, outputs; logits and transition_out "
    "once per level. Every row agreed with its torch twin first: relative error is the largest difference over its "
    "largest value."
)
KERNELS = (*ATTENTION, "kv_compact", *SMALL_KERNELS, *WHOLE_VOCABULARY, "loose_scores")


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kernels", nargs="+", default=KERNELS, choices=KERNELS)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="tiny shapes and geometry; other flags still count")
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--context", nargs="+", type=int, default=[1024, 8192, 32768])
    parser.add_argument("--rows", nargs="+", type=int, default=[1, 8, 17, 33, 64], help="query rows of a request")
    parser.add_argument("--layers", nargs="+", type=int, default=[1, 3], help="KV caches that attention reads in a row")
    parser.add_argument("--num-heads", type=int, default=32)
    parser.add_argument("--num-kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--num-layers", type=int, default=36, help="layers that kv_compact moves")
    parser.add_argument("--vocab-size", type=int, default=151936)
    parser.add_argument("--hidden-size", type=int, default=4096)
    parser.add_argument("--transition-rank", type=int, default=256)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16", "float32"))
    parser.add_argument("--output", type=Path, help="without suffix; default benchmarks/results/kernels-<device>")
    if "--small" in (argv or sys.argv):
        parser.set_defaults(batch=[1, 2], context=[40], rows=[1, 5], layers=[1, 2], num_layers=3, vocab_size=300)
        parser.set_defaults(num_heads=4, num_kv_heads=2, head_dim=16, hidden_size=64, transition_rank=24)
    arguments = parser.parse_args(argv)
    if arguments.device == "cpu":
        # Stock Triton computes bfloat16 wrongly in its interpreter.
        arguments.dtype = "float32"
    return arguments


def cases(arguments: argparse.Namespace, device: torch.device) -> Iterator[tuple[str, int, Callable]]:
    """(what it is, bytes of its largest inputs, function that makes it) for every shape asked for."""
    import kernel_cases
    import recycle_cases
    import tree_cases

    fields = ("num_heads", "num_kv_heads", "head_dim", "num_layers", "vocab_size", "hidden_size", "transition_rank")
    geometry = kernel_cases.Geometry(
        **{name: getattr(arguments, name) for name in fields}, dtype=getattr(torch, arguments.dtype)
    )
    token = geometry.kv_bytes_per_token
    for kernel in arguments.kernels:
        modules = (kernel_cases, tree_cases, recycle_cases)
        make = partial(next(getattr(m, f"{kernel}_case") for m in modules if hasattr(m, f"{kernel}_case")), geometry)
        for shape in shapes(kernel, arguments):
            batch, keys = shape["batch"], shape.get("context", 64) + shape.get("rows", 0)
            needed = {
                # Cache, pristine copy and the twin's.
                "kv_compact": 3 * arguments.num_layers * batch * keys * token,
                "gumbel_noise": 8 * batch * geometry.draft_block_size * geometry.vocab_size,
                # The twin's probabilities beside the logits.
                "loose_scores": 12 * batch * shape.get("rows", 0) * geometry.vocab_size,
                # The twin's scores of every parent, three times.
                "tree_candidates": 100 * batch * geometry.vocab_size,
                # The twin compares every row with every other.
                "recycle_update": 16 * (batch * shape.get("rows", 0)) ** 2,
            }.get(kernel, shape.get("layers", 0) * batch * keys * token)
            yield f"{kernel} {shape}", needed, partial(make, **shape, device=device)


def shapes(kernel: str, arguments: argparse.Namespace) -> Iterator[dict[str, int]]:
    """The shapes of one kernel: the product of the lists that concern it."""
    grid = {"batch": arguments.batch}
    if kernel == "own_matches":
        grid["context"] = arguments.context
    elif kernel in ATTENTION:
        grid |= {"context": arguments.context, "rows": arguments.rows, "layers": arguments.layers}
    elif kernel not in WHOLE_VOCABULARY:
        grid["rows"] = [rows for rows in arguments.rows if rows > 1]
    if kernel == "kv_compact":
        grid["layers"] = [arguments.num_layers]
    for values in product(*grid.values()):
        yield dict(zip(grid, values, strict=True))


def milliseconds(run: Callable, device: torch.device, short: bool = False) -> float:
    """Median time of a call, without what Python and launching cost. ``short``: too short to time one at a time."""
    if device.type == "cuda":
        from triton.testing import do_bench, do_bench_cudagraph

        if short:
            return do_bench_cudagraph(run, rep=20, return_mode="median")
        # Everything is compiled and loaded before the capture.
        run()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        return do_bench(graph.replay, warmup=10, rep=50, return_mode="median")
    times = []
    for _ in range(3):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return 1e3 * statistics.median(times)


def copy_bandwidth(device: torch.device) -> float | None:
    """Bytes per second that a large copy reads and writes; None without a GPU."""
    if device.type != "cuda":
        return None
    from triton.testing import do_bench

    source = torch.empty(1 << 30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    # Not out of a graph: its copy node is slower (an H200: 2.7 TB/s instead of 4.2).
    return 2 * source.nbytes / (1e-3 * do_bench(lambda: target.copy_(source), return_mode="median"))


def measure(case, device: torch.device, bandwidth: float | None) -> dict:
    """Parity, then time, of one case and the foreign kernels of its shape. Raises ValueError when parity fails."""
    for name, (run, twin) in {case.kernel: (case.run, case.twin), **case.others}.items():
        error, allowed = case.compare(run(), twin())
        if not allowed:
            raise ValueError(
                f"{name} must agree with its torch twin before it is timed, but differs at {case.shape} (largest "
                f"relative error {error:.2e}); nothing is reported. Fix the kernel first."
            )
        if name == case.kernel:
            own_error = error
    ms = milliseconds(case.run, device, case.kernel in SMALL_KERNELS)
    row = {"kernel": case.kernel, **case.shape, "ms": ms}
    if bandwidth and case.bytes_moved:
        rate = case.bytes_moved / (1e-3 * ms)
        row |= {"TB/s": rate / 1e12, "% of copy": 100 * rate / bandwidth}
    for name, (run, _) in case.others.items():
        row[f"{name} ms"] = milliseconds(run, device)
    return row | {"relative error": own_error}


def main(argv: list[str] | None = None) -> int:
    arguments = parse_arguments(argv)
    if arguments.device == "cpu":
        # Before anything imports a kernel: Triton decides at decoration time.
        os.environ["TRITON_INTERPRET"] = "1"
    device = torch.device(arguments.device)
    # The same inputs in every run: what agrees once agrees again.
    torch.manual_seed(0)
    import report

    bandwidth = copy_bandwidth(device)
    rows, skipped = [], []
    for name, needed, make in cases(arguments, device):
        if device.type == "cuda" and needed > MEMORY_SHARE * torch.cuda.mem_get_info(device)[0]:
            skipped.append(f"{name}: {needed / 1e9:.0f} GB do not fit")
            continue
        try:
            rows.append(measure(make(), device, bandwidth))
        except torch.OutOfMemoryError:
            torch.cuda.empty_cache()
            skipped.append(f"{name}: out of memory")
            continue
        except ValueError as error:
            print(f"error: {error}", file=sys.stderr)
            return 1
        print(json.dumps(rows[-1]), flush=True)
        if device.type == "cuda":
            torch.cuda.empty_cache()
    notes = [METHOD]
    if device.type != "cuda":
        notes.append("**Interpreter timings: they say nothing about the kernels' speed.**")
    if skipped:
        notes.append("Skipped: " + "; ".join(skipped) + ".")
    found = report.conditions(device, dtype=arguments.dtype, copy_bandwidth_TB_s=bandwidth and bandwidth / 1e12)
    output = arguments.output or report.RESULTS / f"kernels-{found['device'].replace(' ', '-')}"
    report.write(output, "Kernel timings", found, rows, notes)
    print(f"wrote {output}.json and {output}.md")
    return 0


if __name__ == "__main__":
    sys.exit(main())
