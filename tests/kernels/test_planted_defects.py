# SPDX-License-Identifier: Apache-2.0
"""Each gate can fail: a defect planted in a copy of the kernels makes the one test that guards against it fail.

The copy (kernels/, these tests and their set-up) lies in a temporary directory; pytest runs there in a process of its
own. The unchanged copy must pass the same tests, so that a failure is the defect's.
"""

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Defect:
    file: str
    right: str
    wrong: str
    # The test that must fail, and what it must say.
    test: str
    says: str


DEFECTS = {
    "spill": Defect(
        "_paged_softmax.py", "num_warps = 8 if", "num_warps = 4 if", "test_compile.py::test_largest_tiles", "spills"
    ),
    "wrong-ancestor-mask": Defect(
        "tree_attention.py",
        "shift = tl.minimum(tl.maximum(tree_key, 0), 63)",
        "shift = tl.minimum(tl.maximum(tree_key - 1, 0), 63)",
        "test_tree_attention.py::test_kernel_and_twin_match_float64[1-B1-group8-bs32-tree17]",
        "relative_error",
    ),
    "int32-address": Defect(
        "_paged_softmax.py",
        "mask=valid, other=0).to(tl.int64)",
        "mask=valid, other=0)",
        "test_far_addresses.py::test_far_argument_changes_nothing[paged_draft_attention-k_cache-0]",
        "torch.equal",
    ),
    "accumulator-in-bf16": Defect(
        "_paged_softmax.py",
        "    return new_max, row_sum, acc",
        "    return new_max, row_sum, acc.to(q.dtype).to(tl.float32)",
        "test_tree_attention.py::test_accumulates_in_fp32",
        "relative_error",
    ),
    "wrong-split-merge": Defect(
        "_paged_softmax.py",
        "weight = tl.exp2(split_max - tl.max(split_max, 0))",
        "weight = tl.exp(split_max - tl.max(split_max, 0))",
        "test_paged_draft_attention.py::test_kernel_and_twin_match_float64[4-B2-G3-H8-KV1-group8-bs32]",
        "relative_error",
    ),
    "sink-in-every-split": Defect(
        "tree_attention.py",
        "if split == 0:",
        "if split >= 0:",
        "test_tree_attention.py::test_soft_cap_and_sinks[fp32-0-4-sinks]",
        "relative_error",
    ),
    "soft-cap-forgotten-in-masked-tiles": Defect(
        "tree_attention.py",
        "qk_scale, True, SOFT_CAP)",
        "qk_scale, True)",
        "test_tree_attention.py::test_soft_cap_and_sinks[fp32-0-1-cap]",
        "relative_error",
    ),
    "window-one-short": Defect(
        "tree_walk.py",
        "(run >= window)",
        "(run >= window - 1)",
        "test_tree_walk.py::test_loose_rules[kernel-the tree ends before the window]",
        "assert ([9, 2, 3, 4]",
    ),
    "sum-not-rescaled": Defect(
        "loose_scores.py",
        "total * tl.exp(first - shift) + tl.exp(x - shift)",
        "total + tl.exp(x - shift)",
        "test_loose_scores.py::test_kernel_and_twin_match_the_definition[partly-filled-0]",
        "torch.equal",
    ),
    "anothers-entry": Defect(
        "recycle.py",
        "found = tl.load(owner_ptr + slot, mask=known, other=0) == owner",
        "found = known",
        "test_recycle.py::test_another_owner_is_told_nothing[2-kernel]",
        "assert (0, 1",
    ),
    "beyond-the-texts-end": Defect(
        "recycle.py",
        "(end + d < base) & is_used",
        "(end + d <= base) & is_used",
        "test_recycle.py::test_nothing_is_read_beyond_the_texts_end[kernel]",
        "(2, 9)",
    ),
    "noise-of-the-next-position": Defect(
        "recycle.py",
        "noise_key(seed, base + d)",
        "noise_key(seed, base + d + 1)",
        "test_recycle.py::test_candidates_are_ranked_under_the_targets_noise[kernel]",
        "assert (0, 1",
    ),
}


def _copy(tmp_path: Path, defect: Defect | None) -> None:
    """The kernels as package ``vllm_kvspec.kernels`` with the defect, and their tests."""
    package = tmp_path / "vllm_kvspec"
    shutil.copytree(ROOT / "kernels", package / "kernels", ignore=shutil.ignore_patterns("__pycache__"))
    (package / "__init__.py").touch()
    (tmp_path / "tests").mkdir()
    for name in ("conftest.py", "interpreted_vllm.py", "interpreter_bf16.py"):
        shutil.copy(ROOT / "tests" / name, tmp_path / "tests" / name)
    shutil.copytree(ROOT / "tests" / "kernels", tmp_path / "tests" / "kernels")
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    if defect is None:
        return
    file = package / "kernels" / defect.file
    source = file.read_text()
    assert source.count(defect.right) == 1, f"{defect.right!r} is not in {file} once; plant the defect elsewhere"
    file.write_text(source.replace(defect.right, defect.wrong))


def _pytest(directory: Path, tests: list[str]) -> subprocess.CompletedProcess:
    env = os.environ | {"PYTHONPATH": str(directory)}
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
    return subprocess.run(
        command + [f"tests/kernels/{test}" for test in tests], cwd=directory, env=env, capture_output=True, text=True
    )


def test_unchanged_copy_passes(tmp_path):
    _copy(tmp_path, None)
    done = _pytest(tmp_path, [defect.test for defect in DEFECTS.values()])
    assert done.returncode == 0 and f"{len(DEFECTS)} passed" in done.stdout, done.stdout + done.stderr


@pytest.mark.parametrize("defect", DEFECTS.values(), ids=DEFECTS)
def test_planted_defect_is_found(tmp_path, defect):
    _copy(tmp_path, defect)
    done = _pytest(tmp_path, [defect.test])
    # 1: tests ran and failed. Anything else is not the gate's doing.
    assert done.returncode == 1 and defect.says in done.stdout, done.stdout + done.stderr
