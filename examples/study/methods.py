# SPDX-License-Identifier: Apache-2.0
"""What other rules of verification, and drafting again after a rejection, would do for a head: docs/verification.md.

    python examples/study/methods.py --target_model TARGET --draft_model HEAD --data_path held_out.jsonl \
        --temperatures 0.4 0.7 1 --output methods.json

Everything is computed along texts that the target writes; nothing is served. ``--parts`` chooses one of the two.
"""

import argparse
import shlex
import sys
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

from vllm_kvspec.eval import redraft, verification
from vllm_kvspec.eval.report import DIGITS
from vllm_kvspec.eval.statistics import mean_and_error
from vllm_kvspec.eval.texts import Text, cached_texts, digest
from vllm_kvspec.models.draft_head import KVSpecDraftModel
from vllm_kvspec.train.checkpoints import write_json
from vllm_kvspec.train.data import cut_prompts, load_texts
from vllm_kvspec.train.record import versions
from vllm_kvspec.train.run import load_target

BOUNDS = ("bound", "spectr-gbv, claimed")


def compare_rules(head, target, texts: list[Text], temperature: float, drafts: list[int], nodes: list[int]) -> dict:
    """Accepted tokens per verification of every rule with as many rows as the trees have nodes."""
    block = head.config.draft_block_size
    per_text = [
        verification.rule_survival(head, target, text, drafts, temperature=temperature)
        | verification.walk_survival(head, target, text, nodes, temperature=temperature)
        for text in tqdm(texts, desc=f"rules, T={temperature:g}", unit="text", leave=False, disable=None)
    ]

    def accepted(name: str, depth: int = block) -> list[torch.Tensor]:
        return [text[name][:, :depth].sum(1) for text in per_text]

    rows = []
    for budget in nodes:
        chain, coupled = min(block, budget), accepted(f"walk, coupled {budget}")
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


def compare_redrafts(head, target, texts: list[Text], temperature: float, nodes: list[int]) -> dict:
    """Tokens per target forward and per pass of the head, with fresh drafts and with those from rows made before."""
    block = head.config.draft_block_size
    sizes = sorted({n for size in nodes for n in (size, size // 4, size - size // 4, size + size // 4)})
    tables = [
        redraft.row_acceptance(head, target, text, sizes, temperature=temperature)
        for text in tqdm(texts, desc=f"redraft, T={temperature:g}", unit="text", leave=False, disable=None)
    ]
    rows = []

    def add(size: int, what: str, runs: list[redraft.Run]) -> None:
        (tau, tau_se), (per_pass, per_pass_se) = (redraft.tokens_and_error(runs, x) for x in ("forwards", "passes"))
        rows.append(
            {
                "nodes": size,
                "what": what,
                "tau": tau,
                "tau_se": tau_se,
                "per_pass": per_pass,
                "per_pass_se": per_pass_se,
            }
        )

    for size in nodes:
        few, most, more = size // 4, size - size // 4, size + size // 4
        for least in range(1, block + 1):
            name = "fresh" if least == block else f"instead, {least} rows or more"
            add(size, name, [redraft.run_instead(table[size], least) for table in tables])
        add(size, "overlapped", [redraft.run_overlapped(table[size]) for table in tables])
        beside = [redraft.run_beside(table[most], table[few], table[size]) for table in tables]
        add(size, f"beside: {most} fresh, {few} again", beside)
        add(size, f"fresh, {more} nodes", [redraft.run_instead(table[more], block) for table in tables])
        for_nothing = [redraft.run_beside(table[size], table[few], table[more]) for table in tables]
        add(size, f"beside: {size} fresh, {few} again for nothing", for_nothing)
    return {"temperature": temperature, "rows": rows}


def show(title: str, rows: list[dict]) -> None:
    table = Table(title=title)
    for column in rows[0]:
        table.add_column(column, justify="left" if isinstance(rows[0][column], str) else "right")
    for row in rows:
        table.add_row(*(f"{value:.3f}" if isinstance(value, float) else str(value) for value in row.values()))
    Console().print(table)


def rounded(value):
    if isinstance(value, dict):
        return {key: rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [rounded(entry) for entry in value]
    return round(value, DIGITS) if isinstance(value, float) else value


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target_model", required=True)
    parser.add_argument("--draft_model", required=True, help="directory of a head")
    parser.add_argument("--data_path", nargs="+", required=True, help="held-out texts to cut prompts from")
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
    parser.add_argument("--texts_dir", type=Path, help="keep the target's texts here")
    parser.add_argument("--output", type=Path, help="json to write")
    args = parser.parse_args()
    target, tokenizer = load_target(args.target_model)
    head = KVSpecDraftModel.from_pretrained(args.draft_model, dtype=target.dtype).eval().to(target.device)
    prompts = cut_prompts(load_texts(args.data_path), tokenizer, args.num_prompts, args.prompt_length, args.seed)
    report = {
        "command": shlex.join(sys.argv), "versions": versions(), "prompts_sha256": digest(prompts), "rules": [],
        "redraft": [],
    }  # fmt: skip
    for temperature in args.temperatures:
        settings = {"max_new_tokens": args.max_new_tokens, "temperature": temperature}
        texts = cached_texts(args.texts_dir, target, tokenizer, prompts, **settings)
        texts = [text for text in texts if len(text.input_ids) - text.prompt_length > head.config.draft_block_size]
        if "rules" in args.parts and temperature > 0:
            found = compare_rules(head, target, texts, temperature, args.num_drafts, args.num_nodes)
            show(
                f"T={temperature:g}: accepted tokens per verification, {found['anchors']} anchors", found["equal_rows"]
            )
            for part in ("first_token", "whole_blocks"):
                show(f"T={temperature:g}: {part}", [{"rule": name, **row} for name, row in found[part].items()])
            report["rules"].append(rounded(found))
        if "redraft" in args.parts:
            found = compare_redrafts(head, target, texts, temperature, args.num_nodes)
            show(f"T={temperature:g}: drafting again", found["rows"])
            report["redraft"].append(rounded(found))
        if args.output:
            write_json(args.output, report)


if __name__ == "__main__":
    main()
