# SPDX-License-Identifier: Apache-2.0
"""The compare command: reports of several heads side by side, as markdown and a plot.

Only like with like: the reports must have been measured on the very same texts (same target, prompts and temperatures)
with the same tree settings and dtype. Heads of one name are seeds of one recipe and become one row.
"""

import json
import math
import statistics
from collections.abc import Sequence
from pathlib import Path

from vllm_kvspec.eval.plots import Curve, head_style, plot_acceptance, plot_tau
from vllm_kvspec.eval.report import title_of

# Of the conditions; the texts themselves are compared run by run.
MUST_AGREE = ("dtype", "beam", "width")


def load_reports(paths: Sequence[Path]) -> list[dict]:
    """Reports written by the eval command. Raises ValueError for files that are not, or that must not be compared."""
    reports = []
    for path in paths:
        try:
            report = json.loads(Path(path).read_text())
            report["conditions"]["head"]["name"], report["runs"][0]["texts_sha256"]
        except (OSError, ValueError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"A report must be a json file that `vllm-kvspec eval --output` wrote, found {path} ({error!r}); "
                "measure the head again."
            ) from None
        if report.get("unfinished"):
            raise ValueError(f"A report must be finished, found {path} interrupted; run the same eval command again.")
        reports.append(report)
    for path, report in zip(paths[1:], reports[1:], strict=True):
        _check_alike(paths[0], reports[0], path, report)
    _check_seeds(reports)
    return reports


def _runs(report: dict) -> dict[str, dict]:
    return {title_of(run): run for run in report["runs"]}


def _check_alike(first_path: Path, first: dict, path: Path, report: dict) -> None:
    for key in MUST_AGREE:
        sides = [side["conditions"][key] for side in (first, report)]
        _agree(key, sides, first_path, path)
    _agree(
        "target", [side["conditions"]["target"]["weights_sha256"][:12] for side in (first, report)], first_path, path
    )
    _agree("temperatures and modes", [list(_runs(side)) for side in (first, report)], first_path, path)
    for title, run in _runs(report).items():
        sides = [_runs(first)[title]["texts_sha256"][:12], run["texts_sha256"][:12]]
        _agree(f"texts at {title}", sides, first_path, path)


def _agree(what: str, sides: list, first_path: Path, path: Path) -> None:
    if sides[0] != sides[1]:
        raise ValueError(
            f"Reports must have the same {what} to be compared, found {sides[0]} in {first_path} and {sides[1]} in "
            f"{path}; measure both heads with the same target, prompts and settings."
        )


def _check_seeds(reports: list[dict]) -> None:
    """Heads of one name must differ in their weights and agree in their size and steps."""
    for name, group in by_name(reports).items():
        heads = [report["conditions"]["head"] for report in group]
        if len({head["weights_sha256"] for head in heads}) < len(heads):
            raise ValueError(
                f"Each head must be given once, found the same weights twice under {name!r} "
                f"({', '.join(head['path'] for head in heads)}); leave one report out."
            )
        recipes = {(head["parameters"], head["steps"]) for head in heads}
        if len(recipes) > 1:
            raise ValueError(
                f"Heads of one name must be seeds of one recipe, found {sorted(map(str, recipes))} (parameters, steps) "
                f"under {name!r}; give the recipes different names with eval --name."
            )


def by_name(reports: list[dict]) -> dict[str, list[dict]]:
    """Reports grouped by the head's name, in the order given."""
    groups: dict[str, list[dict]] = {}
    for report in reports:
        groups.setdefault(report["conditions"]["head"]["name"], []).append(report)
    return groups


def _cell(values: list[float | None], errors: list[float | None] | None = None, digits: int = 2) -> str:
    """Mean and spread over seeds, or the one value and its bootstrap error."""
    known = [value for value in values if value is not None]
    if not known:
        return ""
    if len(known) > 1:
        return f"{statistics.mean(known):.{digits}f} ± {statistics.stdev(known):.{digits}f}"
    error = next((value for value in errors or [] if value is not None), None)
    return f"{known[0]:.{digits}f}" + ("" if error is None else f" ({error:.{digits}f})")


def _mean(rows: list[list[float | None]]) -> list[float]:
    """Column means of what is known; NaN, which a plot leaves out, where nothing is."""
    known = ([value for value in column if value is not None] for column in zip(*rows, strict=True))
    return [statistics.mean(column) if column else math.nan for column in known]


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = [header, ["---"] * len(header), *rows]
    return ["| " + " | ".join(line) + " |" for line in lines] + [""]


