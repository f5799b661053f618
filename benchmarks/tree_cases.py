# SPDX-License-Identifier: Apache-2.0
"""Cases of the kernels that choose, lay out and walk trees. Only the candidates read enough to be bound by memory."""

import torch
from kernel_cases import Case, Geometry, Outputs, difference, random_parents, random_trees

from vllm_kvspec.kernels import reference, reference_candidates, reference_draft_inputs
from vllm_kvspec.kernels.draft_inputs import draft_inputs
from vllm_kvspec.kernels.gumbel_noise import gumbel_noise
from vllm_kvspec.kernels.reference_candidates import RankingScales, plan_levels
from vllm_kvspec.kernels.reference_draft_inputs import DraftRows
from vllm_kvspec.kernels.tree_build import tree_build
from vllm_kvspec.kernels.tree_candidates import tree_candidates
from vllm_kvspec.kernels.tree_inputs import tree_inputs
from vllm_kvspec.kernels.tree_walk import tree_walk
from vllm_kvspec.tree import num_candidates

# As the engine expands a tree by default.
BEAM, WIDTH = 8, 4
# Requests whose candidates must be the twin's. Sums in another order swap a few near-ties, and then a whole subtree.
SAME_CANDIDATES = 0.9


def tree_inputs_case(g: Geometry, batch: int, rows: int, device: torch.device) -> Case:
    _, depth, mask = random_trees(batch, rows, device)
    num_rows = batch * rows
    starts = torch.arange(0, num_rows + 1, rows, dtype=torch.int32, device=device)
    flat = 1000 + torch.arange(rows, device=device).repeat(batch)
    indices, requests = torch.arange(num_rows, device=device), torch.arange(batch, device=device)

    def with_outputs(kernel):
        positions, batch_mask = flat.clone(), torch.zeros_like(mask)
        batch_len = torch.zeros(batch, dtype=torch.int32, device=device)
        local_pos = torch.zeros(num_rows, dtype=torch.int32, device=device)

        def run():
            # A second call changes nothing: the root keeps its position.
            kernel(
                positions, indices, starts, requests, depth, mask,
                batch_mask=batch_mask, batch_len=batch_len, local_pos=local_pos,
            )  # fmt: skip
            return positions, batch_mask, batch_len, local_pos

        return run

    shape = dict(batch=batch, rows=rows)
    return Case("tree_inputs", shape, with_outputs(tree_inputs), with_outputs(reference.tree_inputs))


def tree_walk_case(g: Geometry, batch: int, rows: int, device: torch.device) -> Case:
    """Samples of two kinds of tokens: about half of the children match."""
    parent, _, _ = random_trees(batch, rows, device)
    sampled, draft = (torch.randint(2, (batch * rows,), device=device) for _ in range(2))
    starts = torch.arange(0, batch * rows + 1, rows, dtype=torch.int32, device=device)
    inputs = (sampled, draft, parent, starts, torch.arange(batch, device=device))
    return Case(
        "tree_walk",
        dict(batch=batch, rows=rows),
        lambda: tree_walk(*inputs),
        lambda: reference.tree_walk(*inputs),
    )


def tree_build_case(g: Geometry, batch: int, rows: int, device: torch.device) -> Case:
    """The candidates of a default expansion, with random scores that fall from parent to child."""
    total = max(num_candidates(g.draft_block_size, BEAM, WIDTH), rows - 1)
    generator = torch.Generator().manual_seed(0)
    parent = torch.tensor([-1, *random_parents(total - 1, generator)]).clamp(max=total - 2)
    drop = torch.rand(batch, total, generator=generator)
    score = torch.zeros(batch, total)
    for i in range(total):
        score[:, i] = (score[:, parent[i]] if parent[i] >= 0 else 0.0) - drop[:, i]
    token = torch.randint(g.vocab_size, (batch, total), generator=generator)
    inputs = [t.to(device) for t in (score, token, parent.int().repeat(batch, 1))]
    shape = dict(batch=batch, rows=rows, candidates=total)
    return Case(
        "tree_build",
        shape,
        lambda: tree_build(*inputs, rows - 1),
        lambda: reference.tree_build(*inputs, rows - 1),
    )


