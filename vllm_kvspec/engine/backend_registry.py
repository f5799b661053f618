# SPDX-License-Identifier: Apache-2.0
"""Registers our attention backends, in the processes that serve kvspec and in no other."""

from vllm.v1.attention.backends.registry import AttentionBackendEnum, register_backend


def register_cuda_backend() -> None:
    """CUSTOM is the enum member vLLM keeps for plugins."""
    register_backend(AttentionBackendEnum.CUSTOM, "vllm_kvspec.engine.attention.TreeAttentionBackend")


def register_cpu_backend() -> None:
    """The CPU platform resolves CPU_ATTN whatever is asked for, so that is the member we override, in our worker."""
    register_backend(AttentionBackendEnum.CPU_ATTN, "vllm_kvspec.engine.attention_cpu.CPUTreeAttentionBackend")
