# SPDX-License-Identifier: Apache-2.0
"""Every vLLM symbol we replace, with target, why, upstream, and when to remove. All are idempotent.

Two more replacements are scoped and live where they act: ``worker.py`` swaps the module global ``init_speculator``
(process-local, only in kvspec workers), and ``cpu/worker.py`` swaps ``CPUModelRunner`` while the device initialises.
"""

import json
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path
from typing import Any, Literal, get_args

from vllm_kvspec.engine.hooks import compat

METHOD = "kvspec"
CPU_WORKERS = "vllm_kvspec.engine.cpu.worker."


def _wrap_create_speculative_config(build: Callable[..., Any]) -> None:
    """Target: ``EngineArgs.create_speculative_config`` (vllm/engine/arg_utils.py).

    Why: ``SpeculativeConfig.method`` is a closed Literal and the dataclass forbids extra keys; this function is the
    only place that builds it from the user's flags. Upstream: no registry of speculative methods in 0.33. Remove when
    vLLM lets a plugin register one.
    """
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_speculative_config
    original = getattr(original, "kvspec_original", original)

    @wraps(original)
    def create_speculative_config(self, target_model_config, target_parallel_config):
        if isinstance(self.speculative_config, str):
            self.speculative_config = parse_speculative_config(self.speculative_config)
        if asked_method(self) != METHOD:
            return original(self, target_model_config, target_parallel_config)
        return build(self, target_model_config, target_parallel_config)

    create_speculative_config.kvspec_original = original
    EngineArgs.create_speculative_config = create_speculative_config


def parse_speculative_config(text: str) -> dict[str, Any]:
    """``speculative_config`` as the command line takes it, given in Python. Raises ValueError."""
    try:
        parsed = json.loads(text)
    except json.JSONDecodeError as error:
        raise ValueError(f"speculative_config must be a dict or a JSON object; found {text!r}: {error}") from error
    if not isinstance(parsed, dict):
        raise ValueError(f"speculative_config must be a dict or a JSON object; found {text!r}.")
    return parsed


def asked_method(engine_args: Any) -> str | None:
    """The speculative method that the user asks for. A head of ours needs no ``method``: its config.json names it."""
    settings = engine_args.speculative_config or {}
    method = engine_args.spec_method or settings.get("method")
    model = engine_args.spec_model or settings.get("model")
    if method is not None or model is None:
        return method
    return METHOD if _config_of(model, settings.get("revision")).get("model_type") == METHOD else None


def _config_of(model: str, revision: str | None = None) -> dict[str, Any]:
    """A model's config.json; empty where there is none to read, of which vLLM says what is wrong."""
    from transformers import PreTrainedConfig

    try:
        return PreTrainedConfig.get_config_dict(model, revision=revision)[0]
    except (OSError, ValueError):
        return {}


def accept_kvspec() -> None:
    """Build our own config when the user asks for ``method="kvspec"``."""

    def build(engine_args, target_model_config, target_parallel_config):
        from vllm_kvspec.engine.config.selection import create_kvspec_config

        return create_kvspec_config(engine_args, target_model_config, target_parallel_config)

    _wrap_create_speculative_config(build)


def refuse_kvspec(problem: str) -> None:
    """Leave plain vLLM alone, and answer ``method="kvspec"`` with ``problem``."""

    def build(*args):
        raise ValueError(problem)

    _wrap_create_speculative_config(build)


def offer_spec_method() -> None:
    """Target: ``EngineArgs.add_cli_args``.

    Why: the choices of ``--spec-method`` are the same closed Literal. Upstream and removal: as above.
    """
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.add_cli_args
    if hasattr(original, "kvspec_original"):
        return

    @wraps(original)
    def add_cli_args(parser):
        parser = original(parser)
        for action in parser._actions:
            if "--spec-method" in action.option_strings and action.choices and METHOD not in action.choices:
                action.choices = [*action.choices, METHOD]
        return parser

    add_cli_args.kvspec_original = original
    EngineArgs.add_cli_args = staticmethod(add_cli_args)


