# SPDX-License-Identifier: Apache-2.0
"""Every Triton kernel that Model Runner V2 launches is replaced or left out for a reason, and nothing recompiles."""

import ast
import importlib
from pathlib import Path

import pytest
import torch
import vllm.v1.worker.gpu as gpu
from vllm.triton_utils import HAS_TRITON

from vllm_kvspec.engine.cpu.kernels import compiled, gumbel, install
from vllm_kvspec.kernels import reference

ROOT = Path(gpu.__file__).parent


def _jitted(tree: ast.Module) -> set[str]:
    functions = (node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef))
    return {f.name for f in functions if any("triton.jit" in ast.unparse(d) for d in f.decorator_list)}


def _launched(tree: ast.Module) -> set[str]:
    return {n.value.id for n in ast.walk(tree) if isinstance(n, ast.Subscript) and isinstance(n.value, ast.Name)}


def launched_kernels() -> list[str]:
    """Kernels of the modules below vllm.v1.worker.gpu that some module there launches: "module.kernel"."""
    trees = {path: ast.parse(path.read_text()) for path in ROOT.rglob("*.py")}
    launched = set().union(*(_launched(tree) for tree in trees.values()))
    return sorted(
        f"{'.'.join(path.relative_to(ROOT).with_suffix('').parts)}.{name}"
        for path, tree in trees.items()
        for name in _jitted(tree) & launched
    )


def test_vllm_has_no_triton():
    assert not HAS_TRITON


def test_every_kernel_is_replaced_or_left_out():
    prefix = "vllm.v1.worker.gpu."
    replaced = {name.removeprefix(prefix) for name in install.KERNELS | install.KERNELS_WITH_GRID}
    kernels = launched_kernels()
    assert len(kernels) > 50
    unknown = [k for k in kernels if k not in replaced and k.rpartition(".")[0] not in install.LEFT_OUT]
    assert not unknown, "new Triton kernels in vLLM: write them in engine/cpu/kernels, or say why not in LEFT_OUT"
    assert replaced - {"vllm.v1.worker.utils._zero_kv_blocks_kernel"} <= set(kernels), "no longer launched"


@pytest.mark.parametrize("kernel", launched_kernels())
def test_nothing_is_left_that_cannot_be_subscripted(kernel):
    """A kernel left out says so when it is launched."""
    module, _, name = kernel.rpartition(".")
    found = getattr(importlib.import_module(f"vllm.v1.worker.gpu.{module}"), name)
    if module not in install.LEFT_OUT:
        assert found[(1,)] is not None
        return
    with pytest.raises(NotImplementedError, match=f"{name} has no CPU equivalent in vllm-kvspec"):
        found[(1,)]


def test_vllm_can_register_kernels_beside_numba():
    """Its CPU platform does so for every engine; the second one of a process finds numba loaded."""
    from vllm.platforms import current_platform

    from vllm_kvspec.engine.hooks import patches

    patches.rebind_kernels_beside_numba()
    current_platform.register_triton_kernel_overrides()


def test_other_arguments_are_refused():
    name = "vllm.v1.worker.gpu.sample.min_p._min_p_kernel"
    implementation = install.KERNELS[name]
    assert install.signature_problem(name, implementation) is None

    def swapped(logits_stride, logits_ptr, expanded_idx_mapping_ptr, min_p_ptr, vocab_size, **tiles): ...

    def unknown(logits_ptr, logits_stride, expanded_idx_mapping_ptr, min_p_ptr, vocab_size, top, **tiles): ...

    def short(logits_ptr, logits_stride, expanded_idx_mapping_ptr, min_p_ptr, **tiles): ...

    for wrong in (swapped, unknown, short):
        assert install.signature_problem(name, wrong) is not None


def test_compiled_code_never_compiles_again():
    with pytest.raises(TypeError, match="No matching definition"):
        gumbel._fill_noise(torch.zeros(3, dtype=torch.float64).numpy(), 1, 1, 1, 1, 1)


def test_flat_views():
    matrix = torch.arange(20.0).view(4, 5)
    assert compiled.flat(matrix[1:3, :4]).tolist() == list(range(5, 14))
    compiled.flat(matrix[1:, 1:3])[5] = -1
    assert matrix[2, 1] == -1
    with pytest.raises(ValueError, match="adjacent"):
        compiled.flat(matrix.t()[1:])


def test_noise_is_that_of_the_reference():
    seeds = torch.tensor([0, -1, 1 << 62, 123456789, -(1 << 63)])
    temperature = torch.tensor([1.0, 0.7, 0.0, 2.0, 1.3])
    positions = torch.tensor([[0, 1, 2], [4095, 4096, 4097], [7, 8, 9], [1 << 20, 5, 0]])
    case = seeds, temperature, positions, torch.tensor([3, 1, 2, 4])
    torch.testing.assert_close(gumbel.gumbel_noise(*case, 5000), reference.gumbel_noise(*case, 5000), rtol=0, atol=2e-6)
    tokens = torch.tensor([49151, 0, 77, 1 << 20])
    ours, theirs = (f(*case, tokens) for f in (gumbel.gumbel_noise_at, reference.gumbel_noise_at))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-6)


def test_logarithm_is_exact_to_a_unit_in_the_last_place():
    """Over every exponent that the noise takes it of, and densely around 1, where the result is small."""
    import numba
    import numpy as np

    x = np.concatenate([np.exp2(np.random.default_rng(0).uniform(-33, 5, 200_000)), np.linspace(0.5, 2, 100_001)])
    x = x.astype(np.float32)

    @numba.njit(error_model="numpy")
    def logs(x):
        return np.array([gumbel_log(v) for v in x])

    gumbel_log = gumbel._log
    exact = np.log(x.astype(np.float64))
    error = np.abs(logs(x) - exact) / np.spacing(np.abs(exact).astype(np.float32).clip(2.0**-24))
    assert error.max() < 1.5
