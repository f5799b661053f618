# SPDX-License-Identifier: Apache-2.0
"""CUDA graphs in an engine on CPU: vLLM's own managers plan, capture and replay them, as recorded graphs.

An engine then starts as on a GPU: graphs are captured for a measurement with a small KV cache, thrown away, and
captured again. Its attention is what a GPU has, our CUDA backend, over a stock one that is the CPU's op without trees.
Graphs of mixed batches are out: they need a compiled model.
"""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from recorded_graphs import RecordedGraph, capture, launch
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType
from vllm.v1.worker import workspace
from vllm.v1.worker.cpu_worker import CPUWorker

from vllm_kvspec.engine import ops
from vllm_kvspec.engine.target_kv import split_kv
from vllm_kvspec.engine.verify import attention_cpu
from vllm_kvspec.engine.verify.attention import attend
from vllm_kvspec.engine.verify.attention_cpu import (
    CPUTreeAttentionBackend,
    CPUTreeAttentionImpl,
    CPUTreeMetadataBuilder,
)
from vllm_kvspec.engine.verify.attention_cuda import TreeAttention, TreeMetadataBuilder

WITH_GRAPHS = {
    "enforce_eager": False,
    "compilation_config": {"mode": 0, "cudagraph_mode": "FULL_DECODE_ONLY"},
    # Without graphs there is none either.
    "kernel_config": {"enable_jit_warmup": False},
}
# What does its work outside of torch's operations.
KERNELS = [name for name in ops.__all__ if not name.startswith("USE_") and name != "fixed_linear"]


class StockMetadataBuilder(CPUTreeMetadataBuilder):
    def build(self, common_prefix_len, common_attn_metadata, fast_build=False):
        metadata = super().build(common_prefix_len, common_attn_metadata, fast_build)
        state = self.tree_state
        nowhere = SimpleNamespace(batch_mask=state.batch_mask, batch_len=torch.zeros_like(state.batch_len))
        return replace(metadata, tree_state=nowhere)


class StockAttention(CPUTreeAttentionImpl):
    alibi_slopes, attn_type = None, AttentionType.DECODER

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.sliding_window = (self.sliding_window - 1, 0) if self.sliding_window else (-1, -1)

    def forward(self, layer, query, key, value, kv_cache, attn_metadata, output, *scales):
        if attn_metadata is None:
            return output.fill_(0)
        attend(self, query, *split_kv(kv_cache, self.head_size), attn_metadata, self.sliding_window[0] + 1, output)
        return output


class GraphMetadataBuilder(TreeMetadataBuilder, StockMetadataBuilder):
    pass


class GraphAttention(TreeAttention, StockAttention):
    pass


class GraphBackend(CPUTreeAttentionBackend):
    get_impl_cls = staticmethod(lambda: GraphAttention)
    get_builder_cls = staticmethod(lambda: GraphMetadataBuilder)


def install(patch: pytest.MonkeyPatch) -> dict:
    """Returns the engine arguments that ask for graphs."""
    patch.setattr(torch.cuda, "CUDAGraph", RecordedGraph)
    patch.setattr(torch.cuda, "graph", capture)
    for name in KERNELS:
        patch.setattr(ops, name, launch(getattr(ops, name)))
    patch.setattr(attention_cpu, "store_kv", launch(attention_cpu.store_kv))
    patch.setattr(attention_cpu, "CPUTreeAttentionBackend", GraphBackend)
    _install_platform(patch)
    _install_worker(patch)
    return WITH_GRAPHS


def _install_platform(patch: pytest.MonkeyPatch) -> None:
    platform = type(current_platform)
    check = platform.check_and_update_config.__func__

    def keep_sizes(cls, vllm_config):
        compilation = vllm_config.compilation_config
        sizes = compilation.cudagraph_capture_sizes
        check(cls, vllm_config)
        compilation.cudagraph_capture_sizes = sizes

    patch.setattr(platform, "check_and_update_config", classmethod(keep_sizes))
    patch.setattr(platform, "support_static_graph_mode", classmethod(lambda cls: True))
    patch.setattr(platform, "_global_graph_pool", None)
    patch.setattr(platform, "graph_pool_handle", lambda self=None: (0, 0), raising=False)
    # Attention as one operation of Python's would hide what it launches.
    patch.setattr(platform, "opaque_attention_op", classmethod(lambda cls: False))


def _install_worker(patch: pytest.MonkeyPatch) -> None:
    """The CPU's worker leaves out what vLLM's GPU worker does with graphs."""
    determine_available_memory, warm_up = CPUWorker.determine_available_memory, CPUWorker.compile_or_warm_up_model

    def measure(self):
        patch.setattr(workspace, "_manager", None)
        workspace.init_workspace_manager(self.device)
        self.model_runner.profile_cudagraph_memory()
        return determine_available_memory(self)

    def capture_and_warm_up(self):
        self.model_runner.capture_model()
        return warm_up(self)

    patch.setattr(CPUWorker, "determine_available_memory", measure)
    patch.setattr(CPUWorker, "compile_or_warm_up_model", capture_and_warm_up)
