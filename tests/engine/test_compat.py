# SPDX-License-Identifier: Apache-2.0
"""The self-check of what we override, and the refusal of other vLLM versions."""

import pytest
import vllm
from engine_runner import TARGET
from vllm.engine.arg_utils import EngineArgs

from vllm_kvspec.engine.hooks import compat, patches, plugin


def test_this_vllm_has_everything():
    assert compat.contract_problems() == []


def test_a_changed_vllm_is_named():
    contract = {
        ("vllm.v1.worker.gpu_worker", "Worker._make_model_runner"): ("self", "no_such_parameter"),
        ("vllm.v1.worker.gpu_worker", "Worker.no_such_method"): ("self",),
    }
    problems = compat.contract_problems(contract)
    assert "no parameter no_such_parameter" in problems[0]
    assert "Worker.no_such_method does not exist" in problems[1]


@pytest.mark.parametrize(
    ("version", "fits"),
    [("0.32.0+cpu", True), ("0.33.7", True), ("0.34.0", False), ("0.34.0rc1", False), ("0.31.1", False)],
)
def test_version(monkeypatch, version, fits):
    monkeypatch.setattr(vllm, "__version__", version)
    assert (compat.version_problem() is None) is fits


def test_another_version_refuses_only_kvspec(monkeypatch):
    """Plain vLLM goes on working under a version we do not know; asking for kvspec gets the reason."""
    monkeypatch.setattr(vllm, "__version__", "0.34.0")
    try:
        plugin.register()
        arguments = EngineArgs(model=TARGET, speculative_config={"method": "kvspec", "model": "head"})
        with pytest.raises(ValueError, match=r"supports vllm>=0.32,<0.34; found 0.34.0.*Install `vllm>=0.32"):
            arguments.create_speculative_config(None, None)
        arguments.speculative_config = None
        assert arguments.create_speculative_config(None, None) is None
    finally:
        monkeypatch.undo()
        plugin.register()


def test_registering_twice_wraps_once():
    plugin.register()
    plugin.register()
    original = EngineArgs.create_speculative_config.kvspec_original
    assert not hasattr(original, "kvspec_original")


def test_async_scheduling_list():
    """Replaced in 0.32 only; what it is for: test_config.py::test_scheduling_is_asynchronous."""
    from typing import get_args

    import vllm.config.vllm as module

    patches.allow_async_scheduling()
    names = get_args(module.EagleModelTypes)
    assert ("kvspec" in names) is (compat.installed_minor() == (0, 32))
    assert "eagle" in names
