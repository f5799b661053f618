# SPDX-License-Identifier: Apache-2.0
"""Metadata of the ``vllm-kvspec`` distribution; ``pyproject.toml`` holds only the build system and tool settings.

``vllm_kvspec/kernels`` is a tracked symlink to the top-level ``kernels`` directory, which has no ``__init__.py`` on
purpose: a regular package of that name at the repository root would shadow Hugging Face's ``kernels`` distribution.
``find_packages`` does not see a directory without ``__init__.py``, so it is listed by hand.
"""

from pathlib import Path

from setuptools import find_packages, setup

setup(
    name="vllm-kvspec",
    version="0.1.0",
    description="Speculative decoding for vLLM whose draft head reads the target's own paged KV cache",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    # vLLM's own range, 0.32 and 0.33 alike.
    python_requires=">=3.11,<3.15",
    packages=[*find_packages(include=["vllm_kvspec*"]), "vllm_kvspec.kernels"],
    install_requires=[
        # The engine overrides classes of exactly these minor releases; it refuses to start on another one.
        "vllm>=0.32,<0.34",
        # vLLM pins these: a second pin here could only conflict.
        "torch",
        "transformers",
        "triton",
        "openai",
    ],
    extras_require={
        "test": ["pytest", "pytest-xdist", "hypothesis", "import-linter", "ruff"],
        # transformers.Trainer refuses to start without accelerate.
        "train": ["accelerate", "datasets", "matplotlib", "tensorboard"],
        "dev": ["pytest", "pytest-xdist", "hypothesis", "import-linter", "ruff", "pre-commit"],
    },
    entry_points={
        "vllm.general_plugins": ["kvspec = vllm_kvspec.engine.hooks.plugin:register"],
        "console_scripts": ["vllm-kvspec = vllm_kvspec.cli:main"],
    },
    classifiers=[
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Programming Language :: Python :: 3.14",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
)
