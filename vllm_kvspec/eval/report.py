# SPDX-License-Identifier: Apache-2.0
"""The eval command: acceptance of a head over held-out prompts and its bottlenecks, as tables, json and plots."""

import functools
import json
import math
from dataclasses import asdict
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from transformers import PreTrainedModel

from vllm_kvspec.assistant import is_assistant
from vllm_kvspec.config import NOT_COMPARED, KVSpecDraftConfig, check_fingerprint, target_fingerprint
from vllm_kvspec.eval import recycle
from vllm_kvspec.eval.acceptance import COUPLED, REJECTION, Acceptance, evaluate, fitting_sizes, modes_at
from vllm_kvspec.eval.bottlenecks import bottlenecks
from vllm_kvspec.eval.plots import Curve, plot_acceptance, plot_tau
from vllm_kvspec.eval.report_file import ReportFile
from vllm_kvspec.eval.texts import Text, cached_texts, digest, repeated_share
from vllm_kvspec.kernels.reference_recycle import HEAD_WIDTH
from vllm_kvspec.models.assistant_head import AssistantHead
from vllm_kvspec.models.draft_head import KVSpecDraftModel
from vllm_kvspec.models.drafting import Head
from vllm_kvspec.models.target import weights_sha256
from vllm_kvspec.train.data import cut_prompts, load_texts
from vllm_kvspec.train.record import versions
from vllm_kvspec.train.run import load_target
from vllm_kvspec.tree import MAX_NODES

# Attention maps and gradients are averages over thousands of rows after a few texts already.
BOTTLENECK_TEXTS = 8
DIGITS = 4


def measure(
    target_model: str,
    draft_model: str | None,
    data_path: list[str],
    *,
    num_prompts: int,
    prompt_length: int,
    max_new_tokens: int,
    temperatures: list[float],
    num_nodes: list[int],
    beam: int,
    width: int,
    seed: int,
    tree_depth: int | None = None,
    dtype: str = "float32",
    name: str | None = None,
    texts_dir: Path | None = None,
    with_bottlenecks: bool = True,
    graft: bool | None = None,
    command: str = "",
    output: Path | None = None,
) -> dict:
    """Print the tables and return the numbers with the conditions they were measured under, as plain JSON.

    ``draft_model``: a head, or an assistant with trees of ``tree_depth`` levels, which has no bottlenecks. None: what
    is drafted without a head, which has none either and takes neither beam nor width. ``graft``: the head with what is
    drafted without one, or the head alone; None: as it is served by default. ``texts_dir``: where the target's texts
    are kept for the next head, or None. ``name``: what ``compare`` calls the head; heads of the same name are
    seeds of one recipe. ``output``: where the report is written after every run; the runs that an interrupted
    measurement of the same left there are taken over. Raises ValueError when no text is long enough for a block, for a
    ``tree_depth`` without an assistant, and for ``graft`` without a head.
    """
    if tree_depth is not None and not (draft_model and is_assistant(draft_model)):
        raise ValueError(
            f"tree_depth is for an assistant's trees, got {tree_depth} with draft_model {draft_model}; leave it out."
        )
    if graft and draft_model is None:
        raise ValueError("Grafts need a head to graft onto, found --graft without --draft_model; leave it out.")
    target, tokenizer = load_target(target_model, getattr(torch, dtype))
    fingerprint = target_fingerprint(target.config.get_text_config(), tokenizer)
    head, block, sizes = None, recycle.CHAIN, [n for n in num_nodes if n <= MAX_NODES]
    if draft_model is not None:
        head = _load_head(draft_model, target, fingerprint, tree_depth)
        graft = _is_grafted(head, width) if graft is None else graft
        block = head.config.draft_block_size
        sizes = fitting_sizes(num_nodes, block, beam, width)
    prompts = cut_prompts(load_texts(data_path), tokenizer, num_prompts, prompt_length, seed)
    conditions = {
        "command": command,
        "versions": versions(),
        "device": _device_name(target.device),
        "target": {
            "name": target_model,
            "weights_sha256": weights_sha256(target),
            "fingerprint": {key: value for key, value in fingerprint.items() if key not in NOT_COMPARED},
        },
        "head": _describe_head(head, draft_model, name, graft) if head else _describe_no_head(name),
        "graft": bool(graft),
        "data_path": [str(path) for path in data_path],
        "prompts_sha256": digest(prompts),
        "num_prompts": num_prompts,
        "prompt_length": prompt_length,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "beam": beam,
        "width": width,
        "num_nodes": sizes,
        "draft_block_size": block,
        "dtype": dtype,
    }
    file = ReportFile(output, conditions)

    @functools.cache
    def texts_at(temperature: float) -> tuple[list[Text], str]:
        settings = {"max_new_tokens": max_new_tokens, "temperature": temperature}
        return _measurable(cached_texts(texts_dir, target, tokenizer, prompts, **settings), block, **settings)

    def run(temperature: float, mode: str) -> dict:
        texts, sha256 = texts_at(temperature)
        options = {"temperature": temperature, "beam": beam, "width": width}
        if head and not graft:
            found = evaluate(head, target, texts, sizes, mode=mode, **options)
        else:
            found = recycle.evaluate(target, texts, sizes, coupled=mode == COUPLED, head=head, **options)
        return _run(temperature, mode, texts, sha256, *found)

    for temperature in temperatures:
        for mode in modes_at(temperature):
            # Recycled probabilities are those of a few tokens: there is no rejection sampling to compare with.
            if mode == REJECTION and (graft or head is None):
                continue
            print_run(file.run(temperature, mode, run))
    if with_bottlenecks and isinstance(head, KVSpecDraftModel):
        first = temperatures[0]
        print_bottlenecks(
            file.bottlenecks(lambda: _rounded(bottlenecks(head, target, texts_at(first)[0][:BOTTLENECK_TEXTS], first)))
        )
    return file.finish()


