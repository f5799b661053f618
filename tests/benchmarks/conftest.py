# SPDX-License-Identifier: Apache-2.0
"""The benchmarks are scripts: their directory must be importable."""

import sys
from pathlib import Path

import pytest

DIRECTORY = str(Path(__file__).parents[2] / "benchmarks")


@pytest.fixture(autouse=True)
def benchmarks_on_path(monkeypatch):
    monkeypatch.syspath_prepend(DIRECTORY)
    yield
    # Their names are common ones; no other test should find these modules.
    for name, module in list(sys.modules.items()):
        if str(getattr(module, "__file__", "") or "").startswith(DIRECTORY):
            del sys.modules[name]
