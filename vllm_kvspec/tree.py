# SPDX-License-Identifier: Apache-2.0
"""Token trees: fixed shapes written as parents, and the expansion of a head's scores into candidates.

Node 0 is the anchor. A shape is the list of the parents of nodes 1..N in order, each before its child. The expansion
has fixed shapes and never waits for the device, so it can sit in a CUDA graph; the tree itself is then cut from the
candidates by ``kernels.tree_build``.
"""

from collections.abc import Sequence

import torch

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


def _child_scores(
    logits: torch.Tensor,
    parent_tokens: torch.Tensor,
    transition_in: torch.Tensor,
    transition_out: torch.Tensor,
    noise: torch.Tensor | None,
    scale: torch.Tensor | None,
) -> torch.Tensor:
    """Log-probabilities [B, P, V] of the children of ``parent_tokens`` [B, P] at a depth with ``logits`` [B, V].

    softmax((l + noise) / scale). With noise [B, V] (temperature times the Gumbel noise the target will add) this is the
    head's belief about which token the target's sampler will pick.
    """
    bias = transition_in[parent_tokens] @ transition_out.T
    scores = logits.float().unsqueeze(1) + bias.float()
    if noise is not None:
        scores = scores + noise.unsqueeze(1)
    if scale is not None:
        scores = scores / scale.view(-1, 1, 1)
    return scores.log_softmax(dim=-1)


def num_candidates(block_size: int, beam: int, width: int) -> int:
    """Candidates M that ``expand_tree`` returns per request."""
    total = size = width
    for _ in range(block_size - 1):
        size = min(beam, size) * width
        total += size
    return total


def ranking_scale(temperature: torch.Tensor, coupled: bool, greedy_scale: float) -> torch.Tensor:
    """Divisor [B] fp32 of the scores of requests with ``temperature`` [B].

    Scores must be beliefs about the token that the target will pick, or the tree spends its nodes badly. Sampling picks
    from softmax(l / T), and with the noise known from softmax(l + noise). Greedy decoding picks the best token, which
    is surer than softmax(l) says: ``greedy_scale`` below 1, a constant of the head.
    """
    return torch.where(temperature > 0, torch.ones_like(temperature) if coupled else temperature, greedy_scale)


def expand_tree(
    depth_logits: torch.Tensor,
    anchor: torch.Tensor,
    transition_in: torch.Tensor,
    transition_out: torch.Tensor,
    noise: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    beam: int,
    width: int,
    chain: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Candidates of a tree, level by level: the best ``width`` children of the best ``beam`` nodes of each level.

    depth_logits: [B, G, V], the LM head's output per depth, without bias.
    anchor: [B] int64, the root's token.
    transition_in, transition_out: [V, r] each, the factors of the transition bias.
    noise: [B, G, V] fp32, temperature times the noise with which the target samples the rows at base + d, or None.
    scale: [B] fp32, see ``ranking_scale``, or None for 1.
    chain: [B] bool, rows that want a chain: all but the greedy path gets score -inf. None for no such row.

    Returns score [B, M] fp32 (cumulative log-probability), token [B, M] int64 and parent [B, M] int32 (index of the
    parent among the M candidates, -1 for the root), in level order.
    """
    batch, device = anchor.shape[0], anchor.device
    parent_score = torch.zeros(batch, 1, device=device)
    parent_token, parent_index = anchor.unsqueeze(1), torch.full((batch, 1), -1, dtype=torch.int64, device=device)
    scores, tokens, parents = [], [], []
    offset = 0
    for level in range(depth_logits.shape[1]):
        level_noise = None if noise is None else noise[:, level]
        log_probs = _child_scores(
            depth_logits[:, level], parent_token, transition_in, transition_out, level_noise, scale
        )
        child_score, child_token = log_probs.topk(width, dim=-1)
        score = (parent_score.unsqueeze(-1) + child_score).flatten(1)
        if chain is not None:
            off_chain = chain.unsqueeze(1) & (torch.arange(score.shape[1], device=device) > 0)
            score = score.masked_fill(off_chain, float("-inf"))
        scores.append(score)
        tokens.append(child_token.flatten(1))
        parents.append(parent_index.repeat_interleave(width, dim=1))
        parent_score, best = score.topk(min(beam, score.shape[1]), dim=-1)
        parent_token, parent_index = tokens[-1].gather(1, best), best + offset
        offset += score.shape[1]
    return torch.cat(scores, 1), torch.cat(tokens, 1), torch.cat(parents, 1).int()


def expand_fixed(
    depth_logits: torch.Tensor,
    anchor: torch.Tensor,
    transition_in: torch.Tensor,
    transition_out: torch.Tensor,
    noise: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
    *,
    parents: Sequence[int],
) -> torch.Tensor:
    """Tokens [B, N] int64 of a tree of fixed shape ``parents``: the i-th child of a node is its i-th best token.

    The other arguments are those of ``expand_tree``. Raises ValueError when the tree is deeper than the block.
    """
    depth = depths(parents)
    if max(depth) > depth_logits.shape[1]:
        raise ValueError(
            f"A fixed tree must not be deeper than the head's block ({depth_logits.shape[1]}), got depth {max(depth)}; "
            "use a shallower tree."
        )
    children: dict[int, list[int]] = {}
    for node, parent in enumerate(parents, start=1):
        children.setdefault(parent, []).append(node)
    tokens: list[torch.Tensor] = [anchor] + [anchor] * len(parents)
    for level in range(max(depth)):
        inner = [node for node in children if depth[node] == level]
        parent_tokens = torch.stack([tokens[node] for node in inner], dim=1)
        level_noise = None if noise is None else noise[:, level]
        log_probs = _child_scores(
            depth_logits[:, level], parent_tokens, transition_in, transition_out, level_noise, scale
        )
        best = log_probs.topk(max(len(children[node]) for node in inner), dim=-1).indices
        for i, node in enumerate(inner):
            for rank, child in enumerate(children[node]):
                tokens[child] = best[:, i, rank]
    return torch.stack(tokens[1:], dim=1)
