# SPDX-License-Identifier: Apache-2.0
"""vLLM's own CPU worker, with the two kernels replaced that Triton's interpreter cannot run. No kvspec code decodes."""

# isort: off
import vllm.v1.worker.cpu.shm  # noqa: F401
from vllm.v1.worker.cpu_worker import CPUWorker

# isort: on
from vllm_kvspec.engine.cpu import interpreter


class PlainCPUWorker(CPUWorker):
    def __init__(self, *args, **kwargs):
        interpreter.work_around()
        super().__init__(*args, **kwargs)
