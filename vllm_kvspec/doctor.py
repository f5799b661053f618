# SPDX-License-Identifier: Apache-2.0
"""The doctor command: what is installed, whether the plugin takes hold in this vLLM, and whether head and target fit.

Every check runs whatever the others found, and a failed one says what to do. Without vLLM the checks that need it are
left out; training and evaluation work there.
"""

import os
import platform
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib.metadata import entry_points, version
from importlib.util import find_spec
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Column, Table

from vllm_kvspec import assistant

PACKAGES = ("torch", "transformers", "triton")
INSTALL_VLLM = "pip install 'vllm>=0.32,<0.34' (without a GPU: python tools/cpu/install.py in the source tree)"
REINSTALL = "pip install vllm-kvspec in the environment that has vLLM"
MARKS = {True: "[green]ok[/green]", False: "[red]FAILED[/red]", None: "[dim]left out[/dim]"}
# The kernels use bf16 and asynchronous copies.
LEAST_CAPABILITY = (8, 0)


@dataclass(frozen=True)
class Finding:
    """One line: ``ok`` is None for a check that could not be made, ``do`` what to do when it failed."""

    name: str
    ok: bool | None
    found: str
    do: str = ""


def check(name: str, do: str, look: Callable[[], str]) -> Finding:
    """``look`` returns what it found, or raises: then the check failed, and ``do`` is the advice."""
    try:
        return Finding(name, True, look())
    # Whatever a broken installation raises is the finding.
    except Exception as error:
        return Finding(name, False, _message(error), do)


def _message(error: Exception) -> str:
    """The sentence in an error; pydantic wraps those of our config in many lines."""
    if isinstance(error, ValueError) and hasattr(error, "errors"):
        return "; ".join(entry["msg"].removeprefix("Value error, ") for entry in error.errors())
    return str(error) if isinstance(error, ValueError | RuntimeError | OSError) else repr(error)


def findings(target_model: str | None = None, draft_model: str | None = None) -> Iterator[Finding]:
    """All checks, in the order in which a problem is best looked for."""
    yield check("vllm-kvspec", REINSTALL, _own_version)
    for package in PACKAGES:
        yield check(package, f"pip install {package}", lambda package=package: version(package))
    has_vllm = find_spec("vllm") is not None
    needs_vllm = [
        ("vLLM in the supported range", INSTALL_VLLM, _vllm_version),
        ("plugin's entry point", f"{REINSTALL}; VLLM_PLUGINS, when set, must contain kvspec", _entry_point),
        ("plugin registers", INSTALL_VLLM, _register),
        ("vLLM's names that are overridden", INSTALL_VLLM, _contract),
        ("kernels", "unset VLLM_KVSPEC_KERNELS", _kernels),
    ]
    if not has_vllm:
        yield Finding("vLLM", False, "not installed: nothing can be served; training and eval work", INSTALL_VLLM)
    for name, do, look in needs_vllm:
        yield check(name, do, look) if has_vllm else Finding(name, None, "needs vLLM")
    yield check("GPU", "use a GPU of compute capability 8.0 or more, or none", _gpu)
    if target_model:
        yield check("target", "give a directory or Hugging Face name of a causal LM", lambda: _target(target_model))
    if draft_model:
        yield check("head", "copy or train it again (vllm-kvspec train)", lambda: _head(draft_model))
    if target_model and draft_model:
        use_fitting = "use the head that was trained for this target"
        yield check("head fits target", use_fitting, lambda: _fits(target_model, draft_model))
    if target_model:
        name = "vLLM accepts the pair" if draft_model else "vLLM accepts the target"
        do = "serve another one; the README's limits list what is refused"
        yield (
            check(name, do, lambda: _accepted(target_model, draft_model))
            if has_vllm
            else Finding(name, None, "needs vLLM")
        )


def _own_version() -> str:
    from vllm_kvspec import __version__

    return f"{__version__}, Python {platform.python_version()}"


def _vllm_version() -> str:
    import vllm

    from vllm_kvspec.engine.hooks.compat import version_problem

    if problem := version_problem():
        raise RuntimeError(problem)
    return vllm.__version__


def _entry_point() -> str:
    points = [point for point in entry_points(group="vllm.general_plugins") if point.name == "kvspec"]
    if not points:
        raise RuntimeError("vLLM sees no plugin kvspec")
    allowed = os.environ.get("VLLM_PLUGINS")
    if allowed is not None and "kvspec" not in allowed.split(","):
        raise RuntimeError(f"VLLM_PLUGINS={allowed} leaves kvspec out")
    return points[0].value


def _register() -> str:
    from vllm.engine.arg_utils import EngineArgs

    from vllm_kvspec.engine.hooks.plugin import register

    register()
    for name in ("create_speculative_config", "add_cli_args"):
        if not hasattr(getattr(EngineArgs, name), "kvspec_original"):
            raise RuntimeError(f"EngineArgs.{name} is not replaced")
    return "method kvspec is known"


def _contract() -> str:
    from vllm.platforms import current_platform

    from vllm_kvspec.engine.hooks import compat

    if current_platform.is_cpu():
        # Has to come before anything below vllm.v1.worker.gpu.
        import vllm.v1.worker.cpu.shm  # noqa: F401
    if problems := compat.contract_problems():
        raise RuntimeError("; ".join(problems))
    return f"{len(compat.RUNNER_CONTRACT)} names, as expected"


