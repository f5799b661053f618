# SPDX-License-Identifier: Apache-2.0
"""What vLLM would do on a GPU, found out without one: a script for a process of its own.

    python tests/engine/faked_gpu.py '[{"gpu": "B200", "max_num_seqs": 64, "speculative_config": {...}}, ...]'

vLLM's CUDA platform with its answers about the device made up and its compiled extensions empty; everything else, from
the engine's arguments to the lists of CUDA graphs, is the real code. Nothing is computed. Prints JSON, one report for
each set of arguments ("gpu": one of ``GPUS``, else the first): the attention backends, the resolved graph mode, the
graphs of the target and of the drafter, and for every number of nodes the batch of the graph that each batch gets
(None: not a full one), with LoRA also one of adapters; or the sentence that refuses them.
"""

import importlib.machinery
import json
import os
import sys
import types
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace

os.environ.update(HF_HUB_OFFLINE="1", VLLM_NO_USAGE_STATS="1", VLLM_LOGGING_LEVEL="ERROR")
ROOT = Path(__file__).parents[2]
TARGET = str(ROOT / "examples/tiny/target")
# Name, compute capability, GiB.
GPUS = {
    "H100": ("NVIDIA H100 80GB HBM3", (9, 0), 80),
    "H200": ("NVIDIA H200", (9, 0), 141),
    "A100": ("NVIDIA A100-SXM4-80GB", (8, 0), 80),
    "B200": ("NVIDIA B200", (10, 0), 180),
}


def fake_extensions() -> None:
    """Modules that need the CUDA driver, with the few names that are asked for at import."""
    for name in ("_C_stable_libtorch", "_moe_C_stable_libtorch", "_C", "_moe_C"):
        sys.modules[f"vllm.{name}"] = types.ModuleType(f"vllm.{name}")
    package = types.ModuleType("vllm.vllm_flash_attn")
    package.__path__ = []
    package.__spec__ = importlib.machinery.ModuleSpec(package.__name__, None, is_package=True)
    for name in ("compile_flash_attn_varlen_func_from_specs", "flash_attn_varlen_func", "get_scheduler_metadata"):
        setattr(package, name, lambda *args, **kwargs: None)
    interface = types.ModuleType("vllm.vllm_flash_attn.flash_attn_interface")
    interface.fa_version_unsupported_reason = lambda version: None
    interface.is_fa_version_supported = lambda version: version in (2, 3)
    package.flash_attn_interface = interface
    sys.modules[package.__name__], sys.modules[interface.__name__] = package, interface


def fake_triton_driver() -> None:
    """vLLM has Triton where exactly one driver is active, and its CPU build where there is a backend named so."""
    from triton.backends import backends

    for name, backend in backends.items():
        backend.driver.is_active = staticmethod(lambda is_nvidia=name == "nvidia": is_nvidia)
    backends["cpu"] = backends["amd"]


def fake_platform():
    """Returns the function that puts another GPU into the machine."""
    import vllm.platforms as platforms
    from vllm.platforms.cuda import CudaPlatformBase
    from vllm.platforms.interface import DeviceCapability

    class FakedGPU(CudaPlatformBase):
        get_device_capability = classmethod(lambda cls, device_id=0: DeviceCapability(*cls.faked[1]))
        get_device_name = classmethod(lambda cls, device_id=0: cls.faked[0])
        get_device_total_memory = classmethod(lambda cls, device_id=0: cls.faked[2] << 30)
        is_fully_connected = classmethod(lambda cls, ids: True)
        device_count = classmethod(lambda cls: 1)
        log_warnings = classmethod(lambda cls: None)
        get_global_graph_pool = lambda self=None: (0, 0)  # noqa: E731

    def put_in(gpu: str) -> None:
        from vllm.v1.attention.selector import _cached_get_attn_backend

        FakedGPU.faked = GPUS[gpu]
        _cached_get_attn_backend.cache_clear()

    FakedGPU.faked = next(iter(GPUS.values()))
    platforms._current_platform = FakedGPU()
    import vllm._custom_ops as custom_ops

    for name in ("scaled_mm_supports_block_fp8", "scaled_mm_supports_fp8", "scaled_mm_supports_fp4"):
        setattr(custom_ops, f"cutlass_{name}", lambda *args, **kwargs: False)
    custom_ops.cutlass_group_gemm_supported = lambda *args, **kwargs: False
    return put_in


@dataclass
class Graphs:
    """The managers of an engine, as if everything had been captured."""

    config: object
    mode: object
    target: object
    drafter: object | None


