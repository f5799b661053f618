# SPDX-License-Identifier: Apache-2.0
"""Test set-up: Triton's interpreter where there is no GPU, and poisoned allocations.

Uninitialised memory is often zero by luck, which hides a kernel that forgets to write. Every torch.empty made by our
package is therefore filled with NaN (or an absurd integer) while tests run.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

INTERPRETED = not torch.cuda.is_available()
if INTERPRETED:
    # Before triton is imported: it decides at decoration time.
    os.environ["TRITON_INTERPRET"] = "1"

POISON_INTEGER = -0x5A5A5A5B


class Neighbours:
    """Finds the modules beside this file, when they are imported. On sys.path the tests would hide others' ``kernels``,
    ``train``, ..."""

    NAMES = (
        "architectures",
        "copy_language",
        "interpreted_vllm",
        "interpreter_bf16",
        "recorded_graphs",
        "verification_rules",
    )

    @classmethod
    def find_spec(cls, name: str, path=None, target=None):
        if path is None and name in cls.NAMES:
            return importlib.util.spec_from_file_location(name, Path(__file__).with_name(f"{name}.py"))
        return None


sys.meta_path.append(Neighbours)


def pytest_configure(config: pytest.Config) -> None:
    if importlib.util.find_spec("vllm_kvspec") is None:
        raise pytest.UsageError("vllm_kvspec is not importable: install it (pip install -e .) or use python -m pytest.")
    package = Path(importlib.util.find_spec("vllm_kvspec").origin).parent
    if not (package / "kernels" / "reference.py").is_file():
        raise pytest.UsageError(
            f"{package / 'kernels'} must lead to the kernels directory; restore the link with "
            "`ln -sfn ../kernels vllm_kvspec/kernels`."
        )
    if INTERPRETED:
        importlib.import_module("interpreter_bf16").install()
    _poison_allocations()


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    mark, reason = ("gpu", "needs an NVIDIA GPU") if INTERPRETED else ("cpu", "runs on CPU tensors, without a GPU")
    for item in items:
        if mark in item.keywords:
            item.add_marker(pytest.mark.skip(reason=reason))


def _poison_allocations() -> None:
    # torch.device(...) as a context acts on the functions that this list names, and the list is made at its first use:
    # our replacements would not be on it, but what they call would not be either.
    importlib.import_module("torch.utils._device")._device_constructors()
    for owner, name in ((torch, "empty"), (torch, "empty_like"), (torch.Tensor, "new_empty")):
        setattr(owner, name, _poisoned(getattr(owner, name)))


def _poisoned(allocate):
    def wrapper(*args, **kwargs):
        tensor = allocate(*args, **kwargs)
        caller = sys._getframe(1).f_globals.get("__name__", "")
        if caller.startswith("vllm_kvspec") and tensor.numel() > 0:
            if tensor.dtype.is_floating_point:
                tensor.fill_(float("nan"))
            elif tensor.dtype in (torch.int32, torch.int64):
                tensor.fill_(POISON_INTEGER)
        return tensor

    return wrapper


@pytest.fixture
def device() -> torch.device:
    """Where kernels run: the GPU, or the CPU under the interpreter."""
    return torch.device("cpu" if INTERPRETED else "cuda")
