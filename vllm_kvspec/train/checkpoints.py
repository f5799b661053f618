# SPDX-License-Identifier: Apache-2.0
"""Where a run may write and from which checkpoint it goes on.

``OUTPUT.checkpoints`` holds the settings of the run and transformers' checkpoints. A run goes on from the newest
checkpoint that is complete, and only with the settings that it was started with: then its losses are those of a run
that was never stopped.
"""

import json
import logging
import shutil
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers.trainer_utils import sort_checkpoints

logger = logging.getLogger(__name__)

SETTINGS_NAME = "settings.json"
RECORD_NAME = "training.json"


def differences(found: dict, wanted: dict) -> str:
    """The settings in which ``found`` is not ``wanted``, in words; empty when there are none."""
    return ", ".join(
        f"{key} {found.get(key)} (now {wanted.get(key)})"
        for key in sorted(found.keys() | wanted.keys())
        if found.get(key) != wanted.get(key)
    )


def is_finished(output: Path, settings: dict, overwrite: bool) -> bool:
    """Whether ``output`` already holds the head that ``settings`` make.

    False when a head can be written there: nothing is, or only a dry run's head, or ``overwrite`` is set and it holds
    a head. Raises ValueError when it holds anything else.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return False
    record = _read_json(output / RECORD_NAME)
    if record is None and not (output / "config.json").is_file():
        raise ValueError(f"output_dir must be new, empty or a head, found something else in {output}; name another.")
    if overwrite or (record or {}).get("dry_run"):
        return False
    if record is not None and record.get("settings") == settings:
        return True
    made_with = (record or {}).get("settings")
    changed = differences(made_with, settings) if made_with else "unknown settings"
    raise ValueError(
        f"output_dir must not hold another head, found one in {output} that was made with {changed}; name another "
        "output_dir or give --overwrite_output_dir, which also drops its checkpoints."
    )


def find_checkpoint(directory: Path, settings: dict, *, resume: bool, overwrite: bool) -> Path | None:
    """The newest complete checkpoint of the run with these ``settings``; None when there is none.

    Incomplete ones are skipped with a warning. Raises ValueError when the checkpoints are of other settings (unless
    ``overwrite``: then none is taken), or when there are any and ``resume`` is false.
    """
    checkpoints = [Path(path) for path in sort_checkpoints(str(directory))] if directory.is_dir() else []
    if not checkpoints:
        return None
    if not resume:
        raise ValueError(
            f"--no_resume must have no checkpoints to resume from, found {checkpoints[-1]}; delete {directory} or "
            "leave the flag out."
        )
    started = _read_json(directory / SETTINGS_NAME)
    if started != settings:
        if overwrite:
            return None
        what = f"a run with {differences(started, settings)}" if started else "an unknown run"
        raise ValueError(
            f"A run must go on with the settings that it was started with; {directory} has checkpoints of {what}. Use "
            "those settings, name another output_dir, or delete it."
        )
    for checkpoint in reversed(checkpoints):
        missing = missing_parts(checkpoint, settings["world_size"])
        if not missing:
            return checkpoint
        logger.warning("%s is not complete (%s) and is skipped.", checkpoint, ", ".join(missing))
    return None


def missing_parts(checkpoint: Path, world_size: int) -> list[str]:
    """Names of the files without which ``checkpoint`` cannot be resumed exactly: absent, or cut off."""
    ranks = [f"rng_state_{rank}.pth" for rank in range(world_size)] if world_size > 1 else ["rng_state.pth"]
    # What torch.save writes is a zip archive, whose directory comes last.
    whole = {name: zipfile.is_zipfile for name in ("optimizer.pt", "scheduler.pt", *ranks)}
    whole["model.safetensors"] = _is_safetensors
    for name in ("config.json", "trainer_state.json"):
        whole[name] = lambda path: _read_json(path) is not None
    return [name for name, check in whole.items() if not check(checkpoint / name)]


def start_run(directory: Path, settings: dict) -> None:
    """Record the settings of the run whose checkpoints ``directory`` will hold, and delete checkpoints of others."""
    directory.mkdir(parents=True, exist_ok=True)
    if _read_json(directory / SETTINGS_NAME) != settings:
        for checkpoint in sort_checkpoints(str(directory)):
            shutil.rmtree(checkpoint)
    write_json(directory / SETTINGS_NAME, settings)


def write_json(path: Path, value: object) -> None:
    """Replace ``path`` in one step: what stands there is always whole."""
    partial = path.with_name(f"{path.name}.partial")
    partial.write_text(json.dumps(value, indent=2) + "\n")
    partial.replace(path)


def _read_json(path: Path) -> dict | None:
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return None


def _is_safetensors(path: Path) -> bool:
    try:
        with safe_open(path, "pt"):
            return True
    except (OSError, SafetensorError):
        return False
