# SPDX-License-Identifier: Apache-2.0
"""Compile the shipped kernel configurations for one GPU architecture without a GPU: ``compile_offline.py 90 all``.

Run as a script (test_compile.py does), since TRITON_INTERPRET must be unset before triton is imported. The real
launchers are called with CPU tensors of a real model's shapes, a driver that only names a target is active, and every
launch is turned into a compilation; so signatures, alignments and constants are those of a launch. Prints one JSON
object per compiled kernel: scenario, kernel, registers, stack bytes, spill instructions, shared memory bytes. ``core``
instead of ``all`` compiles one configuration of each kernel.
"""

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction

from vllm_kvspec.kernels import _paged_softmax, gumbel_noise, kv_compact, tree_build, tree_inputs, tree_walk
from vllm_kvspec.kernels import paged_draft_attention as draft
from vllm_kvspec.kernels import tree_attention as tree

CORE = ("small", "draft-8-rows-8-splits", "tree-17-rows")
TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"


class NamedTarget:
    """The least of a Triton driver: it says which GPU to compile for."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def resources(cubin: bytes) -> dict[str, int]:
    """Registers, stack bytes and local loads/stores (spills) of a compiled kernel."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        usage, sass = (
            subprocess.run([TOOLS / tool, *flags, file.name], capture_output=True, text=True, check=True).stdout
            for tool, flags in (("cuobjdump", ["--dump-resource-usage"]), ("nvdisasm", []))
        )
    registers, stack = re.search(r"REG:(\d+)\s+STACK:(\d+)", usage).groups()
    return dict(registers=int(registers), stack=int(stack), spills=len(re.findall(r"\b(?:LDL|STL)", sass)))


def compile_instead_of_launch(records: list[dict]) -> None:
    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        records.append(dict(kernel=self.fn.__name__, shared=kernel.metadata.shared, **resources(kernel.asm["cubin"])))
        return kernel

    JITFunction.run = compile_only


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def longs(*shape: int) -> torch.Tensor:
    return ints(*shape, dtype=torch.int64)


def caches(heads: int, dim: int, dtype: torch.dtype, block_size: int = 16) -> tuple[torch.Tensor, torch.Tensor]:
    raw = torch.zeros(8, heads, block_size, 2 * dim).to(dtype).transpose(1, 2)
    return raw[..., :dim], raw[..., dim:]


def small_kernels() -> None:
    requests, nodes = 4, 33
    tree_inputs.tree_inputs(
        longs(512), longs(132), ints(requests + 1), longs(requests), ints(256, nodes), longs(256, nodes),
        batch_mask=longs(256, nodes), batch_len=ints(256), local_pos=ints(132),
    )  # fmt: skip
    tree_walk.tree_walk(longs(132), ints(132), ints(256, nodes), ints(requests + 1), longs(requests))
    for dtype in (torch.bfloat16, torch.uint8):
        layers = [torch.zeros(8, 8, 16, 256, dtype=dtype) for _ in range(2)]
        kv_compact.kv_compact(
            layers, kv_compact.kv_base_ptrs(layers), ints(requests, 64), longs(requests), ints(requests, nodes),
            ints(requests),
        )  # fmt: skip
    for num_nodes in (7, 32, 63):
        tree_build.tree_build(torch.zeros(requests, 256), longs(requests, 256), ints(requests, 256), num_nodes)
    gumbel_noise.gumbel_noise(longs(256), torch.zeros(256), longs(requests, 8), longs(requests), 151936)


def draft_attention(rows=8, heads=32, kv_heads=8, dim=128, cache_dtype=torch.bfloat16, splits=1, window=0) -> None:
    draft.num_splits = lambda *_: splits
    q = torch.zeros(2, rows, heads, dim, dtype=torch.bfloat16)
    block = torch.zeros(2, rows, kv_heads, dim, dtype=torch.bfloat16)
    k_scale = 1.0 if cache_dtype == torch.bfloat16 else torch.ones(1)
    draft.paged_draft_attention(
        q, *caches(kv_heads, dim, cache_dtype), ints(2, 64), ints(2), block, block,
        scale=0.1, sliding_window=window, k_scale=k_scale, v_scale=k_scale, out=torch.empty_like(q),
    )  # fmt: skip


def verify_attention(rows=17, heads=32, kv_heads=8, dim=128, cache_dtype=torch.bfloat16, splits=1, window=0) -> None:
    tree.num_splits = lambda *_: splits
    q = torch.zeros(2 * rows, heads, dim, dtype=torch.bfloat16)
    k_scale = 1.0 if cache_dtype == torch.bfloat16 else torch.ones(1)
    tree.tree_attention(
        q, *caches(kv_heads, dim, cache_dtype), ints(2, 64), ints(3), ints(2), longs(256, 64), ints(256),
        scale=0.1, max_query_len=rows, sliding_window=window, k_scale=k_scale, v_scale=k_scale,
        out=torch.empty_like(q),
    )  # fmt: skip


def scenarios(capability: int) -> dict:
    """Name to call. group = heads / kv_heads; rows x group sets the tile."""
    listed = {"small": (small_kernels, {})}
    for name, call, rows in (("draft", draft_attention, 8), ("tree", verify_attention, 17)):
        listed |= {
            f"{name}-one-row": (call, dict(rows=1)),
            f"{name}-{rows}-rows": (call, dict(rows=rows)),
            f"{name}-{rows}-rows-8-splits": (call, dict(rows=rows, splits=8)),
            f"{name}-window": (call, dict(rows=rows, window=4096)),
            f"{name}-group1": (call, dict(rows=rows, heads=8)),
            f"{name}-128-row-tile": (call, dict(rows=32)),
            f"{name}-D64": (call, dict(rows=rows, dim=64)),
            f"{name}-D80": (call, dict(rows=rows, dim=80)),
            f"{name}-D256": (call, dict(rows=rows, dim=256)),
            f"{name}-D256-largest-tile": (call, dict(rows=32, dim=256, splits=8)),
        }
        # Triton knows e4m3 from compute capability 8.9 on.
        if capability >= 89:
            listed[f"{name}-fp8"] = (call, dict(rows=rows, cache_dtype=torch.float8_e4m3fn))
    listed["tree-prompt"] = (verify_attention, dict(rows=512))
    return listed


def main() -> None:
    capability, selection = int(sys.argv[1]), sys.argv[2]
    driver.set_active(NamedTarget(capability))
    # CPU tensors stand for tensors on this GPU.
    _paged_softmax._is_ampere = lambda device: capability < 90
    records: list[dict] = []
    compile_instead_of_launch(records)
    for name, (call, options) in scenarios(capability).items():
        if selection == "core" and name not in CORE:
            continue
        records.clear()
        call(**options)
        for record in records:
            print(json.dumps(dict(scenario=name, **record)), flush=True)


if __name__ == "__main__":
    main()
