# SPDX-License-Identifier: Apache-2.0
from setuptools import setup

setup(
    name="triton-cpu-interpreter",
    version="0.1.0",
    description="A Triton driver that only names a CPU target, for use with TRITON_INTERPRET=1",
    packages=["triton_cpu_interpreter"],
    entry_points={"triton.backends": ["cpu = triton_cpu_interpreter"]},
)
