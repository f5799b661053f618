# SPDX-License-Identifier: Apache-2.0
"""The ``vllm.general_plugins`` entry point named ``kvspec``.

vLLM calls ``register`` once per process: front-end, engine core, workers, and the model-inspection subprocess. It must
be quick, idempotent, and free of worker imports (on CPU, ``vllm.v1.worker.cpu.shm`` has to be imported before anything
below ``vllm.v1.worker.gpu``).
"""


def register() -> None:
    """Make ``{"method": "kvspec"}`` known to vLLM. Changes nothing for any other method."""
    from vllm_kvspec.engine.hooks import compat, patches

    if problem := compat.version_problem():
        patches.refuse_kvspec(problem)
        return

    from transformers import AutoConfig
    from vllm import ModelRegistry

    from vllm_kvspec.config import KVSpecDraftConfig

    AutoConfig.register(KVSpecDraftConfig.model_type, KVSpecDraftConfig, exist_ok=True)
    # A string: the class is imported by whoever needs it, not by every process.
    ModelRegistry.register_model("KVSpecDraftModel", "vllm_kvspec.engine.draft.head:KVSpecDraftModel")
    ModelRegistry.register_model("KVSpecGemma4Assistant", "vllm_kvspec.engine.draft.assistant:Gemma4Assistant")
    patches.accept_kvspec()
    patches.offer_spec_method()
    patches.serve_heads_by_their_name()
    patches.sample_with_min_p_and_logit_bias()
    patches.allow_async_scheduling()
    patches.run_v2_without_triton()
    patches.rebind_kernels_beside_numba()
