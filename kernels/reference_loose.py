# SPDX-License-Identifier: Apache-2.0
"""Torch twin of ``loose_scores.py``: which drafts FLy's lossy walk may go to, and how much the target likes each."""

import torch

# Of this many most probable tokens the entropy is taken, as in vLLM 0.33 by default.
TOP = 3


def loose_scores(
    logits: torch.Tensor,
    sampled: torch.Tensor,
    draft_tokens: torch.Tensor,
    parent: torch.Tensor,
    cu_num_logits: torch.Tensor,
    idx_mapping: torch.Tensor,
    threshold: float,
) -> torch.Tensor:
    """The target's logit of each node's token after its parent, where the walk may go there without a sample.

    That is where the sample of the parent's row is on no child, and the target is unsure there: the terms
    ``-p log p`` of its `TOP` most probable tokens add up to ``threshold`` or more (FLy, arXiv 2511.22972, with the
    entropy of vLLM 0.33; natural logarithm, so ln 3 at most). Tokens that it cannot sample have a logit of -inf.

    Args:
        logits: float ``[L, V]``, contiguous rows, with every sampling parameter applied.
        sampled: int64 ``[L]``, the target's token of each row.
        draft_tokens: int ``[L]``, the drafted token of each row; negative is never gone to.
        parent: int32 ``[R, N1]``.
        cu_num_logits: int32 ``[B+1]``.
        idx_mapping: int ``[B]``.
        threshold: of the entropy, in nats.

    Returns:
        fp32 ``[L]``, for `tree_walk`; -inf for all other nodes.
    """
    num_rows = len(sampled)
    score = torch.full((num_rows,), -torch.inf, device=logits.device)
    starts, draft = cu_num_logits.tolist(), draft_tokens.long()
    trees = [parent[r, : starts[b + 1] - starts[b]] + starts[b] for b, r in enumerate(idx_mapping.tolist())]
    if not trees:
        return score
    above = torch.cat(trees).long()
    # A root is its own parent.
    child = (draft >= 0) & (above < torch.arange(num_rows, device=above.device))
    decided = torch.zeros_like(child)
    decided[above[child & (draft == sampled[above])]] = True
    child &= ~decided[above]
    rows = above[child].unique()
    prob = logits[rows].float().softmax(-1).topk(min(TOP, logits.shape[1])).values
    unsure = torch.zeros_like(child)
    unsure[rows] = torch.special.entr(prob).sum(-1) >= threshold
    child &= unsure[above]
    score[child] = logits[above[child], draft[child]].float()
    return score
