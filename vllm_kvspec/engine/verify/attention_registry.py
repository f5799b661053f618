# SPDX-License-Identifier: Apache-2.0
"""Registers our attention backends, in the processes that serve kvspec and in no other."""

import contextlib

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend
from vllm.v1.attention.selector import _cached_get_attn_backend

# By the stock backend that runs the rows which are on no tree.
CUDA_BACKENDS = {
    "FLASH_ATTN": "vllm_kvspec.engine.verify.attention_cuda.FlashTreeBackend",
    "TRITON_ATTN": "vllm_kvspec.engine.verify.attention_cuda.TritonTreeBackend",
}


def register_cuda_backend(stock: str) -> None:
    """CUSTOM is the enum member vLLM keeps for plugins. ``stock`` is a key of `CUDA_BACKENDS`."""
    register_backend(AttentionBackendEnum.CUSTOM, CUDA_BACKENDS[stock])
    # vLLM remembers the class by the layer's shape alone; an engine before may have had the other one.
    _cached_get_attn_backend.cache_clear()


@contextlib.contextmanager
def cpu_backend():
    """The backend of the attention layers built inside.

    The CPU platform resolves CPU_ATTN whatever is asked for, so that is the member we override, while our worker loads
    its model: another engine in the same process must get vLLM's own.
    """
    register_backend(AttentionBackendEnum.CPU_ATTN, "vllm_kvspec.engine.verify.attention_cpu.CPUTreeAttentionBackend")
    _cached_get_attn_backend.cache_clear()
    try:
        yield
    finally:
        AttentionBackendEnum.CPU_ATTN.clear_override()
        _cached_get_attn_backend.cache_clear()
