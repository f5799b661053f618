# SPDX-License-Identifier: Apache-2.0
"""A file of training rows that grows batch by batch, can be interrupted anywhere, and knows how it was made.

Beside ``rows.jsonl`` stands the record ``rows.jsonl.json``: what decides the rows, and how far they are written. It is
replaced after each batch, so whatever the file holds beyond the recorded length is a batch that was cut off: it is cut
away and written again. With another record the file is not touched.
"""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from vllm_kvspec.train.checkpoints import write_json
from vllm_kvspec.train.data import sidecar_path

# Recorded for the reader; they do not decide what the rows are.
NOT_COMPARED = ("command", "versions", "progress")


@dataclass
class Progress:
    """How far the rows are written: ``prompts`` of the plan are done, ``bytes`` is the length of the file."""

    prompts: int = 0
    rows: int = 0
    tokens: int = 0
    learned_tokens: int = 0
    bytes: int = 0
    left_out: dict[str, int] = field(default_factory=dict)


class RowsFile:
    """``path`` and its record. Nothing is written before the first row.

    ``record``: JSON values; its key ``prompts`` is the number of prompts to do. Raises ValueError when ``path`` holds
    something else than an earlier part of the same rows.
    """

    def __init__(self, path: Path, record: dict[str, Any]):
        self.path, self.sidecar = path, sidecar_path(path)
        # Through JSON, so that tuples compare equal to the lists that they are read back as.
        self.record = json.loads(json.dumps(record))
        self.progress = Progress()
        if self.sidecar.is_file():
            self._resume(json.loads(self.sidecar.read_text()))
        elif path.exists():
            raise ValueError(
                f"The rows must go to a new file, found {path} without its record {self.sidecar.name}; remove it or "
                "name another file."
            )

    def _resume(self, saved: dict[str, Any]) -> None:
        different = [
            f"{key} {_difference(saved.get(key), self.record[key])}"
            for key in self.record
            if key not in NOT_COMPARED and saved.get(key) != self.record[key]
        ]
        if different:
            raise ValueError(
                f"{self.path} holds rows that were made differently ({'; '.join(different)}); name another file, or "
                f"remove it and {self.sidecar.name}."
            )
        self.progress = Progress(**saved["progress"])
        size = self.path.stat().st_size if self.path.is_file() else 0
        if size < self.progress.bytes:
            raise ValueError(
                f"{self.path} must have at least the {self.progress.bytes} bytes that its record names, found {size}; "
                f"restore it, or remove it and {self.sidecar.name}."
            )

    @property
    def finished(self) -> bool:
        return self.progress.prompts == self.record["prompts"]

    def append(self, rows: list[dict], prompts: int, left_out: dict[str, int]) -> None:
        """Write one batch's rows and record that the first ``prompts`` of the plan are done.

        ``left_out`` counts, by reason, the prompts of this batch that gave no row.
        """
        progress = self.progress
        text = "".join(json.dumps(row) + "\n" for row in rows).encode()
        if progress.rows or rows:
            self._write(text)
        progress.prompts = prompts
        progress.rows += len(rows)
        progress.tokens += sum(len(row["input_ids"]) for row in rows)
        progress.learned_tokens += sum(sum(row["loss_mask"]) for row in rows)
        progress.bytes += len(text)
        for reason, count in left_out.items():
            progress.left_out[reason] = progress.left_out.get(reason, 0) + count
        if progress.rows:
            self._write_record()

    def _write(self, text: bytes) -> None:
        if not self.path.exists():
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._write_record()
            self.path.touch()
        with self.path.open("r+b") as file:
            file.truncate(self.progress.bytes)
            file.seek(self.progress.bytes)
            file.write(text)
            file.flush()
            os.fsync(file.fileno())

    def _write_record(self) -> None:
        write_json(self.sidecar, self.record | {"progress": asdict(self.progress)})


def _difference(saved: Any, now: Any) -> str:
    """The two values, of dictionaries only what differs."""
    if isinstance(saved, dict) and isinstance(now, dict):
        keys = [key for key in now if saved.get(key) != now[key]]
        return ", ".join(f"{key} {saved.get(key)} there, {now[key]} here" for key in keys)
    return f"{saved} there, {now} here"
