# SPDX-License-Identifier: Apache-2.0
"""``tree_build`` and ``tree_walk`` on CPU, compiled: the twins start some ten small torch operations for each."""

import numpy as np
import torch

from vllm_kvspec.engine.cpu.kernels.compiled import F32, I32, I64, INT, compiled, flat, integers
from vllm_kvspec.kernels.reference import check_num_nodes

NO_SCORE = np.empty(0, np.float32)


@compiled(F32, I64, I32, INT, INT, INT, I64, I32, I32, I64)
def _build(score, token, parent, num_reqs, num_candidates, num_nodes, tokens, parents, depths, masks):
    node_of = np.empty(num_candidates, np.int64)
    for b in range(num_reqs):
        first, row = b * num_candidates, b * (num_nodes + 1)
        node_of[:] = -1
        parents[row], depths[row], masks[row] = 0, 0, 1
        for node in range(1, num_nodes + 1):
            best, best_score = -1, np.float32(-np.inf)
            for i in range(num_candidates):
                value = score[first + i]
                # NaN counts as -inf.
                value = value if value == value else np.float32(-np.inf)
                if node_of[i] < 0 and (best < 0 or value > best_score):
                    best, best_score = i, value
            node_of[best] = node
            above = parent[first + best]
            if best_score == -np.inf:
                tokens[b * num_nodes + node - 1], above_node = 0, node - 1
            else:
                tokens[b * num_nodes + node - 1] = token[first + best]
                # A parent without a node yet stands behind its child: only with broken scores.
                above_node = 0 if above < 0 else node_of[above] if node_of[above] > 0 else node - 1
            parents[row + node] = min(above_node, node - 1)
            depths[row + node] = depths[row + parents[row + node]] + 1
            masks[row + node] = masks[row + parents[row + node]] | np.int64(1) << np.int64(node)


def tree_build(
    score: torch.Tensor, token: torch.Tensor, parent: torch.Tensor, num_nodes: int
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """``reference.tree_build``."""
    batch, num_candidates = score.shape
    check_num_nodes(num_nodes, num_candidates)
    tokens = torch.empty(batch, num_nodes, dtype=torch.int64)
    parents, depths = (torch.empty(batch, num_nodes + 1, dtype=torch.int32) for _ in range(2))
    masks = torch.empty(batch, num_nodes + 1, dtype=torch.int64)
    inputs = (flat(x.contiguous()) for x in (score, token, parent))
    _build(*inputs, batch, num_candidates, num_nodes, flat(tokens), flat(parents), flat(depths), flat(masks))
    return tokens, parents, depths, masks


@compiled(I64, I64, I32, INT, I32, I64, F32, INT, I64, I32, I32)
def _walk(sampled, drafted, parent, num_nodes, starts, mapping, score, window, tokens, num_sampled, path):
    is_loose = len(score) > 0
    run = np.zeros(num_nodes, np.int64)
    for b in range(len(mapping)):
        out, tree, first = b * num_nodes, mapping[b] * num_nodes, starts[b]
        num_rows = starts[b + 1] - first
        if is_loose:
            # Nodes that the samples lead through below each node; see the twin.
            run[:] = 0
            for t in range(num_rows - 1, 0, -1):
                above = parent[tree + t]
                if drafted[first + t] >= 0 and drafted[first + t] == sampled[first + above]:
                    run[above] = run[t] + 1
        count, node = 0, 0 if num_rows > 0 else -1
        while node >= 0:
            following, best, token = -1, np.float32(-np.inf), sampled[first + node]
            for t in range(node + 1, num_rows):
                draft = drafted[first + t]
                if parent[tree + t] != node or draft < 0:
                    continue
                if draft == sampled[first + node]:
                    following, token = t, draft
                    break
                if is_loose and run[t] >= window and score[first + t] > best:
                    following, best, token = t, score[first + t], draft
            tokens[out + count], path[out + count] = token, node
            count, node = count + 1, following
        num_sampled[b] = count
        for d in range(count, num_nodes):
            tokens[out + d], path[out + d] = -1, d


def tree_walk(
    sampled: torch.Tensor,
    draft_tokens: torch.Tensor,
    parent: torch.Tensor,
    cu_num_logits: torch.Tensor,
    idx_mapping: torch.Tensor,
    score: torch.Tensor | None = None,
    window: int = 0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """``reference.tree_walk``."""
    shape = (idx_mapping.shape[0], parent.shape[1])
    tokens, path = torch.empty(shape, dtype=torch.int64), torch.empty(shape, dtype=torch.int32)
    num_sampled = torch.empty(shape[0], dtype=torch.int32)
    _walk(
        flat(sampled), integers(draft_tokens), flat(parent), shape[1], flat(cu_num_logits), integers(idx_mapping),
        NO_SCORE if score is None else flat(score), window, flat(tokens), flat(num_sampled), flat(path),
    )  # fmt: skip
    return tokens, num_sampled, path
