# SPDX-License-Identifier: Apache-2.0
"""What other rules of verification, and drafting again after a rejection, would do for a head: docs/verification.md.

    python examples/study/methods.py --target_model TARGET --draft_model HEAD --data_path held_out.jsonl \
        --temperatures 0.4 0.7 1 --output methods

Everything is computed along texts that the target writes; nothing is served. OUTPUT.json has all figures, OUTPUT.md the
tables. What was found for a text is kept in ``--work_dir``, and the same command goes on from there.
"""

import argparse
import json
import os
import random
import shlex
import sys
from collections.abc import Callable
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

import torch
from tqdm import tqdm

from vllm_kvspec.eval import redraft, verification
from vllm_kvspec.eval.report import DIGITS
from vllm_kvspec.eval.statistics import mean_and_error, ratio_and_parts
from vllm_kvspec.eval.texts import Text, cached_texts, digest
from vllm_kvspec.models.draft_head import KVSpecDraftModel
from vllm_kvspec.models.target import view_target, weights_sha256
from vllm_kvspec.train.checkpoints import write_json
from vllm_kvspec.train.data import cut_prompts, load_texts
from vllm_kvspec.train.record import versions
from vllm_kvspec.train.run import load_target

# A pass of the head over the rest of a step at batch 1, its expansion included, as measured: benchmarks/results,
# engine-NVIDIA-H200 (one layer, Qwen3-8B's shape) and engine-cpu-smollm2-shape (two layers, SmolLM2's).
PASS_COSTS = {"H200": 0.067, "CPU": 0.17}
ENGINE = "walk, coupled"
# Name: label, exact or not, what a step of N rows needs.
METHODS = {
    "walk": ("sample and walk, no noise", "yes", "best tree, 1 pass"),
    ENGINE: ("**sample and walk, coupled** (the engine)", "yes", "best tree under the noise, 1 pass"),
    "token": ("token by token", "yes", "1 drawn path, q at its rows, 1 pass"),
    "block": ("block", "yes", "1 drawn path, q at its rows, 1 pass"),
    "k-seq": ("K-SEQ", "yes", "K drawn paths, q and rho at their rows, 1 pass"),
    "multi-path block": ("multi-path block", "yes", "K drawn paths, q and an order at their rows, 1 pass"),
    "spectr-gbv, claimed": ("SpecTr-GBV, claimed", "disputed", "K drawn paths; not run"),
    "bound": ("bound of K drawn paths", "-", "no rule accepts more"),
}


