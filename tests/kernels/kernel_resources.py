# SPDX-License-Identifier: Apache-2.0
"""Write what each compiled kernel variant needs to ``benchmarks/results/kernel_resources.md``.

Run by ``make kernel-resources``. Compiles offline, so it says nothing about speed. One section per Triton version;
sections of other versions stay.
Exits with 1 if a variant spills or needs too much shared memory.
"""

import argparse
import re
import sys
from importlib.metadata import version

from compile_offline import ROOT, SHARED_MEMORY, compile_in_subprocesses, problem

OUTPUT = ROOT / "benchmarks" / "results" / "kernel_resources.md"
HEAD = """# What the kernels need

Compiled without a GPU (`tests/kernels/compile_offline.py`): registers per thread, dynamic shared memory per block in
bytes, spills (local loads and stores), stack bytes, and which tensor-core instructions were chosen. Nothing here was
run; nothing here says how fast anything is. The variants are those that CI compiles: a covering array of what the
launchers can choose, and every use of the tree kernel's largest tile (`tests/kernels/kernel_variants.py`).

"""


def section(records: list[dict], command: str, summary: bool) -> str:
    problems = [record for record in records if problem(record)]
    most = {sm: max(record["registers"] for record in records if record["sm"] == sm) for sm in SHARED_MEMORY}
    lines = [
        f"## Triton {version('triton')}\n",
        f"`{command}`, torch {version('torch')}: {len(records)} compiled kernels, of which {len(problems)} spill, have "
        "a stack or need too much shared memory; most registers: "
        + ", ".join(f"{number} on sm_{sm}" for sm, number in most.items())
        + ".\n",
    ]
    shown = problems if summary else records
    if shown:
        lines += ["| kernel | variant | sm | registers | shared | spills | stack | tensor cores |", "|---" * 8 + "|"]
    for r in sorted(shown, key=lambda r: (r["kernel"], r["sm"], r["variant"])):
        cores = " ".join(r["tensor_cores"]) or "-"
        numbers = " | ".join(str(r[name]) for name in ("sm", "registers", "shared", "spills", "stack"))
        lines.append(
            f"| {r['kernel'].strip('_').removesuffix('_kernel')} | {r['variant'] or '-'} | {numbers} | {cores} |"
        )
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--command", default="make kernel-resources", help="how to make this section again")
    parser.add_argument("--summary", action="store_true", help="list only what fails")
    args = parser.parse_args()
    records = [record for sm in SHARED_MEMORY for record in compile_in_subprocesses(sm, "pairs")]
    new = section(records, args.command, args.summary)
    old = re.split(r"(?m)^(?=## Triton )", OUTPUT.read_text())[1:] if OUTPUT.exists() else []
    name = new.splitlines()[0]
    kept = [text for text in old if text.splitlines()[0] != name]
    OUTPUT.parent.mkdir(parents=True, exist_ok=True)
    OUTPUT.write_text(HEAD + "\n".join(text.strip() + "\n" for text in sorted([*kept, new], reverse=True)))
    failed = [reason for record in records if (reason := problem(record))]
    print(*failed, f"{len(records)} kernels, {len(failed)} fail; {OUTPUT}", sep="\n")
    sys.exit(bool(failed))


if __name__ == "__main__":
    main()