def gumbel_noise_case(g: Geometry, batch: int, device: torch.device) -> Case:
    rows = g.draft_block_size
    seeds = torch.arange(1, batch + 1, device=device) * 7919
    temperature = torch.ones(batch, device=device)
    positions = 1000 + torch.arange(rows, device=device).repeat(batch, 1)
    inputs = (seeds, temperature, positions, torch.arange(batch, device=device), g.vocab_size)
    return Case(
        "gumbel_noise",
        dict(batch=batch, rows=rows),
        lambda: (gumbel_noise(*inputs),),
        lambda: (reference.gumbel_noise(*inputs),),
        batch * rows * g.vocab_size * 4,
    )


def tree_candidates_case(g: Geometry, batch: int, device: torch.device) -> Case:
    """The head's logits to candidates, sampling under the target's noise."""
    rows = g.draft_block_size
    logits = torch.randn(batch, rows, g.vocab_size, dtype=g.dtype, device=device)
    transition_in, transition_out = (
        torch.randn(g.vocab_size, g.transition_rank, dtype=g.dtype, device=device) * g.transition_rank**-0.5
        for _ in range(2)
    )
    requests = torch.arange(batch, device=device)
    keywords = dict(
        levels=plan_levels(rows, BEAM, WIDTH), base=1000 + 7 * requests, idx_mapping=requests,
        temperature=torch.ones(batch, device=device), seeds=7919 * (1 + requests), coupled=True,
        scales=RankingScales(0.5, 1.0),
    )  # fmt: skip
    # In 16 bits torch would round the bias, which the kernel adds up in fp32.
    exact = (transition_in.float(), transition_out.float())
    return Case(
        "tree_candidates",
        dict(batch=batch, rows=rows),
        lambda: tuple(tree_candidates(logits, requests, transition_in, transition_out, **keywords)),
        lambda: tuple(reference_candidates.tree_candidates(logits, requests, *exact, **keywords)),
        logits.nbytes + rows * transition_out.nbytes,
        compare=candidates_agree,
    )


def candidates_agree(found: Outputs, expected: Outputs) -> tuple[float, bool]:
    """`difference` over the requests with the twin's tokens and parents, and whether these are enough."""
    same = ((found[1] == expected[1]) & (found[2] == expected[2])).all(1)
    if same.float().mean() < SAME_CANDIDATES:
        return float("inf"), False
    return difference((found[0][same],), (expected[0][same],))


def draft_inputs_case(g: Geometry, batch: int, rows: int, device: torch.device) -> Case:
    num_rows = batch * rows
    requests = torch.arange(batch, device=device)
    starts = torch.arange(0, num_rows + 1, rows, dtype=torch.int32, device=device)
    shared = (requests, 1000 + requests.int(), requests[:, None] + 5, torch.ones(batch, device=device))
    shared += (requests * 7919, torch.zeros(batch, dtype=torch.int32, device=device))
    keywords = dict(
        num_sampled=torch.full((batch,), min(3, rows), dtype=torch.int32, device=device),
        path=torch.arange(rows, dtype=torch.int32, device=device).repeat(batch, 1),
        cu_num_logits=starts,
        logits_indices=torch.arange(num_rows, device=device),
        hidden_states=torch.randn(num_rows, g.hidden_size, dtype=g.dtype, device=device),
        padding_request=batch,
    )
    dtypes = (torch.int64, torch.int32, torch.int64, torch.float32, torch.int64, torch.int32)

    def with_outputs(kernel):
        columns = [torch.zeros(batch, dtype=dtype, device=device) for dtype in dtypes]
        written = DraftRows(*columns, torch.zeros(batch, g.hidden_size, dtype=g.dtype, device=device))

        def run():
            kernel(*shared, **keywords, rows=written)
            return tuple(written)

        return run

    twin = reference_draft_inputs.draft_inputs
    return Case("draft_inputs", dict(batch=batch, rows=rows), with_outputs(draft_inputs), with_outputs(twin))
