# SPDX-License-Identifier: Apache-2.0
"""Plots of acceptance: by depth, and tokens per verification by tree size."""

from dataclasses import dataclass
from itertools import cycle
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

PANELS_PER_ROW = 2
MARKERS = "os^Dv*Pp"
COLOURS = {"hidden": "tab:blue", "kv": "tab:orange", "hybrid": "tab:green"}
LINESTYLES = {"block": "-", "autoregressive": "--"}


@dataclass
class Curve:
    """One line: ``values`` at 0, 1, 2, ... and their ``errors``, None where nothing is known."""

    values: list[float | None]
    errors: list[float | None] | None = None
    colour: str | None = None
    linestyle: str = "-"


def head_style(config: dict) -> dict[str, str]:
    """What a head of this configuration looks like in every plot: colour by context, dashed when token by token."""
    return {"colour": COLOURS.get(config.get("context")), "linestyle": LINESTYLES.get(config.get("drafting"), "-")}


# Title of a panel -> name of a line -> the line.
Panels = dict[str, dict[str, Curve]]


def plot_panels(path: Path, panels: Panels, ticks: dict[str, list] | None, xlabel: str, ylabel: str) -> Path:
    """Write a png of the ``panels`` and return its path. ``ticks``: labels per title, otherwise 0, 1, 2, ..."""
    columns = min(PANELS_PER_ROW, len(panels))
    rows = -(-len(panels) // columns)
    figure = Figure(figsize=(6.5 * columns, 3.6 * rows), layout="constrained")
    axes = figure.subplots(rows, columns, squeeze=False, sharey=True)
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (title, curves) in zip(axes.flat, panels.items(), strict=False):
        for (name, curve), marker in zip(curves.items(), cycle(MARKERS)):
            # None becomes NaN, which is left out.
            y, yerr = (None if part is None else np.array(part, dtype=float) for part in (curve.values, curve.errors))
            style = {"color": curve.colour, "linestyle": curve.linestyle, "marker": marker}
            axis.errorbar(range(len(y)), y, yerr=yerr, capsize=2, label=name, **style)
        longest = max((len(curve.values) for curve in curves.values()), default=0)
        axis.set_xticks(range(longest), ticks[title] if ticks else None)
        axis.set(title=title, xlabel=xlabel)
        axis.grid(alpha=0.3)
        _name_lines(axis, curves)
    for axis in axes[:, 0]:
        axis.set_ylabel(ylabel)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def _name_lines(axis, curves: dict[str, Curve]) -> None:
    """A legend beside the panel, in the order in which the lines start, from the top down."""
    starts = [curve.values[0] if curve.values and curve.values[0] is not None else 0.0 for curve in curves.values()]
    lines, names = axis.get_legend_handles_labels()
    order = sorted(range(len(names)), key=lambda i: -starts[i])
    axis.legend(
        [lines[i] for i in order],
        [names[i] for i in order],
        fontsize="small",
        frameon=False,
        loc="center left",
        bbox_to_anchor=(1, 0.5),
    )


def plot_acceptance(path: Path, panels: Panels) -> Path:
    """Conditional acceptance a_k by depth k."""
    return plot_panels(path, panels, None, "depth k", "conditional acceptance a_k")


def plot_tau(path: Path, panels: Panels, sizes: dict[str, list[str]]) -> Path:
    """Tokens per verification by tree size; ``sizes`` names the trees per panel, the chain first."""
    return plot_panels(path, panels, sizes, "tree", "tau (tokens per verification)")