def _measurable(texts: list[Text], block: int, *, max_new_tokens: int, temperature: float) -> tuple[list[Text], str]:
    """The texts that have an anchor, and the SHA-256 of all of them. Raises ValueError when none has."""
    # The last `block` tokens cannot be anchors, so a shorter continuation measures nothing.
    long_enough = [text for text in texts if len(text.input_ids) - text.prompt_length > block]
    if not long_enough:
        raise ValueError(
            f"A continuation must be longer than the head's block of {block} to be measured, found none at "
            f"temperature {temperature:g} (max_new_tokens {max_new_tokens}); ask for more tokens or prompts."
        )
    return long_enough, digest([asdict(text) for text in texts])


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


def _load_head(path: str, target: PreTrainedModel, fingerprint: dict, depth: int | None) -> Head:
    """A head, or an assistant for trees of ``depth`` levels. Raises ValueError for one of another target."""
    if is_assistant(path):
        return AssistantHead.load(path, target, depth)
    head = KVSpecDraftModel.from_pretrained(path, dtype=target.dtype).eval().to(target.device)
    check_fingerprint(head.config, fingerprint)
    return head


def _is_grafted(head: Head, width: int) -> bool:
    """Whether a server would graft onto trees of this head by default (``engine.config.keys``)."""
    if not isinstance(head, KVSpecDraftModel) or width > HEAD_WIDTH:
        return False
    return not head.config.has_own_context and head.config.fusion == "direct"


def _describe_head(head: Head, path: str, name: str | None, graft: bool) -> dict:
    record = Path(path) / "training.json"
    training = json.loads(record.read_text()) if record.is_file() else {}
    is_ours = isinstance(head, KVSpecDraftModel)
    config = head.config.to_dict() if is_ours else vars(head.config)
    kind = paradigm(head.config) if is_ours else f"assistant, {head.config.num_hidden_layers} layers"
    return {
        "path": path,
        "name": name or kind + (", graft" if graft else ""),
        "weights_sha256": weights_sha256(head),
        "parameters": sum(parameter.numel() for parameter in head.parameters()),
        "steps": training.get("steps"),
        "seed": training.get("seed"),
        "config": {key: value for key, value in config.items() if key not in ("target", "speculators_config")},
    }


def _describe_no_head(name: str | None) -> dict:
    return {
        "path": None, "name": name or "no head", "weights_sha256": None, "parameters": 0, "steps": None, "seed": None,
        "config": {},
    }  # fmt: skip


def paradigm(config: KVSpecDraftConfig) -> str:
    """Short name of what a head is, such as ``hybrid/block, 3 layers``."""
    fusion = "" if config.context == "hidden" or config.fusion == "direct" else f" {config.fusion}"
    layers = f"{config.num_hidden_layers} layer" + "s" * (config.num_hidden_layers > 1)
    drafting = {"autoregressive": "TTT"}.get(config.drafting, config.drafting)
    return f"{config.context}{fusion}/{drafting}, {layers}" + ("" if config.transition_rank else ", no bias")


def _run(temperature: float, mode: str, texts: list[Text], sha256: str, whole: dict, half: dict, extra: dict) -> dict:
    return {
        "temperature": temperature,
        "mode": mode,
        "texts": len(texts),
        "texts_sha256": sha256,
        "repeated_8gram_share": round(sum(map(repeated_share, texts)) / len(texts), DIGITS),
        "trees": {name: _rounded(asdict(acceptance)) for name, acceptance in whole.items()},
        "less_repetitive_half": {name: _short(acceptance) for name, acceptance in half.items()},
        **_rounded(extra),
    }


def _short(acceptance: Acceptance) -> dict:
    return _rounded({key: getattr(acceptance, key) for key in ("tau", "tau_se", "tau_all", "drafts", "conditional")})


