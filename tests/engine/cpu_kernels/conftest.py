# SPDX-License-Identifier: Apache-2.0
"""Runs a launching function of vLLM twice: with our kernels, and with its own in the interpreter."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from interpreted_vllm import vllm_module

# The helper beside the tests, whatever pytest's import mode.
sys.path.append(str(Path(__file__).parent))

if torch.cuda.is_available():
    collect_ignore_glob = ["test_*.py"]


def _clone(value):
    if isinstance(value, torch.Tensor):
        # Strides matter: vLLM slices logits and buffers.
        return value.clone() if value.is_contiguous() else _same_strides(value)
    return [_clone(v) for v in value] if isinstance(value, list | tuple) else value


def _same_strides(value: torch.Tensor) -> torch.Tensor:
    length = 1 + sum((size - 1) * stride for size, stride in zip(value.shape, value.stride(), strict=True))
    return value.as_strided((length,), (1,)).clone().as_strided(value.shape, value.stride())


def _tensors(value) -> list[torch.Tensor]:
    if isinstance(value, torch.Tensor):
        return [value]
    return [t for v in value for t in _tensors(v)] if isinstance(value, list | tuple) else []


def assert_equal(ours, theirs, tolerance: float, label: str) -> None:
    found, expected = _tensors(ours), _tensors(theirs)
    assert len(found) == len(expected), label
    for i, (have, want) in enumerate(zip(found, expected, strict=True)):
        limit = tolerance if want.is_floating_point() else 0
        torch.testing.assert_close(
            have, want, rtol=limit, atol=limit, equal_nan=True, msg=lambda m, i=i: f"{label} tensor {i}: {m}"
        )


@pytest.fixture
def check():
    """check(module, function, *arguments): same results, and the same left in every argument."""

    def run(module: str, name: str, *arguments, grid=None, tolerance: float = 0.0, **keywords):
        full = "vllm.v1.worker.utils" if module == "utils" else f"vllm.v1.worker.gpu.{module}"
        sides = []
        for owner in (importlib.import_module(full), vllm_module(module)):
            copies, kw = _clone(list(arguments)), {key: _clone(value) for key, value in keywords.items()}
            function = getattr(owner, name)
            result = (function if grid is None else function[grid])(*copies, **kw)
            sides.append([result, copies, list(kw.values())])
        assert_equal(*sides, tolerance, f"{module}.{name}")
        return sides[0][0]

    return run
