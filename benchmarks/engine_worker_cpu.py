# SPDX-License-Identifier: Apache-2.0
"""vLLM's own CPU worker for the runs without kvspec, with our compiled kernels in the place of Triton's."""

# isort: off
import vllm.v1.worker.cpu.shm  # noqa: F401
from vllm.v1.worker.cpu_worker import CPUWorker

# isort: on
from vllm_kvspec.engine.cpu.kernels.install import install


class PlainCPUWorker(CPUWorker):
    def __init__(self, *args, **kwargs):
        install()
        super().__init__(*args, **kwargs)
