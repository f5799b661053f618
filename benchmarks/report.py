# SPDX-License-Identifier: Apache-2.0
"""What every benchmark writes: its conditions and its rows, as JSON and as a markdown table."""

import importlib.metadata
import json
import os
import platform
import shlex
import subprocess
import sys
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


def conditions(device: torch.device, **settings: Any) -> dict[str, Any]:
    """Where, with what and when: to be written beside every number."""
    return {
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
        "command": shlex.join(["python", *sys.argv]),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else f"CPU ({_cpu_name()})",
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader", "--id=0")
        if device.type == "cuda"
        else None,
        "commit": commit(),
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "python": platform.python_version(),
        **{name: _version(name) for name in ("torch", "triton", "transformers", "vllm")},
        **settings,
    }


def commit() -> str | None:
    """Of this repository, "-dirty" where files differ from it."""
    return _output("git", "-C", str(ROOT), "describe", "--always", "--dirty")


def write(output: Path, title: str, found: dict[str, Any], rows: list[dict[str, Any]], notes: list[str]) -> None:
    """Write ``output``.json and ``output``.md; every row is a dict, columns in the order of their first appearance."""
    output.parent.mkdir(parents=True, exist_ok=True)
    record = {"title": title, "conditions": found, "notes": notes, "rows": rows}
    _replace(output.with_name(f"{output.name}.json"), json.dumps(record, indent=1) + "\n")
    lines = [f"# {title}", ""]
    lines += [f"- {key}: {value}" for key, value in found.items() if value is not None]
    lines += ["", *notes, "", table(rows), ""]
    _replace(output.with_name(f"{output.name}.md"), "\n".join(lines))


def _replace(path: Path, text: str) -> None:
    """All or nothing: a record that grows survives an interruption."""
    part = path.with_name(f"{path.name}.part")
    part.write_text(text)
    part.replace(path)


def table(rows: list[dict[str, Any]]) -> str:
    """A markdown table; a missing or None entry becomes "-", a float gets three significant digits or more."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    lines = [columns, ["---"] * len(columns)] + [[_text(row.get(key)) for key in columns] for row in rows]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _text(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return str(value)


def _cpu_name() -> str:
    """Model and cores, where Linux tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.machine()
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")
    return f"{model}, {os.cpu_count()} cores, {platform.machine()}"


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _output(*command: str) -> str | None:
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True, timeout=30).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return None
