# SPDX-License-Identifier: Apache-2.0
"""Plots of acceptance: by depth, and tokens per verification by tree size. One panel per temperature and mode."""

from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

# name -> (values, errors or None), one curve each.
Curves = dict[str, tuple[list[float | None], list[float | None] | None]]


def plot_panels(path: Path, panels: dict[str, Curves], x: dict[str, list] | None, xlabel: str, ylabel: str) -> Path:
    """Write a png with one panel per entry of ``panels`` (title -> curves) and return its path.

    ``x`` gives the tick labels per title; without it, values stand at 0, 1, 2, ...
    """
    figure = Figure(figsize=(5 * len(panels), 4), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False, sharey=True)[0]
    for axis, (title, curves) in zip(axes, panels.items(), strict=True):
        for index, (name, (values, errors)) in enumerate(curves.items()):
            # None becomes NaN, which is left out.
            y, yerr = (None if part is None else np.array(part, dtype=float) for part in (values, errors))
            # There are ten colours.
            style = ("-", "--", ":")[index // 10 % 3]
            axis.errorbar(range(len(values)), y, yerr=yerr, marker="o", linestyle=style, capsize=2, label=name)
        longest = max((len(values) for values, _ in curves.values()), default=0)
        axis.set_xticks(range(longest), x[title] if x else None)
        axis.set(title=title, xlabel=xlabel)
        axis.grid(alpha=0.3)
    axes[0].set_ylabel(ylabel)
    axes[-1].legend(fontsize="small")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=150)
    return path


def plot_acceptance(path: Path, panels: dict[str, Curves]) -> Path:
    """Conditional acceptance a_k by depth k."""
    return plot_panels(path, panels, None, "depth k", "conditional acceptance a_k")


def plot_tau(path: Path, panels: dict[str, Curves], sizes: dict[str, list[str]]) -> Path:
    """Tokens per verification by tree size; ``sizes`` names the trees per panel, the chain first."""
    return plot_panels(path, panels, sizes, "tree", "tau (tokens per verification)")
