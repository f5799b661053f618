# SPDX-License-Identifier: Apache-2.0
"""CPU workers: vLLM's own, with Model Runner V2 on compiled kernels, and with or without kvspec."""

import contextlib

# Replaces torch.cuda streams and events; must come before anything below vllm.v1.worker.gpu.
# isort: off
import vllm.v1.worker.cpu.shm  # noqa: F401
import vllm.v1.worker.cpu.model_runner as cpu_model_runner

# isort: on
from vllm.v1.worker import gpu_worker
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvspec.engine.cpu.kernels.install import install
from vllm_kvspec.engine.hooks import compat
from vllm_kvspec.engine.verify.attention_registry import cpu_backend
from vllm_kvspec.engine.worker import FollowsWeights, TimesSteps, kvspec_speculator, require_v2


@contextlib.contextmanager
def without_triton():
    """0.33 only. Target: ``vllm.v1.worker.gpu_worker.HAS_TRITON``, a module global, while a worker is built.

    Why and when to remove: as ``patches.run_v2_without_triton``; here the worker asks once more, where 0.32 does not.
    """
    if not hasattr(gpu_worker, "HAS_TRITON"):
        yield
        return
    original, gpu_worker.HAS_TRITON = gpu_worker.HAS_TRITON, True
    try:
        yield
    finally:
        gpu_worker.HAS_TRITON = original


class PlainV2CPUWorker(CPUWorker):
    """Plain vLLM on Model Runner V2, which vLLM takes on a GPU: what kvspec must equal, sampling noise included.

    Without kvspec vLLM serves on the V1 runner on CPU, whose sampling draws other noise.
    """

    def __init__(self, vllm_config, *args, **kwargs):
        require_v2(vllm_config)
        install()
        with without_triton():
            super().__init__(vllm_config, *args, **kwargs)


class KVSpecCPUWorker(TimesSteps, FollowsWeights, PlainV2CPUWorker):
    """``--worker-cls`` is set to this by the speculative config on CPU."""

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
