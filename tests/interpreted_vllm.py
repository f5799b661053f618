# SPDX-License-Identifier: Apache-2.0
"""vLLM's own Triton kernels in Triton's interpreter, where vLLM itself runs without Triton.

Without a GPU vLLM's ``triton.jit`` is a placeholder. ``vllm_module`` imports a second copy of the modules that hold
kernels, with the real Triton, and leaves the first copy as everyone else sees it.
"""

import importlib
import sys
import types
from functools import cache

import torch

_GPU = "vllm.v1.worker.gpu"
_COPIED = (_GPU, "vllm.v1.worker.utils")
MODULES = (
    "block_table",
    "buffer_utils",
    "input_batch",
    "metrics.logits",
    "model_states.prompt_embeds",
    "sample.bad_words",
    "sample.gumbel",
    "sample.logit_bias",
    "sample.logprob",
    "sample.min_p",
    "sample.output",
    "sample.penalties",
    "sample.prompt_logprob",
    "sample.thinking_budget",
    "spec_decode.rejection_sampler",
    "structured_outputs",
)


def vllm_module(name: str):
    """The module of that name below ``vllm.v1.worker.gpu`` (or "utils" beside it), whose kernels can be launched."""
    full = "vllm.v1.worker.utils" if name == "utils" else f"{_GPU}.{name}"
    return importlib.import_module(full) if torch.cuda.is_available() else _copies()[full]


def _is_copied(name: str) -> bool:
    return any(name == root or name.startswith(root + ".") for root in _COPIED)


def _real_triton() -> types.ModuleType:
    import triton
    import triton.language as tl
    from triton.language.extra import libdevice
    from vllm import triton_utils

    # The interpreter runs one program at a time.
    tl.debug_barrier = lambda: None
    module = types.ModuleType("vllm.triton_utils")
    module.__dict__.update(vars(triton_utils))
    module.__dict__.update(triton=triton, tl=tl, tldevice=libdevice, HAS_TRITON=True)
    return module


@cache
def _copies() -> dict[str, types.ModuleType]:
    # Replaces torch.cuda streams and events; must come before anything below vllm.v1.worker.gpu.
    import vllm.v1.worker.cpu.shm  # noqa: F401

    # Whatever these import must not see the other Triton.
    for name in MODULES:
        importlib.import_module(f"{_GPU}.{name}")
    worker = importlib.import_module("vllm.v1.worker")
    kept = {name: module for name, module in sys.modules.items() if _is_copied(name)}
    attributes = {name: getattr(worker, name) for name in ("gpu", "utils")}
    placeholder = sys.modules["vllm.triton_utils"]
    try:
        sys.modules["vllm.triton_utils"] = _real_triton()
        for name in kept:
            del sys.modules[name]
        for name in MODULES:
            importlib.import_module(f"{_GPU}.{name}")
        return {name: module for name, module in sys.modules.items() if _is_copied(name)}
    finally:
        sys.modules["vllm.triton_utils"] = placeholder
        for name in [name for name in sys.modules if _is_copied(name)]:
            del sys.modules[name]
        sys.modules.update(kept)
        vars(worker).update(attributes)
