# SPDX-License-Identifier: Apache-2.0
"""The CPU worker: vLLM's own, with our model runner and attention, and compiled kernels in the place of Triton's."""

# Replaces torch.cuda streams and events; must come before anything below vllm.v1.worker.gpu.
# isort: off
import vllm.v1.worker.cpu.shm  # noqa: F401
import vllm.v1.worker.cpu.model_runner as cpu_model_runner

# isort: on
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvspec.engine.cpu.kernels.install import install
from vllm_kvspec.engine.hooks import compat
from vllm_kvspec.engine.verify.attention_registry import cpu_backend
from vllm_kvspec.engine.worker import kvspec_speculator, require_v2


class KVSpecCPUWorker(CPUWorker):
    """``--worker-cls`` is set to this by the speculative config on CPU."""

    def __init__(self, vllm_config, *args, **kwargs):
        require_v2(vllm_config)
        install()
        super().__init__(vllm_config, *args, **kwargs)

    def init_device(self) -> None:
        """``CPUWorker.init_device`` imports CPUModelRunner when it runs; it finds ours for that moment."""
        from vllm_kvspec.engine.runner import KVSpecRunnerMixin

        original = cpu_model_runner.CPUModelRunner

        class KVSpecCPUModelRunner(KVSpecRunnerMixin, original):
            pass

        compat.require_contract()
        cpu_model_runner.CPUModelRunner = KVSpecCPUModelRunner
        try:
            with kvspec_speculator():
                super().init_device()
        finally:
            cpu_model_runner.CPUModelRunner = original

    def load_model(self, *args, **kwargs) -> None:
        with cpu_backend():
            super().load_model(*args, **kwargs)
