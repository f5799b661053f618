# SPDX-License-Identifier: Apache-2.0
"""Shapes of token trees, written as the parents of nodes 1..N in order, each before its child. Node 0 is the anchor.

A tree comes from ``kernels.tree_candidates``, which expands a head's scores level by level, and, unless its shape is
fixed, ``kernels.tree_build``, which keeps the best candidates. ``expand_tree`` is that expansion for offline use.
"""

from collections.abc import Sequence

import torch

from vllm_kvspec.kernels import reference_candidates
from vllm_kvspec.kernels.reference_candidates import Candidates, Level, RankingScales, plan_levels, ranking_scale

__all__ = [
    "MAX_NODES",
    "RankingScales",
    "ancestor_masks",
    "chain_parents",
    "check_parents",
    "depths",
    "expand_tree",
    "fixed_levels",
    "num_candidates",
    "parents_from_widths",
    "plan_levels",
    "ranking_scale",
]

# One int64 holds a node's ancestors, one bit per node, the root included.
MAX_NODES = 63


def check_parents(parents: Sequence[int]) -> None:
    """Raise ValueError unless ``parents`` (of nodes 1..N in order) is a tree of 1..63 nodes, parents first."""
    if not 1 <= len(parents) <= MAX_NODES:
        raise ValueError(
            f"A tree must have 1 to {MAX_NODES} nodes beside the root, got {len(parents)}; make it smaller."
        )
    for node, parent in enumerate(parents, start=1):
        if not 0 <= parent < node:
            raise ValueError(
                f"The parent of node {node} must be one of the nodes 0..{node - 1}, got {parent}; list parents before "
                "their children."
            )


def parents_from_widths(widths: Sequence[int]) -> list[int]:
    """Parents of the tree whose nodes at depth d all have ``widths[d]`` children, level by level."""
    if not widths or min(widths) < 1:
        raise ValueError(f"Tree widths must be positive numbers, one per depth, got {list(widths)}; try [4, 2, 1].")
    parents: list[int] = []
    level = [0]
    for width in widths:
        first = len(parents) + 1
        parents.extend(parent for parent in level for _ in range(width))
        level = list(range(first, len(parents) + 1))
    check_parents(parents)
    return parents


def chain_parents(num_nodes: int) -> list[int]:
    """Parents of a chain of ``num_nodes`` nodes."""
    return list(range(num_nodes))


def depths(parents: Sequence[int]) -> list[int]:
    """Depth of every node, the root (0) first: N + 1 values."""
    check_parents(parents)
    depth = [0]
    for parent in parents:
        depth.append(depth[parent] + 1)
    return depth


def ancestor_masks(parents: Sequence[int]) -> list[int]:
    """Per node, the root first: bit j is set iff j is the node itself or an ancestor. As signed 64-bit integers."""
    check_parents(parents)
    masks = [1]
    for node, parent in enumerate(parents, start=1):
        masks.append((masks[parent] & (2**64 - 1)) | 1 << node)
    return [mask - 2**64 if mask >= 2**63 else mask for mask in masks]


def num_candidates(block_size: int, beam: int, width: int) -> int:
    """Candidates M per request of an expansion with ``plan_levels(block_size, beam, width)``."""
    return sum(level.num_parents * level.width for level in plan_levels(block_size, beam, width))


def fixed_levels(parents: Sequence[int], device: torch.device | None = None) -> tuple[list[Level], torch.Tensor]:
    """Levels of a tree of fixed shape ``parents``, in which the i-th child of a node is its i-th best token.

    Also returns int64 [N], the candidate index of nodes 1..N. Both are made once, on ``device``.
    """
    depth = depths(parents)
    children: list[list[int]] = [[] for _ in depth]
    for node, parent in enumerate(parents, start=1):
        children[parent].append(node)
    levels, candidate_of, offset = [], {}, 0
    inner = [0]
    for level in range(max(depth)):
        width = max(len(children[node]) for node in inner)
        next_inner = [node for node in range(len(depth)) if depth[node] == level + 1 and children[node]]
        slots = [-1] * (len(inner) * width)
        for i, node in enumerate(inner):
            for rank, child in enumerate(children[node]):
                candidate_of[child] = offset + i * width + rank
                slots[i * width + rank] = next_inner.index(child) if child in next_inner else -1
        places = torch.tensor(slots, dtype=torch.int32, device=device)
        levels.append(Level(len(inner), width, len(next_inner), places))
        offset += len(slots)
        inner = next_inner
    return levels, torch.tensor([candidate_of[node] for node in range(1, len(depth))], device=device)


def expand_tree(
    depth_logits: torch.Tensor,
    anchor: torch.Tensor,
    transition_in: torch.Tensor | None,
    transition_out: torch.Tensor | None,
    noise: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    beam: int,
    width: int,
    num_nodes: int | None = None,
    chain: torch.Tensor | None = None,
    draft_ids: torch.Tensor | None = None,
    gate: torch.Tensor | None = None,
) -> Candidates:
    """Candidates of a tree in torch: the best ``width`` children of the best ``beam`` nodes of each level.

    depth_logits: [B, G, Vd], the LM head's output per depth, without bias.
    anchor: [B] int64, the root's token.
    transition_in, transition_out: [V, r] and [Vd, r], the factors of the transition bias, or None.
    noise: [B, G, Vd] fp32, temperature times the noise with which the target samples the rows at base + d, or None.
    scale: [B] fp32, see ``ranking_scale``, or None for 1.
    num_nodes: nodes of the tree they are for, or None: see ``plan_levels``.
    chain: [B] bool, rows that want a chain: all but the greedy path gets score -inf. None for no such row.
    draft_ids: [Vd] int64, the target's token of each entry of a reduced vocabulary, or None for the whole.
    gate: [B, G, r], what the rows of transition_in are multiplied by at each depth, or None.

    Returns score [B, M] fp32 (cumulative log-probability), token [B, M] int64 and parent [B, M] int32 (index of the
    parent among the M candidates, -1 for the root), in level order.
    """

    levels = plan_levels(depth_logits.shape[1], beam, width, num_nodes)
    return reference_candidates.expand_tree(
        depth_logits, anchor, transition_in, transition_out, noise, scale, levels=levels, chain=chain,
        draft_ids=draft_ids, gate=gate,
    )  # fmt: skip