def sizes_of(nodes: list[int]) -> list[int]:
    """The trees that drafting again is compared with at every size: a quarter of it, the rest, and a quarter more."""
    return sorted({n for size in nodes for n in (size, size // 4, size - size // 4, size + size // 4)})


def measure(head, target, text: Text, temperature: float, drafts: list[int], nodes: list[int], parts: list[str]):
    """One text: survival of every rule ("rules"), accepted tokens of trees from old rows ("redraft")."""
    view = view_target(target, head.config, torch.tensor([text.input_ids], device=target.device))
    options = {"temperature": temperature, "view": view}
    found = {}
    if "rules" in parts and temperature > 0:
        rules = verification.rule_survival(head, target, text, drafts, **options)
        found["rules"] = rules | verification.walk_survival(head, target, text, nodes, **options)
    if "redraft" in parts:
        found["redraft"] = redraft.row_acceptance(head, target, text, sizes_of(nodes), **options)
    return found


def kept(directory: Path | None, key: list, find: Callable[[], dict]) -> dict:
    """What ``find`` gives, or what an earlier call with the same ``key`` (JSON) left in ``directory``."""
    if directory is None:
        return find()
    path = directory / f"text-{digest(key)[:16]}.pt"
    if path.is_file():
        return torch.load(path)
    found = find()
    directory.mkdir(parents=True, exist_ok=True)
    # Renamed into place, so that an interrupted run never leaves half a file.
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    torch.save(found, unfinished)
    unfinished.replace(path)
    return found


def compare_rules(per_text: list[dict], temperature: float, block: int, drafts: list[int], nodes: list[int]) -> dict:
    """Accepted tokens per verification of every rule with as many rows as the trees have nodes."""

    def accepted(name: str, depth: int = block) -> list[torch.Tensor]:
        return [text[name][:, :depth].sum(1) for text in per_text]

    rows = []
    for budget in nodes:
        chain, coupled = min(block, budget), accepted(f"{ENGINE} {budget}")
        cases = [(name, 1, chain, accepted(name, chain)) for name in verification.SINGLE]
        for rule in verification.MULTI:
            fits = [k for k in drafts if k <= budget]
            shapes = [(k, min(block, budget // k)) for k in fits]
            cases += [(rule, k, depth, accepted(f"{rule} {k}", depth)) for k, depth in shapes]
        cases += [(name, 1, block, accepted(f"{name} {budget}")) for name in verification.WALKS]
        for rule, k, depth, values in cases:
            mean, error = mean_and_error(values)
            behind = mean_and_error([a - b for a, b in zip(coupled, values, strict=True)])
            rows.append(
                {"rows": budget, "rule": rule, "drafts": k, "depth": depth, "accepted": mean, "se": error,
                 "coupled_more": behind[0], "coupled_more_se": behind[1]}
            )  # fmt: skip
    whole = [name for name in per_text[0] if name.split()[-1].isdigit() and "first" not in name]
    whole += ["token", "block", *(f"{name}, chain" for name in verification.WALKS)]
    first = [name for name in per_text[0] if name.startswith("first: ")]
    named = {
        part: {name: dict(zip(("accepted", "se"), mean_and_error(accepted(name)), strict=True))
               for name in names}
        for part, names in (("whole_blocks", whole), ("first_token", first))
    }  # fmt: skip
    anchors = sum(len(text["token"]) for text in per_text)
    return {"temperature": temperature, "anchors": anchors, "equal_rows": rows, **named}


def compare_redrafts(tables: list[dict], temperature: float, block: int, nodes: list[int]) -> dict:
    """Tokens per target forward and per pass of the head, with fresh drafts and with those from rows made before.

    Everything else is compared with fresh drafts of as many nodes, text by text: ``tau_more``, and ``time_more``, the
    time of a token beside theirs less 1, by the cost of a pass.
    """
    rows = []

    def ratios(runs: list[redraft.Run]) -> dict[str, tuple[float, torch.Tensor]]:
        tokens, forwards, passes = (redraft.column(runs, name) for name in ("tokens", "forwards", "passes"))
        times = {name: ratio_and_parts(forwards + cost * passes, tokens) for name, cost in PASS_COSTS.items()}
        return {"tau": ratio_and_parts(tokens, forwards), "per_pass": ratio_and_parts(tokens, passes), **times}

    for size in nodes:
        few, most, more = size // 4, size - size // 4, size + size // 4
        reference = ratios([redraft.run_instead(table[size], block) for table in tables])

        def add(what: str, runs: list[redraft.Run], size=size, reference=reference) -> None:
            found = ratios(runs)
            row = {"nodes": size, "what": what}
            for name in ("tau", "per_pass"):
                row |= {name: found[name][0], f"{name}_se": found[name][1].norm().item()}
            row["tau_more"] = found["tau"][0] - reference["tau"][0]
            row["tau_more_se"] = (found["tau"][1] - reference["tau"][1]).norm().item()
            for name in PASS_COSTS:
                (time, parts), (fresh, fresh_parts) = found[name], reference[name]
                row[f"time_more, {name}"] = time / fresh - 1
                row[f"time_more_se, {name}"] = ((parts - time / fresh * fresh_parts) / fresh).norm().item()
            rows.append(row)

        for least in range(block, 0, -1):
            name = "fresh" if least == block else f"instead, {least} rows or more"
            add(name, [redraft.run_instead(table[size], least) for table in tables])
        add("overlapped", [redraft.run_overlapped(table[size]) for table in tables])
        beside = [redraft.run_beside(table[most], table[few], table[size]) for table in tables]
        add(f"beside: {most} fresh, {few} again", beside)
        add(f"fresh, {more} nodes", [redraft.run_instead(table[more], block) for table in tables])
        for_nothing = [redraft.run_beside(table[size], table[few], table[more]) for table in tables]
        add(f"beside: {size} fresh, {few} again for nothing", for_nothing)
    return {"temperature": temperature, "rows": rows}


def markdown(report: dict) -> str:
    """The tables of a report."""
    lines = ["# Rules of verification, and drafting again", ""]
    lines += [f"- {name}: {value}" for name, value in report["conditions"].items()]
    for run in sorted(report["rules"], key=lambda run: run["temperature"]):
        lines += ["", *rule_table(run), "", *first_token_table(run)]
    for run in sorted(report["redraft"], key=lambda run: run["temperature"]):
        lines += ["", *redraft_table(run)]
    return "\n".join(lines) + "\n"


def table(header: list[str], rows: list[list[str]]) -> list[str]:
    return [f"| {' | '.join(cells)} |" for cells in (header, ["---"] * len(header), *rows)]


def rule_table(run: dict) -> list[str]:
    """Of the multi-draft rules the best K for every number of rows."""
    budgets = sorted({row["rows"] for row in run["equal_rows"]})
    rows = []
    for name, (label, exact, needs) in METHODS.items():
        cells = []
        for budget in budgets:
            cases = [row for row in run["equal_rows"] if row["rows"] == budget and row["rule"] == name]
            best = max(cases, key=lambda row: row["accepted"], default=None)
            cells.append("-" if best is None else rule_cell(best))
        rows.append([label, exact, needs, *cells])
    return [
        f"## Temperature {run['temperature']:g}: accepted tokens per verification, {run['anchors']} anchors",
        "",
        *table(["rule", "exact", "a step needs", *(f"{budget} rows" for budget in budgets)], rows),
    ]


def rule_cell(row: dict) -> str:
    """Mean and standard error, how much more than the engine's rule on the same anchors, K x depth."""
    text = f"{row['accepted']:.2f} ± {row['se']:.2f}"
    if row["rule"] != ENGINE:
        text += f" ({-row['coupled_more']:+.2f} ± {row['coupled_more_se']:.2f})"
    return text + (f", {row['drafts']} x {row['depth']}" if row["drafts"] > 1 else "")


def first_token_table(run: dict) -> list[str]:
    """How often one of n tokens after the anchor is accepted."""
    ways = ("best", "coupled", "optimum", "best, one sampled")
    counts = sorted({int(name.split()[-1]) for name in run["first_token"]})
    found = [[run["first_token"][f"first: {way} {n}"] for n in counts] for way in ways]
    cells = [[f"{x['accepted']:.3f} ± {x['se']:.3f}" for x in row] for row in found]
    header = ["one of n first tokens", *map(str, counts)]
    return table(header, [[way, *row] for way, row in zip(ways, cells, strict=True)])


def redraft_table(run: dict) -> list[str]:
    """Beside the fresh draft of as many nodes."""
    header = ["nodes", "draft", "tau", "more than fresh", "per pass", *(f"time a token, {name}" for name in PASS_COSTS)]
    rows = []
    for row in run["rows"]:
        times = [
            f"{100 * row[f'time_more, {name}']:+.1f}% ± {100 * row[f'time_more_se, {name}']:.1f}" for name in PASS_COSTS
        ]
        tau, per_pass = (f"{row[name]:.2f} ± {row[f'{name}_se']:.2f}" for name in ("tau", "per_pass"))
        more = f"{row['tau_more']:+.2f} ± {row['tau_more_se']:.2f}"
        rows.append([str(row["nodes"]), row["what"], tau, more, per_pass, *times])
    title = f"## Temperature {run['temperature']:g}: drafting again, in a run through the texts"
    return [title, "", *table(header, rows)]


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def prompts_of(paths: list[str], tokenizer, count: int, length: int, seed: int) -> list[list[int]]:
    """``count`` prompts of at most ``length`` tokens: cut from texts, or what stands before the answers of rows that
    `vllm-kvspec prepare` wrote."""
    with open(paths[0]) as file:
        is_rows = '"input_ids"' in file.readline()
    if not is_rows:
        return cut_prompts(load_texts(paths), tokenizer, count, length, seed)
    rows = [json.loads(line) for path in paths for line in Path(path).read_text().splitlines()]
    cut = [tuple(row["input_ids"][: row["loss_mask"].index(1)]) for row in rows if 1 in row["loss_mask"]]
    prompts = [list(prompt) for prompt in dict.fromkeys(cut) if 0 < len(prompt) <= length]
    random.Random(seed).shuffle(prompts)
    if len(prompts) < count:
        raise ValueError(
            f"{paths} must have {count} different prompts of at most {length} tokens, found {len(prompts)}; ask for "
            "fewer or longer ones."
        )
    return prompts[:count]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target_model", required=True)
    parser.add_argument("--draft_model", required=True, help="directory of a head")
    parser.add_argument("--data_path", nargs="+", required=True, help="held-out texts, or rows of `prepare`")
    parser.add_argument("--num_prompts", type=int, default=64)
    parser.add_argument("--prompt_length", type=int, default=64)
    parser.add_argument("--max_new_tokens", type=int, default=160)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.4, 0.7, 1.0])
    parser.add_argument(
        "--num_drafts", type=int, nargs="+", default=[2, 3, 4, 8], help="paths of the multi-draft rules"
    )
    parser.add_argument("--num_nodes", type=int, nargs="+", default=[8, 16, 32], help="rows that are verified")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--parts", nargs="+", choices=["rules", "redraft"], default=["rules", "redraft"])
    parser.add_argument("--work_dir", type=Path, help="keep the target's texts, and what was found for each, here")
    parser.add_argument("--output", type=Path, required=True, help="OUTPUT.json and OUTPUT.md are written")
    args = parser.parse_args()
    target, tokenizer = load_target(args.target_model)
    head = KVSpecDraftModel.from_pretrained(args.draft_model, dtype=target.dtype).eval().to(target.device)
    block = head.config.draft_block_size
    prompts = prompts_of(args.data_path, tokenizer, args.num_prompts, args.prompt_length, args.seed)
    measured = [args.num_drafts, args.num_nodes, args.parts]
    key = [weights_sha256(target), weights_sha256(head), head.config.to_dict(), str(target.dtype), *measured]
    report = {
        "conditions": {
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": shlex.join(["python", *sys.argv]),
            "versions": versions(),
            "device": str(target.device),
            "dtype": str(target.dtype),
            "prompts": len(prompts),
            "max_new_tokens": args.max_new_tokens,
            "prompts_sha256": digest(prompts),
        },
        "rules": [],
        "redraft": [],
    }
    for temperature in args.temperatures:
        settings = {"max_new_tokens": args.max_new_tokens, "temperature": temperature}
        texts = cached_texts(args.work_dir, target, tokenizer, prompts, **settings)
        # One without an anchor says nothing.
        texts = [text for text in texts if len(text.input_ids) - text.prompt_length > block]
        found = []
        for text in tqdm(texts, desc=f"T={temperature:g}", unit="text", disable=None):
            find = partial(measure, head, target, text, temperature, *measured)
            found.append(kept(args.work_dir, [*key, asdict(text), temperature], find))
        if "rules" in args.parts and temperature > 0:
            rules = [text["rules"] for text in found]
            report["rules"].append(rounded(compare_rules(rules, temperature, block, *measured[:2])))
        if "redraft" in args.parts:
            tables = [text["redraft"] for text in found]
            report["redraft"].append(rounded(compare_redrafts(tables, temperature, block, args.num_nodes)))
        write_json(args.output.with_name(f"{args.output.name}.json"), report)
        args.output.with_name(f"{args.output.name}.md").write_text(markdown(report))
    print(markdown(report))


if __name__ == "__main__":
    main()
