# SPDX-License-Identifier: Apache-2.0
"""Text that is on any machine with Python: the standard library's sources and documentation, split by file.

Two kinds of documents:

- every ``.py`` file of the standard library outside its tests, and every topic of ``pydoc_data.topics``
  (the language reference as plain text);
- chats made from the same files: "What does module.function(args) do?" answered by its docstring.

A file (or topic) is held out when the CRC-32 of its path is 0 modulo 20, so the split does not depend on order, and a
held-out file contributes neither sources nor chats to training.

``python corpus.py DIR`` writes ``train.jsonl`` and ``held_out.jsonl``, the form that ``vllm-kvspec prepare`` reads.
"""

import ast
import json
import re
import sys
import sysconfig
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

# Tests and generated character tables: large, and nothing a reader would ask a language model to continue.
EXCLUDED_DIRS = {"test", "tests", "idle_test", "site-packages", "__pycache__", "lib2to3", "encodings"}
HELD_OUT_MODULUS = 20


@dataclass(frozen=True)
class Document:
    """``name`` is the path relative to the standard library; ``text`` the file; ``chats`` (question, answer) pairs."""

    name: str
    text: str
    chats: tuple[tuple[str, str], ...] = ()

    @property
    def held_out(self) -> bool:
        return zlib.crc32(self.name.encode()) % HELD_OUT_MODULUS == 0


def _docstring_chats(module: str, source: str) -> Iterator[tuple[str, str]]:
    """One (question, answer) per documented public function or method in ``source``."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef | ast.ClassDef) and not node.name.startswith("_"):
            answer = ast.get_docstring(node)
            if answer and len(answer) > 40:
                arguments = f"({ast.unparse(node.args)})" if isinstance(node, ast.FunctionDef) else ""
                yield f"What does {module}.{node.name}{arguments} do?", answer.split("\n\n\n")[0][:1200]


def load_documents() -> list[Document]:
    """All documents of this interpreter's standard library, sorted by name."""
    root = Path(sysconfig.get_paths()["stdlib"])
    documents = []
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_DIRS & set(relative.parts) or relative.parts[0].startswith(("config-", "pydoc_data")):
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        if text.strip():
            module = ".".join(relative.with_suffix("").parts).removesuffix(".__init__")
            documents.append(Document(str(relative), text, tuple(_docstring_chats(module, text))))
    from pydoc_data.topics import topics

    for name, text in sorted(topics.items()):
        documents.append(Document(f"topics/{name}", re.sub(r"\n{3,}", "\n\n", text)))
    return documents


def split(documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """(training, held-out)."""
    return [d for d in documents if not d.held_out], [d for d in documents if d.held_out]


def write_jsonl(documents: list[Document], path: Path) -> None:
    """One row per file (``text``) and per chat (``messages``)."""
    with path.open("w", encoding="utf-8") as file:
        for document in documents:
            file.write(json.dumps({"text": document.text, "messages": None}) + "\n")
            for question, answer in document.chats:
                chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
                file.write(json.dumps({"text": None, "messages": chat}) + "\n")


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for part, name in zip(split(load_documents()), ("train", "held_out"), strict=True):
        write_jsonl(part, directory / f"{name}.jsonl")
