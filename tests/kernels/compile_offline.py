# SPDX-License-Identifier: Apache-2.0
"""Compile kernel variants for one GPU generation without a GPU: ``compile_offline.py 90 pairs [SHARD SHARDS]``.

Run as a script (test_compile.py and kernel_resources.py do), since TRITON_INTERPRET must be unset before triton is
imported. The real launchers are called with CPU tensors, a driver that only names a target is active, and every launch
is turned into a compilation; so signatures, alignments and constants are those of a launch. Prints one JSON object per
compiled kernel: kernel, variant, registers, stack bytes, spill instructions, shared memory bytes, tensor-core
instructions. `compile_in_subprocesses` runs it on all cores.
"""

import bisect
import json
import os
import re
import struct
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

# Shared memory one block may opt in to, in bytes (CUDA programming guide, compute capabilities 8.0, 9.0, 10.0).
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}
ROOT = Path(__file__).parents[2]


def compile_in_subprocesses(capability: int, selection: str, python: str = sys.executable) -> list[dict]:
    """Records of all variants of a selection (see `kernel_variants.select`); RuntimeError if one does not compile."""
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    paths = [str(ROOT), str(Path(__file__).parent), env.get("PYTHONPATH")]
    env["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    shards = len(os.sched_getaffinity(0))
    command = [python, "-P", __file__, str(capability), selection]
    started = [
        subprocess.Popen(
            [*command, str(shard), str(shards)], env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
        )
        for shard in range(shards)
    ]
    records = []
    for process in started:
        output, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(errors[-4000:])
        records += [json.loads(line) for line in output.splitlines()]
    return records


def problem(record: dict) -> str | None:
    """Why this compiled kernel must not ship, or None."""
    if record["stack"] or record["spills"]:
        return f"spills registers: {record}"
    if record["shared"] > SHARED_MEMORY[record["sm"]]:
        return f"needs more shared memory than a block may have: {record}"
    return None


class NamedTarget:
    """The least of a Triton driver: it says which GPU to compile for."""

    def __init__(self, capability: int):
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> object:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int = 0) -> int:
        return 0


def compile_instead_of_launch(cubins: dict) -> None:
    """Make every launch of a Triton kernel add (kernel, cubin, shared bytes) to `cubins` by its hash instead."""
    from triton.runtime.jit import JITFunction

    run = JITFunction.run

    def compile_only(self, *args, grid, warmup, **kwargs):
        kernel = run(self, *args, grid=grid, warmup=True, **kwargs)
        cubins.setdefault(kernel.hash, (self.fn.__name__, kernel.asm["cubin"], kernel.metadata.shared))
        return kernel

    JITFunction.run = compile_only


def _tool(name: str, *arguments: str, contents: bytes) -> str:
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / name
    with tempfile.NamedTemporaryFile() as file:
        file.write(contents)
        file.flush()
        return subprocess.run([tool, *arguments, file.name], capture_output=True, text=True, check=True).stdout


def registers_and_stack(cubin: bytes) -> tuple[int, int]:
    usage = re.search(r"REG:(\d+)\s+STACK:(\d+)", _tool("cuobjdump", "--dump-resource-usage", contents=cubin))
    return int(usage[1]), int(usage[2])


def _machine_code(cubin: bytes) -> bytes:
    """The kernel's instructions: section ``.text.*`` of the ELF file."""
    (table,) = struct.unpack_from("<Q", cubin, 0x28)
    size, count, names = struct.unpack_from("<3H", cubin, 0x3A)
    # Of a section header: name, type, flags, address, offset, size.
    sections = [struct.unpack_from("<IIQQQQ", cubin, table + i * size) for i in range(count)]
    for name, _, _, _, offset, length in sections:
        if cubin.startswith(b".text.", sections[names][4] + name):
            return cubin[offset : offset + length]
    raise ValueError("A cubin must hold a section .text.*, found none; was it made by ptxas?")


def count_instructions(cubins: list[bytes], capability: int) -> list[Counter]:
    """Instructions of each kernel by name. All are disassembled in one go: starting the tool takes half a second."""
    codes = [_machine_code(cubin) for cubin in cubins]
    ends = [sum(map(len, codes[: i + 1])) for i in range(len(codes))]
    architecture = f"SM{capability}a" if capability >= 90 else f"SM{capability}"
    listing = _tool("nvdisasm", "--binary", architecture, contents=b"".join(codes))
    counts = [Counter() for _ in codes]
    for address, name in re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\w+ )?([A-Z][A-Z0-9]*)", listing):
        counts[bisect.bisect_right(ends, int(address, 16))][name] += 1
    # Every 16-byte instruction was seen, or the counts mean nothing.
    assert sum(count.total() for count in counts) == ends[-1] // 16
    return counts


def main() -> None:
    import kernel_variants
    from triton.runtime import driver

    from vllm_kvspec.kernels import _paged_softmax

    capability, selection = int(sys.argv[1]), sys.argv[2]
    shard, shards = (int(word) for word in sys.argv[3:5]) if len(sys.argv) > 3 else (0, 1)
    driver.set_active(NamedTarget(capability))
    # CPU tensors stand for tensors on this GPU.
    _paged_softmax._capability = lambda device: capability // 10
    compiled: dict[str, tuple] = {}
    compile_instead_of_launch(compiled)
    # A variant's merge of splits is a variant of its own.
    merge_splits = _paged_softmax.merge_splits
    kernel_variants.draft.merge_splits = kernel_variants.tree.merge_splits = lambda *_: None
    assert kernel_variants._paged_softmax.merge_splits is merge_splits
    variant_of = {}
    for variant in kernel_variants.select(capability, selection)[shard::shards]:
        variant.call(**variant.options)
        for key in compiled:
            variant_of.setdefault(key, str(variant))
    if not compiled:
        return
    counts = count_instructions([cubin for _, cubin, _ in compiled.values()], capability)
    for (key, (name, cubin, shared)), count in zip(compiled.items(), counts, strict=True):
        registers, stack = registers_and_stack(cubin)
        record = dict(
            sm=capability, kernel=name, variant=variant_of[key], registers=registers, stack=stack,
            spills=count["LDL"] + count["STL"], shared=shared,
            tensor_cores={op: n for op, n in sorted(count.items()) if op.endswith("MMA")},
        )  # fmt: skip
        print(json.dumps(record))


if __name__ == "__main__":
    main()
