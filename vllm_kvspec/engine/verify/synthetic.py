# SPDX-License-Identifier: Apache-2.0
"""Forced acceptance, for benchmarks only: steps cost what they cost at a given tau, but the text is not the target's.

vLLM's ``rejection_sample_method="synthetic"`` carried over to trees. Acceptance follows the path of first children (of
an ``"auto"`` tree: the best-ranked ones), depth by depth with the profile's conditional rates, and stops where that
path ends. The decisions are written into the sampled and drafted tokens, so that the ordinary walk then takes the path.
"""

import torch

from vllm_kvspec.engine import ops


def uniform_by_position(seeds: torch.Tensor, positions: torch.Tensor, requests: torch.Tensor) -> torch.Tensor:
    """Uniform numbers [L] fp32 in [0, 1], one for each row: a function of its request's seed and its position only.

    seeds int64 [R], positions int64 [L], requests int [L] (request-state row of each row).
    """
    ones = torch.ones(seeds.shape[0], dtype=torch.float32, device=seeds.device)
    gumbel = ops.gumbel_noise(seeds, ones, positions[:, None], requests, 1)[:, 0, 0]
    # The distribution function of the Gumbel distribution.
    return torch.exp(-torch.exp(-gumbel))


def force_acceptance(
    target_tokens: torch.Tensor,
    draft_tokens: torch.Tensor,
    parent_rows: torch.Tensor,
    depth: torch.Tensor,
    uniform: torch.Tensor,
    conditional_rates: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Target and draft tokens of all rows, changed so that ``tree_walk`` accepts by the rates.

    A row whose uniform number is below the rate of its depth gets its first child's token as the target's; the children
    of any other row become -1, which is never accepted.

    Args:
        target_tokens: int64 [L], the target's samples.
        draft_tokens: int [L], drafted tokens; negative ones stay unaccepted.
        parent_rows: int64 [L], row of each row's parent; of a root: its own.
        depth: int [L].
        uniform: fp32 [L].
        conditional_rates: fp32 [D], probability that a node of depth d + 1 is accepted when its parent is.
    """
    num_rows = target_tokens.shape[0]
    rows = torch.arange(num_rows, device=target_tokens.device)
    # Row of the first child; num_rows where there is none (roots are their own parents, so they are left out).
    first_child = torch.full((num_rows + 1,), num_rows, dtype=torch.int64, device=rows.device)
    first_child.scatter_reduce_(0, torch.where(parent_rows < rows, parent_rows, num_rows), rows, "amin")
    child_token = torch.nn.functional.pad(draft_tokens.long(), (0, 1), value=-1)[first_child[:-1]]
    rate = torch.nn.functional.pad(conditional_rates, (0, 1))[depth.long().clamp(max=conditional_rates.shape[0])]
    accepted = (uniform < rate) & (child_token >= 0)
    forced_draft = torch.where(accepted[parent_rows], draft_tokens, -1)
    return torch.where(accepted, child_token, target_tokens), forced_draft
