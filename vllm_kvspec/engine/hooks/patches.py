# SPDX-License-Identifier: Apache-2.0
"""Every vLLM symbol we replace, with target, why, upstream, and when to remove. All are idempotent.

Two more replacements are scoped and live where they act: ``worker.py`` swaps the module global ``init_speculator``
(process-local, only in kvspec workers), and ``cpu/worker.py`` swaps ``CPUModelRunner`` while the device initialises.
"""

from collections.abc import Callable
from functools import wraps
from typing import Any, Literal, get_args

METHOD = "kvspec"


def _wrap_create_speculative_config(build: Callable[..., Any]) -> None:
    """Target: ``EngineArgs.create_speculative_config`` (vllm/engine/arg_utils.py).

    Why: ``SpeculativeConfig.method`` is a closed Literal and the dataclass forbids extra keys; this function is the
    only place that builds it from the user's flags. Upstream: no registry of speculative methods in 0.32. Remove when
    vLLM lets a plugin register one.
    """
    from vllm.engine.arg_utils import EngineArgs

    original = EngineArgs.create_speculative_config
    original = getattr(original, "kvspec_original", original)

    @wraps(original)
    def create_speculative_config(self, target_model_config, target_parallel_config):
        method = self.spec_method or (self.speculative_config or {}).get("method")
        if method != METHOD:
            return original(self, target_model_config, target_parallel_config)
        return build(self, target_model_config, target_parallel_config)

    create_speculative_config.kvspec_original = original
    EngineArgs.create_speculative_config = create_speculative_config


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


def allow_async_scheduling() -> None:
    """Target: ``vllm.config.vllm.EagleModelTypes``, the module global only.

    Why: VllmConfig turns asynchronous scheduling off for methods outside this Literal. Our drafts stay on the device
    and are fixed in number, which is all that asynchronous scheduling needs. Upstream: 0.33 applies the list to the V1
    runner only. Remove when 0.32 is no longer supported.
    """
    import vllm.config.vllm as vllm_config_module

    types = getattr(vllm_config_module, "EagleModelTypes", None)
    if types is not None and METHOD not in get_args(types):
        vllm_config_module.EagleModelTypes = Literal[types, METHOD]
