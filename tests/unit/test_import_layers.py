# SPDX-License-Identifier: Apache-2.0
"""The import order of the package: kernels <- tree, config <- models <- {train, engine} <- {eval, prepare, cache,
doctor} <- cli. Inside the engine: {cpu/kernels, hooks/compat} <- {ops, target_kv} <- {verify, budget} <- config <-
{runner, draft} <- {worker, hooks/patches} <- {cpu/worker, hooks/plugin}.

Why it matters: training must not need vLLM, kernels must be usable alone, and vLLM imports the package as a plugin in
every process it starts, so that import has to stay light.
"""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
KERNELS_MAY_IMPORT = {"torch", "triton"} | set(sys.stdlib_module_names)


def loaded_after(imports: list[str], watched: list[str]) -> set[str]:
    """Which of ``watched`` a fresh interpreter has loaded after importing ``imports``."""
    code = f"import importlib, sys\nfor m in {imports!r}: importlib.import_module(m)\nprint(*sys.modules)"
    done = subprocess.run([sys.executable, "-P", "-c", code], capture_output=True, text=True, cwd="/")
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split()) & set(watched)


def modules(*parts: str) -> list[str]:
    """Dotted names of the modules in ``vllm_kvspec`` under the given files or directories."""
    found = []
    for part in parts:
        path = ROOT / "vllm_kvspec" / part
        for file in sorted(path.rglob("*.py")) if path.is_dir() else [path]:
            found.append(".".join(file.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"))
    return found


def imported_names(file: Path) -> set[str]:
    """Dotted names of the modules ``file`` imports or imports from, and of what it takes from them, at any depth."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def test_contracts_of_import_linter_hold():
    lint = Path(sys.executable).with_name("lint-imports")
    done = subprocess.run([lint, "--no-cache"], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_import_of_the_package_is_light():
    assert loaded_after(["vllm_kvspec"], ["torch", "vllm", "transformers"]) == set()


def test_nothing_but_the_engine_loads_vllm():
    names = modules(
        "__init__.py", "cli.py", "config.py", "rope.py", "tree.py", "models", "train", "eval", "prepare.py", "doctor.py"
    )
    assert len(names) > 4
    assert loaded_after(names, ["vllm", "vllm_kvspec.engine"]) == set()


def test_budget_choice_and_hooks_load_without_vllm():
    # The first can be computed with anywhere; the second is what vLLM loads in every process.
    names = modules("engine/budget/choice.py", "engine/hooks")
    assert loaded_after(names, ["vllm"]) == set()


def test_only_ops_imports_the_triton_kernels():
    # On CPU ops gives others. The twins and their types are torch alone.
    prefix = "vllm_kvspec.kernels."
    for file in sorted((ROOT / "vllm_kvspec" / "engine").rglob("*.py")):
        names = {name.removeprefix(prefix) for name in imported_names(file) if name.startswith(prefix)}
        assert file.name == "ops.py" or all(name.startswith("reference") for name in names), file


@pytest.mark.parametrize("file", sorted((ROOT / "kernels").glob("*.py")), ids=lambda file: file.name)
def test_kernels_import_only_torch_and_triton(file):
    for name in imported_names(file):
        assert name.split(".")[0] in KERNELS_MAY_IMPORT or name.startswith("vllm_kvspec.kernels"), name


def test_kernels_directory_is_not_a_regular_package():
    # A regular package named ``kernels`` in the checkout would shadow Hugging Face's distribution of that name.
    assert not (ROOT / "kernels" / "__init__.py").exists()
    assert (ROOT / "vllm_kvspec" / "kernels").is_symlink()
