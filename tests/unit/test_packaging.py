# SPDX-License-Identifier: Apache-2.0
"""What a user gets from ``pip install``: every module (kernels are behind a symlink), entry points, requirements."""

import importlib.metadata
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
BUILD_INPUTS = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "kernels", "vllm_kvspec")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
    """A wheel built from a copy, so that the checkout gets no build directory."""
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("dist")
    for name in BUILD_INPUTS:
        source = ROOT / name
        if source.is_dir():
            shutil.copytree(source, tree / name, symlinks=True, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(source, tree / name)
    subprocess.run(
        [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", out, tree],
        check=True,
        capture_output=True,
    )
    with zipfile.ZipFile(next(out.glob("vllm_kvspec-*.whl"))) as archive:
        yield archive


def test_wheel_holds_every_module(wheel):
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "vllm_kvspec").rglob("*.py")}
    modules |= {f"vllm_kvspec/kernels/{path.name}" for path in (ROOT / "kernels").glob("*.py")}
    assert "vllm_kvspec/kernels/reference.py" in modules
    assert modules - set(wheel.namelist()) == set()


def test_wheel_holds_nothing_else(wheel):
    assert {name.split("/")[0] for name in wheel.namelist()} == {"vllm_kvspec", "vllm_kvspec-0.1.0.dist-info"}


def test_wheel_metadata(wheel):
    import vllm_kvspec

    info = wheel.read("vllm_kvspec-0.1.0.dist-info/METADATA").decode()
    assert f"Version: {vllm_kvspec.__version__}\n" in info
    assert "Requires-Dist: vllm<0.34,>=0.32" in info


def test_installed_entry_points_load():
    points = importlib.metadata.distribution("vllm-kvspec").entry_points
    named = {(point.group, point.name): point for point in points}
    assert callable(named["vllm.general_plugins", "kvspec"].load())
    assert callable(named["console_scripts", "vllm-kvspec"].load())