def _kernels() -> str:
    from vllm_kvspec.engine.ops import USE_COMPILED, USE_TRITON

    if USE_COMPILED:
        return "compiled for this CPU (numba)"
    if not USE_TRITON:
        return "torch (the reference implementations)"
    return "Triton's interpreter (slow)" if os.environ.get("TRITON_INTERPRET") == "1" else "Triton"


def _gpu() -> str:
    import torch

    if not torch.cuda.is_available():
        seen = " (nvidia-smi is there, but torch sees no device)" if shutil.which("nvidia-smi") else ""
        units = torch.cpu.get_capabilities()
        slow = "" if any(units[key] for key in units if key.endswith("bf16")) else "; bfloat16 is slow: --dtype float32"
        return f"no GPU{seen}: CPU{slow}"
    capability = torch.cuda.get_device_capability()
    if capability < LEAST_CAPABILITY:
        raise RuntimeError(f"compute capability {capability[0]}.{capability[1]}, needs 8.0 or more")
    import triton

    backend = triton.runtime.driver.active.get_current_target()
    return f"{torch.cuda.get_device_name()}, {backend.backend} {backend.arch}, CUDA {torch.version.cuda}"


def _fingerprint(target_model: str) -> dict:
    from transformers import AutoConfig, AutoTokenizer

    from vllm_kvspec.config import target_fingerprint

    config = AutoConfig.from_pretrained(target_model).get_text_config()
    fingerprint = target_fingerprint(config, AutoTokenizer.from_pretrained(target_model))
    return fingerprint | {"name_or_path": target_model}


def _target(target_model: str) -> str:
    found = _fingerprint(target_model)
    heads, sizes = (_numbers(found[key]) for key in ("num_key_value_heads", "head_dim"))
    shape = f"{found['num_hidden_layers']} layers, {heads} KV heads of {sizes}"
    return f"{', '.join(found['architectures'])}: {shape}"


def _numbers(of_layers: int | list[int]) -> str:
    """One number for all layers, or those that they have."""
    return " or ".join(map(str, sorted({*of_layers}))) if isinstance(of_layers, list) else str(of_layers)


def _assistant(draft_model: str) -> Any:
    """The config of a published assistant, None for a head of ours."""
    from transformers import AutoConfig

    return AutoConfig.from_pretrained(draft_model) if assistant.is_assistant(draft_model) else None


def _head(draft_model: str) -> str:
    if config := _assistant(draft_model):
        clusters = f"the best {config.centroid_intermediate_top_k} of {config.num_centroids} clusters of the vocabulary"
        scored = clusters if config.use_ordered_embeddings else "the whole vocabulary"
        return f"assistant of {config.text_config.num_hidden_layers} layers, scores {scored}"

    from vllm_kvspec.models.draft_head import KVSpecDraftModel

    head, loaded = KVSpecDraftModel.from_pretrained(draft_model, output_loading_info=True)
    if loaded["missing_keys"]:
        raise ValueError(f"the weights lack {', '.join(sorted(loaded['missing_keys']))}")
    config = head.config
    return (
        f"context {config.context}, {config.num_hidden_layers} layers, blocks of {config.draft_block_size}, "
        f"{head.num_parameters() / 1e6:.1f}M parameters"
    )


def _fits(target_model: str, draft_model: str) -> str:
    if config := _assistant(draft_model):
        from transformers import AutoConfig

        layers = assistant.source_layers(config, AutoConfig.from_pretrained(target_model).get_text_config())
        return f"its sizes are the target's; it reads layers {', '.join(map(str, layers))}"

    from vllm_kvspec.config import KVSpecDraftConfig, check_fingerprint

    check_fingerprint(KVSpecDraftConfig.from_pretrained(draft_model), _fingerprint(target_model))
    return "shape, RoPE and tokenizer are those it was trained for"


def _accepted(target_model: str, draft_model: str | None) -> str:
    """The whole of vLLM's own configuration, every refusal of ours included; no weights are loaded."""
    from vllm.engine.arg_utils import EngineArgs

    spec = {"method": "kvspec"} | ({"model": draft_model} if draft_model else {})
    config = EngineArgs(model=target_model, speculative_config=spec).create_engine_config()
    spec = config.speculative_config
    drafts = ', drafter "recycle" (a trained head gets more accepted: vllm-kvspec train)'
    if draft_model:
        drafts = ", grafted with what the target has said" * spec.graft
    return f"{spec.num_speculative_tokens} tokens per step by default{drafts}"


def doctor(target_model: str | None = None, draft_model: str | None = None) -> bool:
    """Print the findings as a table and below it what to do; returns whether none failed."""
    found = list(findings(target_model, draft_model))
    failed = [finding for finding in found if finding.ok is False]
    table = Table("check", "", Column("found", overflow="fold"), title="vllm-kvspec doctor")
    for finding in found:
        table.add_row(finding.name, MARKS[finding.ok], escape(finding.found))
    console = Console()
    console.print(table)
    for finding in failed:
        console.print(f"[bold]{escape(finding.name)}[/bold]: {escape(finding.do)}", soft_wrap=True)
    return not failed
