# SPDX-License-Identifier: Apache-2.0
"""The CUDA worker: vLLM's own, with our model runner."""

import contextlib

from vllm.v1.worker.gpu_worker import Worker

from vllm_kvspec.engine.hooks import compat
from vllm_kvspec.engine.verify.attention_registry import register_cuda_backend


@contextlib.contextmanager
def kvspec_speculator():
    """Target: ``vllm.v1.worker.gpu.model_runner.init_speculator``, a module global, while our runner is built.

    Why: the runner builds its speculator through this closed if/else, which raises NotImplementedError for other
    methods. Upstream: no registry in 0.33. Remove when there is one.
    """
    from vllm.v1.worker.gpu import model_runner

    from vllm_kvspec.engine.draft.speculator import KVSpecSpeculator

    original = model_runner.init_speculator
    model_runner.init_speculator = KVSpecSpeculator
    try:
        yield
    finally:
        model_runner.init_speculator = original


def require_v2(vllm_config) -> None:
    if not vllm_config.use_v2_model_runner:
        raise ValueError(
            "kvspec needs vLLM's Model Runner V2; it is off (VLLM_USE_V2_MODEL_RUNNER=0, or, on a GPU, Triton is "
            "missing). Unset the variable, and install triton on a GPU."
        )


def without_expert_load(model_runner):
    """While steps are timed. From 0.33 on vLLM's own warm-up counts no expert load; in 0.32 it does, and so do we."""
    return getattr(model_runner.eplb, "suppress", contextlib.nullcontext)()


class TimesSteps:
    """Put before vLLM's worker in the bases: once it is warm, its steps are timed for ``budget: "auto"``."""

    def compile_or_warm_up_model(self):
        times = super().compile_or_warm_up_model()
        config = self.vllm_config.speculative_config
        if config.budget == "auto" and not config.budget_costs:
            with without_expert_load(self.model_runner):
                self.model_runner.measure_step_costs()
        return times


class FollowsWeights:
    """Put before vLLM's worker in the bases: weights that arrive in a transfer reach what the drafter made of them."""

    def finish_weight_update(self) -> None:
        super().finish_weight_update()
        self.model_runner.speculator.weights_changed()


class KVSpecWorker(TimesSteps, FollowsWeights, Worker):
    """``--worker-cls`` is set to this by the speculative config."""

    def __init__(self, vllm_config, *args, **kwargs):
        require_v2(vllm_config)
        register_cuda_backend(vllm_config.speculative_config.stock_attention)
        super().__init__(vllm_config, *args, **kwargs)

    def _make_model_runner(self):
        from vllm.v1.worker.gpu.model_runner import GPUModelRunner

        from vllm_kvspec.engine.runner import KVSpecRunnerMixin

        class KVSpecModelRunner(KVSpecRunnerMixin, GPUModelRunner):
            pass

        compat.require_contract()
        with kvspec_speculator():
            return KVSpecModelRunner(self.vllm_config, self.device)