def serve_heads_by_their_name() -> None:
    """Target: ``vllm.engine.arg_utils.maybe_override_with_speculators``, the module global.

    Why: ``vllm serve HEAD`` takes the target from the head's config.json. A head on this disk may name a directory, as
    seen from where it was trained or beside itself, and 0.33 refuses directories. Upstream: names of repositories only,
    so that a downloaded checkpoint cannot name a local one; heads that are no directory are left to it. Remove when
    vLLM resolves a local head's verifier against the head's directory.
    """
    import vllm.engine.arg_utils as arg_utils

    original = arg_utils.maybe_override_with_speculators
    if hasattr(original, "kvspec_original"):
        return

    @wraps(original)
    def maybe_override_with_speculators(model, **kwargs):
        found = _config_of(model) if Path(model).is_dir() else {}
        if found.get("model_type") != METHOD:
            return original(model, **kwargs)
        from vllm_kvspec.config import find_target

        asked = kwargs.get("vllm_speculative_config") or {}
        asked = parse_speculative_config(asked) if isinstance(asked, str) else asked
        target = find_target(model, found["speculators_config"]["verifier"]["name_or_path"])
        return target, target, {**asked, "method": METHOD, "model": model}

    maybe_override_with_speculators.kvspec_original = original
    arg_utils.maybe_override_with_speculators = maybe_override_with_speculators


def sample_with_min_p_and_logit_bias() -> None:
    """Target: ``SamplingParams._validate_spec_decode``.

    Why: it refuses both with any speculative method. Ours samples every tree row with vLLM's own sampler, which applies
    them, and needs no draft probabilities that they would have to be applied to as well. Upstream: a restriction of
    ratio-based rejection sampling. Remove when it is asked of the method.
    """
    from vllm import SamplingParams

    original = SamplingParams._validate_spec_decode
    if hasattr(original, "kvspec_original"):
        return

    @wraps(original)
    def _validate_spec_decode(self, speculative_config):
        if getattr(speculative_config, "method", None) != METHOD:
            original(self, speculative_config)

    _validate_spec_decode.kvspec_original = original
    SamplingParams._validate_spec_decode = _validate_spec_decode


def allow_async_scheduling() -> None:
    """0.32 only. Target: ``vllm.config.vllm.EagleModelTypes``, the module global only.

    Why: VllmConfig turns asynchronous scheduling off for methods outside this Literal. Our drafts stay on the device
    and are fixed in number, which is all that asynchronous scheduling needs. Upstream: 0.33 applies the list to the V1
    runner only. Remove when 0.32 is no longer supported.
    """
    if compat.installed_minor() >= (0, 33):
        return
    import vllm.config.vllm as vllm_config_module

    types = getattr(vllm_config_module, "EagleModelTypes", None)
    if types is not None and METHOD not in get_args(types):
        vllm_config_module.EagleModelTypes = Literal[types, METHOD]


def rebind_kernels_beside_numba() -> None:
    """Target: ``vllm.triton_utils.dispatcher._rebind_kernels``.

    Why: on CPU it asks every attribute of every loaded module for its ``__dict__``, and one of llvmlite's answers with
    something else (``llvmlite.binding.ffi.lib`` takes any name for a function of the library): a worker cannot start
    in a process that has imported numba. Upstream: not reported. Remove when the scan skips what is no dict.
    """
    from vllm.triton_utils import dispatcher

    original = dispatcher._rebind_kernels
    if hasattr(original, "kvspec_original"):
        return

    @wraps(original)
    def _rebind_kernels(overrides):
        hidden = sys.modules.pop("llvmlite.binding.ffi", None)
        try:
            original(overrides)
        finally:
            if hidden is not None:
                sys.modules["llvmlite.binding.ffi"] = hidden

    _rebind_kernels.kvspec_original = original
    dispatcher._rebind_kernels = _rebind_kernels


def run_v2_without_triton() -> None:
    """Target: ``VllmConfig.use_v2_model_runner`` and ``VllmConfig._validate_v2_model_runner``, for our CPU workers.

    Why: both refuse Model Runner V2 where vLLM has no Triton. Our CPU workers replace every kernel it would launch
    (``engine/cpu/kernels``), as vLLM's CPU platform does for V1, so on CPU no Triton is needed. Upstream: no such
    replacements for V2. Remove when vLLM's CPU platform runs V2.
    """
    from vllm.config import VllmConfig
    from vllm.config import vllm as module

    if hasattr(VllmConfig._validate_v2_model_runner, "kvspec_original"):
        return

    def with_triton(original: Callable[[Any], Any]) -> Callable[[Any], Any]:
        @wraps(original)
        def call(config):
            if not config.parallel_config.worker_cls.startswith(CPU_WORKERS):
                return original(config)
            has_triton = module.HAS_TRITON
            module.HAS_TRITON = True
            try:
                return original(config)
            finally:
                module.HAS_TRITON = has_triton

        call.kvspec_original = original
        return call

    VllmConfig.use_v2_model_runner = property(with_triton(VllmConfig.use_v2_model_runner.fget))
    VllmConfig._validate_v2_model_runner = with_triton(VllmConfig._validate_v2_model_runner)
