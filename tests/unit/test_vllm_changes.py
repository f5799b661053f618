# SPDX-License-Identifier: Apache-2.0
"""The list that a version bump starts from: which touched names are gone, have other parameters, or another body."""

import importlib.util
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def tool():
    spec = importlib.util.spec_from_file_location("vllm_changes", ROOT / "tools" / "vllm_changes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def sources(tool, root: Path, config: str, runner: str):
    for name, text in {"__init__": "", "config/__init__": "from .speculative import *\n", "runner": runner}.items():
        file = root / "vllm" / f"{name}.py"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    (root / "vllm/config/speculative.py").write_text(f"class SpeculativeConfig:\n    method: str\n{config}")
    return tool.Sources(root)


OLD = """
class Base:
    def inherited(self): return 1
class Runner(Base):
    def same(self): return 1
    def signature(self, a): return 1
    def meaning(self): return 1
    def gone(self): return 1
def function(): return 1
"""
NEW = '''
from vllm.moved import function
class Base:
    def inherited(self): return 2
class Runner(Base):
    def same(self):
        """A docstring, and a comment."""  # are no change
        return 1
    def signature(self, a, b): return 1
    def meaning(self): return 2
'''


def test_what_changed_is_listed(tool, tmp_path, monkeypatch):
    old = sources(tool, tmp_path / "old", "    key: int = 1\n", OLD)
    new = sources(tool, tmp_path / "new", "    key: int = 2\n    other: int = 1\n", NEW)
    (tmp_path / "new/vllm/moved.py").write_text("def function(): return 1\n")
    names = ("same", "signature", "meaning", "gone", "inherited", "never_there")
    touched = [("vllm.runner", f"Runner.{name}") for name in names] + [("vllm.runner", "function")]
    monkeypatch.setattr(tool, "touched_names", lambda: touched)
    assert list(tool.report(old, new)) == [
        "vllm.runner.Runner.gone: GONE",
        "vllm.runner.Runner.inherited: body changed",
        "vllm.runner.Runner.meaning: body changed",
        "vllm.runner.Runner.signature: PARAMETERS (self, a) -> (self, a, b)",
        "7 names looked up",
        "speculative_config key key: int = 1 -> int = 2",
        "speculative_config key other: not there -> int = 1",
    ]


def test_every_name_of_the_contract_is_found_here(tool):
    """In the installed vLLM, without importing it: what the tool cannot find it would never report."""
    installed = tool.Sources(Path(importlib.util.find_spec("vllm").origin).parents[1])
    assert [name for name in tool.contract() if installed.find(*name) is None] == []
    touched = set(tool.touched_names())
    assert ("vllm.v1.worker.gpu.spec_decode.rejection_sampler", "RejectionSampler.__call__") in touched
    assert ("vllm.config", "SpeculativeConfig.__post_init__") in touched
