# SPDX-License-Identifier: Apache-2.0
"""A report that is written run by run, so that what was measured survives an interruption."""

import json
from collections.abc import Callable
from pathlib import Path

from vllm_kvspec.train.checkpoints import write_json


class ReportFile:
    """The report of a measurement under ``conditions`` (JSON), in ``path`` or, if that is None, in memory only.

    Parts that an earlier measurement under the same conditions left in ``path`` are taken over; a report of other
    conditions is replaced. ``report`` has the key ``unfinished`` until ``finish``.
    """

    def __init__(self, path: Path | None, conditions: dict):
        self.path = path
        # Through JSON, so that tuples equal the lists that they are read back as.
        self.report = {"conditions": json.loads(json.dumps(conditions)), "unfinished": True, "runs": []}
        self.earlier_runs: dict[tuple, dict] = {}
        earlier = self._read()
        if self._same_conditions(earlier):
            self.earlier_runs = {(run["temperature"], run["mode"]): run for run in earlier["runs"]}
            if "bottlenecks" in earlier:
                self.report["bottlenecks"] = earlier["bottlenecks"]

    def _read(self) -> dict:
        try:
            return json.loads(self.path.read_text()) if self.path else {}
        except (OSError, ValueError):
            return {}

    def _same_conditions(self, earlier: dict) -> bool:
        # The command may name more temperatures, or the same files in another way.
        sides = (report.get("conditions", {}) | {"command": None} for report in (earlier, self.report))
        return next(sides) == next(sides)

    def run(self, temperature: float, mode: str, measure: Callable[[float, str], dict]) -> dict:
        """The run at ``temperature`` in ``mode``: the earlier one, or what ``measure`` finds."""
        run = self.earlier_runs.get((temperature, mode)) or measure(temperature, mode)
        self.report["runs"].append(run)
        self._write()
        return run

    def bottlenecks(self, measure: Callable[[], dict]) -> dict:
        """The bottlenecks: the earlier ones, or what ``measure`` finds."""
        if "bottlenecks" not in self.report:
            self.report["bottlenecks"] = measure()
            self._write()
        return self.report["bottlenecks"]

    def finish(self) -> dict:
        """The whole report."""
        del self.report["unfinished"]
        self._write()
        return self.report

    def _write(self) -> None:
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_json(self.path, self.report)