def plan(config) -> Graphs:
    """As vLLM's model runner does between loading the model and capturing."""
    import torch
    import vllm.v1.worker.gpu.cudagraph_utils as cudagraph_utils
    from vllm.config import set_current_vllm_config
    from vllm.v1.attention.selector import get_attn_backend
    from vllm.v1.kv_cache_interface import FullAttentionSpec
    from vllm.v1.worker.gpu.lora_utils import get_lora_capture_cases

    cudagraph_utils.get_pp_group = lambda: SimpleNamespace(is_first_rank=True, is_last_rank=True)
    speculative = config.speculative_config
    rows = 1 + (speculative.num_speculative_tokens if speculative else 0)
    with set_current_vllm_config(config):
        builder = get_attn_backend(128, torch.bfloat16, "auto").get_builder_cls()
        spec = FullAttentionSpec(block_size=16, num_kv_heads=2, head_size=128, head_size_v=128, dtype=torch.bfloat16)
        mode = config.compilation_config.resolve_cudagraph_mode_and_sizes(
            builder.get_cudagraph_support(config, spec), builder.__name__, rows, use_v2_model_runner=True
        )
        target = cudagraph_utils.ModelCudaGraphManager(
            config,
            torch.device("cpu"),
            mode,
            decode_query_len=rows,
            lora_capture_cases=get_lora_capture_cases(config.lora_config, config.compilation_config),
        )
        drafter = None
        if speculative:
            from vllm_kvspec.engine.draft.graphs import DrafterGraphs
            from vllm_kvspec.engine.verify.decode_graphs import plan_decode_graphs

            plan_decode_graphs(target, speculative)
            drafter = DrafterGraphs(config, torch.device("cpu"), mode)
            drafter._graphs_captured = True
        target._graphs_captured = True
    return Graphs(config, mode, target, drafter)


def report(graphs: Graphs) -> dict:
    from vllm.config import CUDAGraphMode as Mode

    from vllm_kvspec.engine.batch_sizes import max_step_rows

    config, target, drafter = graphs.config, graphs.target, graphs.drafter
    speculative = config.speculative_config
    sizes = speculative.node_sizes if speculative else [0]
    largest = config.compilation_config.max_cudagraph_capture_size

    def batches(nodes: int) -> range:
        return range(1, min(config.scheduler_config.max_num_seqs, largest // (nodes + 1)) + 1)

    def verified(batch: int, nodes: int, adapters: int = 0) -> int | None:
        graph = target.dispatch(batch, batch * (nodes + 1), nodes + 1, adapters)
        assert graph.num_active_loras >= adapters
        return graph.num_reqs if graph.cg_mode == Mode.FULL else None

    def drafted(batch: int, nodes: int) -> int | None:
        graph = drafter.dispatch_batch(batch, nodes)
        return None if graph is None else graph.num_reqs

    return {
        "backend": str(config.attention_config.backend),
        "stock_attention": getattr(speculative, "stock_attention", None),
        "mode": graphs.mode.name,
        "max_rows": max_step_rows(config),
        "full": [[g.num_reqs, g.uniform_token_count] for g in target._capture_descs.get(Mode.FULL, [])],
        "piecewise": [g.num_tokens for g in target._capture_descs.get(Mode.PIECEWISE, [])],
        "drafter": [[g.num_reqs, drafter.nodes[g.num_reqs]] for g in drafter._capture_descs.get(Mode.FULL, [])]
        if drafter
        else [],
        "verified": {nodes: [verified(batch, nodes) for batch in batches(nodes)] for nodes in sizes},
        # With 1 adapter, 2, up to all that may be in use at once.
        "adapted": [
            {nodes: [verified(batch, nodes, adapters) for batch in batches(nodes)] for nodes in sizes}
            for adapters in range(1, 1 + (config.lora_config.max_loras if config.lora_config else 0))
        ],
        "drafted": {nodes: [drafted(batch, nodes) for batch in batches(nodes)] for nodes in sizes if nodes},
    }


def main() -> None:
    fake_extensions()
    fake_triton_driver()
    put_in = fake_platform()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.model_executor.models import registry
    from vllm.plugins import load_general_plugins
    from vllm.usage.usage_lib import UsageContext

    # Not a process for each class of models.
    registry._run_in_subprocess = lambda function: function()
    load_general_plugins()
    reports = []
    for arguments in json.loads(sys.argv[1]):
        put_in(arguments.pop("gpu", next(iter(GPUS))))
        engine_args = AsyncEngineArgs(**{"model": TARGET, "dtype": "bfloat16", **arguments})
        try:
            config = engine_args.create_engine_config(UsageContext.OPENAI_API_SERVER)
        except ValueError as error:
            reports.append({"refused": str(error)})
        else:
            reports.append(report(plan(config)))
    print(json.dumps(reports))


if __name__ == "__main__":
    main()
