# SPDX-License-Identifier: Apache-2.0
"""What changed between two vLLM versions in the names that this package touches: where a version bump starts.

    python tools/vllm_changes.py OLD NEW

OLD and NEW are directories that hold ``vllm/``: source trees, or the ``site-packages`` of two environments. Nothing is
imported. Touched are all names that ``vllm_kvspec`` imports from vLLM, the functions in ``compat.RUNNER_CONTRACT``, and
what our classes override in the vLLM classes they derive from. Printed are those that are gone, have other parameters,
or another body: the last is what the contract cannot see. Then every changed key of vLLM's SpeculativeConfig.
"""

import argparse
import ast
import sys
from collections.abc import Iterator
from functools import cache
from pathlib import Path

PACKAGE = Path(__file__).resolve().parents[1] / "vllm_kvspec"
COMPAT = PACKAGE / "engine" / "hooks" / "compat.py"
SPECULATIVE_CONFIG = ("vllm.config.speculative", "SpeculativeConfig")
DEFINITIONS = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)


@cache
def parsed(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


class Sources:
    """Definitions in a directory that holds ``vllm/``."""

    def __init__(self, root: Path):
        if not (root / "vllm" / "__init__.py").is_file():
            raise SystemExit(f"{root} holds no vllm/__init__.py: give a source tree or a site-packages directory.")
        self.root = root

    def find(self, module: str, path: str) -> ast.AST | None:
        """The statement that defines ``path`` ("Class.method") in ``module``, followed through re-exports and bases."""
        tree = self._module(module)
        first, *rest = path.split(".")
        node = tree and self._in_module(tree, module, first)
        for name in rest:
            node = node and self._in_class(node, module, first, name)
        return node

    def _module(self, module: str) -> ast.Module | None:
        path = self.root.joinpath(*module.split("."))
        file = path / "__init__.py" if path.is_dir() else path.with_suffix(".py")
        return parsed(file) if file.is_file() else None

    def _in_module(self, tree: ast.Module, module: str, name: str) -> ast.AST | None:
        found = None
        for node in ast.walk(tree):
            if isinstance(node, DEFINITIONS) and node.name == name:
                return node
            targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
            if isinstance(node, ast.Assign | ast.AnnAssign) and any(getattr(t, "id", None) == name for t in targets):
                found = found or node
            if isinstance(node, ast.ImportFrom) and name in {alias.asname or alias.name for alias in node.names}:
                found = found or self._imported(node, module, name)
        return found

    def _imported(self, node: ast.ImportFrom, module: str, name: str) -> ast.AST | None:
        original = next(alias.name for alias in node.names if (alias.asname or alias.name) == name)
        source = absolute(node, module, is_package=(self.root.joinpath(*module.split("."))).is_dir())
        return self.find(source, original) or self._module(f"{source}.{original}")

    def _in_class(self, node: ast.AST, module: str, owner: str, name: str) -> ast.AST | None:
        for part in getattr(node, "body", []):
            if isinstance(part, DEFINITIONS) and part.name == name:
                return part
            if isinstance(part, ast.AnnAssign) and getattr(part.target, "id", None) == name:
                return part
        for base in getattr(node, "bases", []):
            base_name = ast.unparse(base).split("[")[0]
            if base_name != owner and (found := self.find(module, f"{base_name}.{name}")):
                return found
        return None


def absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if not node.level:
        return node.module
    parents = module.split(".")
    parents = parents[: len(parents) - node.level + is_package]
    return ".".join([*parents, *([node.module] if node.module else [])])


def touched_names() -> Iterator[tuple[str, str]]:
    """(module, attribute path) of everything in vLLM that this package imports or overrides."""
    for file in sorted(PACKAGE.rglob("*.py")):
        imported = {}
        tree = parsed(file)
        for node in ast.walk(tree):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "vllm":
                imported |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        yield from imported.values()
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                yield from overridden(node, imported)
    yield from contract()


def overridden(node: ast.ClassDef, imported: dict[str, tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """What a class of ours may override in its vLLM bases; names that these do not have drop out later."""
    for base in node.bases:
        if source := imported.get(ast.unparse(base).split("[")[0]):
            for part in node.body:
                if isinstance(part, DEFINITIONS):
                    yield source[0], f"{source[1]}.{part.name}"


def contract() -> list[tuple[str, str]]:
    """The keys of ``compat.RUNNER_CONTRACT``."""
    sys.path.insert(0, str(PACKAGE.parent))
    from vllm_kvspec.engine.hooks.compat import RUNNER_CONTRACT

    return list(RUNNER_CONTRACT)


def without_docstrings(node: ast.AST) -> str:
    """The code of a definition as text: neither comments, docstrings nor layout count."""
    copy = ast.parse(ast.unparse(node))
    for part in ast.walk(copy):
        body = getattr(part, "body", None)
        if isinstance(body, list):
            kept = [s for s in body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
            part.body = kept or [ast.Pass()]
    return ast.unparse(copy)


def parameters(node: ast.AST) -> str | None:
    return ast.unparse(node.args) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) else None


def methods(node: ast.AST) -> dict[str, str]:
    return {n.name: without_docstrings(n) for n in getattr(node, "body", []) if isinstance(n, DEFINITIONS)}


def difference(old: ast.AST | None, new: ast.AST | None) -> str | None:
    """What to read about one name, or None when it is the same."""
    if old is None:
        return None if new is None else "new"
    if new is None:
        return "GONE"
    if without_docstrings(old) == without_docstrings(new):
        return None
    if parameters(old) != parameters(new):
        return f"PARAMETERS ({parameters(old)}) -> ({parameters(new)})"
    if isinstance(old, ast.ClassDef) and isinstance(new, ast.ClassDef):
        before, after = methods(old), methods(new)
        changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
        return f"class changed: {', '.join(changed) or 'attributes'}"
    return "body changed"


def changed_keys(old: Sources, new: Sources) -> Iterator[str]:
    """Fields of SpeculativeConfig that are new, gone, or have another type or default."""

    def keys(sources: Sources) -> dict[str, str]:
        node = sources.find(*SPECULATIVE_CONFIG)
        found = (part for part in node.body if isinstance(part, ast.AnnAssign))
        return {part.target.id: ast.unparse(part).partition(":")[2].strip() for part in found}

    before, after = keys(old), keys(new)
    for key in sorted(before.keys() | after.keys()):
        if before.get(key) != after.get(key):
            yield f"{key}: {before.get(key, 'not there')} -> {after.get(key, 'GONE')}"


def report(old: Sources, new: Sources) -> Iterator[str]:
    """One line per changed name, then one per changed key."""
    names = sorted(set(touched_names()))
    for module, path in names:
        what = difference(old.find(module, path), new.find(module, path))
        if what:
            yield f"{module}.{path}: {what}"
    yield f"{len(names)} names looked up"
    yield from (f"speculative_config key {line}" for line in changed_keys(old, new))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    arguments = parser.parse_args()
    print(*report(Sources(arguments.old), Sources(arguments.new)), sep="\n")


if __name__ == "__main__":
    main()
