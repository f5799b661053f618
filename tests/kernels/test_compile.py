# SPDX-License-Identifier: Apache-2.0
"""Every shipped kernel configuration compiles for each GPU generation, without spills, within its shared memory."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

# Shared memory one block may opt in to, in bytes (CUDA programming guide, compute capabilities 8.0, 9.0, 10.0).
SHARED_MEMORY = {80: 166912, 90: 232448, 100: 232448}
KERNELS = {
    "_tree_inputs_kernel",
    "_tree_walk_kernel",
    "_kv_compact_kernel",
    "_tree_build_kernel",
    "_gumbel_noise_kernel",
    "_paged_draft_attention_kernel",
    "_tree_attention_kernel",
    "_merge_splits_kernel",
}


def _compile(capability: int, selection: str) -> list[dict]:
    script = Path(__file__).with_name("compile_offline.py")
    env = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    root = str(Path(__file__).parents[2])
    env["PYTHONPATH"] = os.pathsep.join([root, env["PYTHONPATH"]] if env.get("PYTHONPATH") else [root])
    command = [sys.executable, "-P", str(script), str(capability), selection]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability", SHARED_MEMORY)
@pytest.mark.parametrize("selection", ["core", pytest.param("all", marks=pytest.mark.slow)])
def test_kernels_compile_without_spills(request, capability, selection):
    if selection == "all" and "slow" not in request.config.option.markexpr:
        pytest.skip(reason="a minute per architecture: pytest -m slow")
    records = _compile(capability, selection)
    assert {record["kernel"] for record in records} == KERNELS
    for record in records:
        assert record["stack"] == 0 and record["spills"] == 0, record
        assert record["shared"] <= SHARED_MEMORY[capability], record