def markdown(reports: list[dict]) -> str:
    """One table of the heads, one per temperature and mode, one of the bottlenecks."""
    groups = by_name(reports)
    legend = (
        "Means over seeds ± their standard deviation; of a single seed the value and, in brackets, its bootstrap "
        "standard error over the texts. tau: tokens per verification of a free run; a_k: share accepted at depth k "
        "among the anchors right so far, over all anchors; retention: last a_k / a_0."
    )
    lines, rows = [legend, ""], []
    for name, group in groups.items():
        head, seeds = group[0]["conditions"]["head"], [report["conditions"]["head"]["seed"] for report in group]
        known = ", ".join(str(seed) for seed in seeds if seed is not None)
        steps = "" if head["steps"] is None else str(head["steps"])
        rows.append([name, f"{head['parameters']:,}", steps, f"{len(group)}" + (f" ({known})" if known else "")])
    lines += _table(["head", "parameters", "steps", "seeds"], rows)
    for title in _runs(reports[0]):
        lines += [f"### {title}", "", *_run_table(title, groups)]
    if any("bottlenecks" in report for report in reports):
        lines += ["### Bottlenecks", "", *_bottleneck_table(groups)]
    return "\n".join(lines)


def _run_table(title: str, groups: dict[str, list[dict]]) -> list[str]:
    runs = {name: [_runs(report)[title] for report in group] for name, group in groups.items()}
    trees = list(dict.fromkeys(tree for group in runs.values() for run in group for tree in run["trees"]))
    depth = max(len(run["trees"]["chain"]["conditional"]) for group in runs.values() for run in group)
    header = ["head", *(f"a_{k}" for k in range(depth)), "retention"]
    header += ["tau, chain", *(f"N={tree}" for tree in trees if tree != "chain")]
    rows = []
    for name, group in runs.items():
        chains = [run["trees"]["chain"] for run in group]
        row = [name]
        for k in range(depth):
            row.append(_cell([chain["conditional"][k] for chain in chains if k < len(chain["conditional"])]))
        row.append(_cell([chain["retention"] for chain in chains], [chain["retention_se"] for chain in chains]))
        for tree in trees:
            found = [run["trees"][tree] for run in group if tree in run["trees"]]
            row.append(_cell([one["tau"] for one in found], [one["tau_se"] for one in found]))
        rows.append(row)
    return _table(header, rows)


def _bottleneck_table(groups: dict[str, list[dict]]) -> list[str]:
    header = [
        "head", "attention distance to the target, first depth", "last depth", "of the anchor's own query, last depth",
        "K/V projections' share of the layers' squared gradient", "of their parameters", "gate, mean",
        "gates below 0.05",
    ]  # fmt: skip
    rows = []
    for name, group in groups.items():
        found = [report["bottlenecks"] for report in group if "bottlenecks" in report]
        errors = [one["attention_query_error"] for one in found if "attention_query_error" in one]
        gates = [one["gate"] for one in found if "gate" in one]
        shares = [one["gradient_share"] for one in found]
        columns = (
            [error["by_depth"][0] for error in errors],
            [error["by_depth"][-1] for error in errors],
            [error["stale"][-1] for error in errors],
            [share["gradient_of_layers"] for share in shares],
            [share["parameters_of_layers"] for share in shares],
            [gate["mean"] for gate in gates],
            [gate["closed"] for gate in gates],
        )
        rows.append([name, *(_cell(column, digits=3) for column in columns)])
    return _table(header, rows)


def parse_panels(panels: Sequence[str], reports: list[dict]) -> dict[str, list[str]]:
    """``["KV or hidden states?: hidden kv", ...]`` -> names of heads by title. Raises ValueError for unknown names."""
    known, parsed = by_name(reports), {}
    for panel in panels:
        title, colon, names = panel.rpartition(":")
        unknown = [name for name in names.split() if name not in known]
        if not colon or not names.split() or unknown:
            raise ValueError(
                f'A panel must be "TITLE: NAME NAME ..." with names of heads ({", ".join(known)}), found {panel!r}.'
            )
        parsed[title] = names.split()
    return parsed


def plot(reports: list[dict], directory: Path, panels: Sequence[str] = ()) -> list[Path]:
    """``acceptance.png``: a_k of each head's chain by depth; ``tau.png``: tau by tree. Means over seeds.

    ``panels``: see ``parse_panels``; without, one panel per temperature and mode holds all heads.
    """
    acceptance, tau, sizes, groups = {}, {}, {}, by_name(reports)
    for run in _runs(reports[0]):
        for question, names in (parse_panels(panels, reports) or {"": list(groups)}).items():
            title = ", ".join(filter(None, (question, run)))
            acceptance[title], tau[title], sizes[title] = {}, {}, []
            for name in names:
                runs, style = [_runs(report)[run] for report in groups[name]], _style(groups[name])
                acceptance[title][name] = Curve(_mean([run["trees"]["chain"]["conditional"] for run in runs]), **style)
                trees = [[tree["tau"] for tree in run["trees"].values()] for run in runs]
                tau[title][name] = Curve(_mean(trees), **style)
                sizes[title] = max(sizes[title], list(runs[0]["trees"]), key=len)
    return [
        plot_acceptance(directory / "acceptance.png", acceptance),
        plot_tau(directory / "tau.png", tau, sizes),
    ]


def _style(group: list[dict]) -> dict[str, str]:
    return head_style(group[0]["conditions"]["head"]["config"] or {})
