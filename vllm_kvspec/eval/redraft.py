# SPDX-License-Identifier: Apache-2.0
"""Drafting again after a rejection without a pass of the head (arXiv 2602.21224), offline.

The rows of a block head do not know each other's tokens, only its transition does. So when the target has put its own
token at position ``base + d``, the rows d, d + 1, ... made at ``base`` can be decoded once more under that token. They
may stand in for the next pass, or give nodes to the tree of the next pass. What that is worth along a text is found by
walking through it: what is drafted next depends on where the last draft ended.
"""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from vllm_kvspec.eval.acceptance import accepted_depth, anchor_batches, noise_windows
from vllm_kvspec.eval.texts import Text
from vllm_kvspec.kernels.reference import tree_build
from vllm_kvspec.models.draft_head import KVSpecDraftModel
from vllm_kvspec.models.drafting import block_rows, expand_block
from vllm_kvspec.models.target import TargetView, view_target
from vllm_kvspec.tree import RankingScales, num_candidates, ranking_scale


@dataclass
class Run:
    """Through one text: forwards of the target, passes of the head, tokens that came out."""

    forwards: int = 0
    passes: int = 0
    tokens: int = 0


@torch.no_grad()
def row_acceptance(
    head: KVSpecDraftModel, target: PreTrainedModel, text: Text, num_nodes: list[int], *, temperature: float,
    beam: int = 8, width: int = 4, view: TargetView | None = None,
) -> dict[int, torch.Tensor]:  # fmt: skip
    """Accepted tokens {nodes: [G, P]} int64 of the trees from rows d.. of the block made at every anchor.

    Row 0 is the fresh draft. Where fewer rows are left than ``num_nodes`` can fill with ``width`` children a node, the
    nodes' children are as many as that takes. Coupled above temperature 0. Block heads with a transition only.
    ``view``: of the text, if there is one already.
    """
    config, device = head.config, target.device
    if config.drafting != "block" or not config.transition_rank:
        raise ValueError("Only a block head with a transition can draft again from the same rows; use another head.")
    block = config.draft_block_size
    ids = torch.tensor([text.input_ids], device=device)
    view = view or view_target(target, config, ids)
    found: dict[int, list[torch.Tensor]] = {n: [] for n in num_nodes}
    for base in anchor_batches(text, head, device):
        truth = ids[0, base[:, None] + 1 + torch.arange(block, device=device)]
        temperatures = torch.full((len(base),), temperature, device=device)
        scale = ranking_scale(temperatures, True, RankingScales.of(config))
        noise = noise_windows(text.seed, temperature, base, block, config.vocab_size) if temperature > 0 else None
        parts: dict[int, list[torch.Tensor]] = {n: [] for n in num_nodes}
        rows = block_rows(head, target, view, ids, base)
        for skip in range(block):
            wide = width
            while num_candidates(block - skip, beam, wide) < max(num_nodes):
                wide *= 2
            here = None if noise is None else noise[:, skip:]
            anchor = ids[0, base + skip]
            candidates = expand_block(head, target, rows.left(skip), anchor, here, scale, beam=beam, width=wide)
            accepted = accepted_depth(*tree_build(*candidates, max(num_nodes))[:3], truth[:, skip:])
            for n in num_nodes:
                parts[n].append(accepted[:, n])
        for n in num_nodes:
            found[n].append(torch.stack(parts[n]).cpu())
    empty = torch.empty(block, 0, dtype=torch.int64)
    return {n: torch.cat([empty, *pieces], dim=1) for n, pieces in found.items()}


def run_instead(accepted: torch.Tensor, least_rows: int) -> Run:
    """Draft again from the same rows while ``least_rows`` of them are left, else with a new pass of the head.

    ``accepted`` [G, P]: one size of ``row_acceptance``. With ``least_rows`` G every draft is a fresh one.
    """
    rows, anchors = accepted.shape
    table, run, base, row = accepted.tolist(), Run(), 0, 0
    while base + row < anchors:
        emitted = table[row][base] + 1
        run = Run(run.forwards + 1, run.passes + (row == 0), run.tokens + emitted)
        row += emitted
        if rows - row < least_rows:
            base, row = base + row, 0
    return run


def run_beside(fresh: torch.Tensor, again: torch.Tensor, alone: torch.Tensor) -> Run:
    """A pass of the head for every draft, and beside its nodes those from the last block's rows.

    ``fresh`` and ``again`` [G, P]: ``row_acceptance`` of the nodes that each gets; ``alone`` where no rows are left.
    """
    rows, anchors = fresh.shape
    run, base, row = Run(), 0, 0
    while base + row < anchors:
        here = base + row
        best = max(fresh[0, here], again[row, base]) if row else alone[0, here]
        emitted = int(best) + 1
        run = Run(run.forwards + 1, run.passes + 1, run.tokens + emitted)
        base, row = (here, emitted) if emitted < rows else (here + emitted, 0)
    return run


def run_overlapped(accepted: torch.Tensor) -> Run:
    """Every draft comes from the block made one step before, as if the pass ran beside the target's forward.

    Such a pass cannot know what the forward accepts (PEARL's overlap, arXiv 2408.11850). Where no rows are left of that
    block, the step waits for a fresh one. ``accepted`` as in ``run_instead``.
    """
    rows, anchors = accepted.shape
    table, run, here, row = accepted.tolist(), Run(), 0, 0
    while here < anchors:
        emitted = table[row][here - row] + 1
        run = Run(run.forwards + 1, run.passes + 1, run.tokens + emitted)
        here += emitted
        row = emitted if emitted < rows else 0
    return run


def column(runs: list[Run], name: str) -> torch.Tensor:
    """One of the counts of ``runs``, fp64 [runs]."""
    return torch.tensor([getattr(run, name) for run in runs], dtype=torch.float64)