def _rounded(value):
    """``value`` with every float in it rounded, None for NaN."""
    if isinstance(value, dict):
        return {key: _rounded(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_rounded(entry) for entry in value]
    if isinstance(value, float):
        return None if math.isnan(value) else round(value, DIGITS)
    return value


def title_of(run: dict) -> str:
    """``T=1, coupled``."""
    return f"T={run['temperature']:g}" + ("" if run["mode"] == "greedy" else f", {run['mode']}")


def print_run(run: dict) -> None:
    """Acceptance lengths by tree, and the chain by depth."""
    share = f"{run['texts']} texts, {run['repeated_8gram_share']:.0%} of their tokens end a repeated 8-gram"
    trees, chain = run["trees"], run["trees"]["chain"]
    lengths = Table(title=f"{title_of(run)}: tokens per verification ({share})")
    lengths.add_column("tree")
    for column in ("tau", "+-", "less repetitive half", "all anchors"):
        lengths.add_column(column, justify="right")
    for name, tree in trees.items():
        half = run["less_repetitive_half"][name]["tau"]
        lengths.add_row(name, *(f"{value:.2f}" for value in (tree["tau"], tree["tau_se"], half, tree["tau_all"])))
    depths = Table(title=f"{title_of(run)}: the chain by depth, retention {_with_error(chain, 'retention')}")
    depths.add_column("depth")
    rows = (
        ("conditional", "a_k"),
        ("conditional_se", "+-"),
        ("survival", "survival"),
        ("fresh", "fresh"),
        ("gap", "fresh - a_k"),
    )
    for k in range(len(chain["conditional"])):
        depths.add_column(str(k), justify="right")
    for key, label in rows:
        depths.add_row(label, *("" if value is None else f"{value:.2f}" for value in chain[key]))
    tables = [lengths, depths]
    if "sources" in run:
        tables.append(_sources_table(run))
    # One class says nothing new.
    if len(run.get("by_context", ())) > 1:
        tables.append(_context_table(run))
    for table in tables:
        Console().print(table)


def _context_table(run: dict) -> Table:
    """The chain by what is before it."""
    table = Table(title=f"{title_of(run)}: the chain by tokens before the anchor, all anchors")
    for column in ("up to", "anchors", "tau", "+-", "first token"):
        table.add_column(column, justify="right")
    for row in run["by_context"]:
        error = "" if row["tau_se"] is None else f"{row['tau_se']:.2f}"
        table.add_row(str(row["context"]), str(row["anchors"]), f"{row['tau']:.2f}", error, f"{row['first']:.2f}")
    return table


def _sources_table(run: dict) -> Table:
    """What drafts without a head, and grafted ones, owe to each source."""
    table = Table(title=f"{title_of(run)}: accepted tokens per verification, by where they came from")
    table.add_column("tree")
    for source in run["sources"]["chain"]:
        table.add_column(source, justify="right")
    for name, sources in run["sources"].items():
        table.add_row(name, *(f"{value:.2f}" for value in sources.values()))
    return table


def _with_error(figures: dict, key: str) -> str:
    if figures[key] is None:
        return "unknown (nothing was right that far)"
    return f"{figures[key]:.2f} +- {figures[key + '_se']:.2f}"


def print_bottlenecks(found: dict) -> None:
    """The figures of ``bottlenecks.bottlenecks``, one line each."""
    table = Table(title=f"Bottlenecks, over {found['texts']} texts at T={found['temperature']:g}")
    table.add_column("what")
    table.add_column("value", justify="right")
    error = found.get("attention_query_error", {})
    labels = {
        "by_depth": "attention, head against target, by depth",
        "grouped": "the same, query heads of a KV head averaged",
        "stale": "the anchor's own query kept at every depth",
    }
    for key, label in labels.items():
        if error:
            table.add_row(label, " ".join(f"{value:.2f}" for value in error[key]))
    share = found["gradient_share"]
    for part, label in (("", "all"), ("_of_layers", "the layers")):
        table.add_row(
            f"K/V projections' share of {label}: squared gradient (parameters)",
            f"{share['gradient' + part]:.1%} ({share['parameters' + part]:.1%})",
        )
    if gate := found.get("gate"):
        table.add_row("gate: mean (share below 0.05)", f"{gate['mean']:.3f} ({gate['closed']:.1%})")
    Console().print(table)


def plot(report: dict, directory: Path) -> list[Path]:
    """``acceptance.png`` and ``tau.png`` of a report, in ``directory``."""
    acceptance, tau, sizes = {}, {}, {}
    for run in report["runs"]:
        title, chain, trees = title_of(run), run["trees"]["chain"], run["trees"]
        acceptance[title] = {
            "free running": Curve(chain["conditional"], chain["conditional_se"]),
            "fresh draft": Curve(chain["fresh"]),
        }
        name = report["conditions"]["head"]["name"]
        tau[title] = {name: Curve(*([tree[key] for tree in trees.values()] for key in ("tau", "tau_se")))}
        sizes[title] = list(trees)
    return [
        plot_acceptance(directory / "acceptance.png", acceptance),
        plot_tau(directory / "tau.png", tau, sizes),
    ]
