# SPDX-License-Identifier: Apache-2.0
"""Cases of what drafts without a head: learning a step's rows, finding a text's own places, growing the trees.

The rows' best successors are given: choosing them is one level of ``tree_candidates``.
"""

import torch
from kernel_cases import Case, Geometry, Outputs, random_trees

from vllm_kvspec.kernels import recycle, reference_recycle
from vllm_kvspec.kernels.reference_recycle import WIDTH, RecycleTable, empty_table

# As in the engine.
SLOTS = 1 << 18
LENGTH = 1024
# Few tokens, so that contexts come again.
TOKENS = 50


def step_rows(batch: int, rows: int, device: torch.device) -> tuple[tuple[torch.Tensor, ...], dict[str, torch.Tensor]]:
    """Best successors of a step's rows, and the rows, as ``recycle_update`` takes them."""
    parent, depth, _ = random_trees(batch, rows, device)
    count = batch * rows
    log_prob = torch.randn(count, 4 * WIDTH, device=device).log_softmax(-1).topk(WIDTH).values
    best = torch.randint(TOKENS, (count, 1), device=device) + torch.arange(WIDTH, device=device)
    requests = torch.arange(batch, device=device)
    known = dict(
        input_ids=torch.randint(TOKENS, (count,), dtype=torch.int32, device=device),
        positions=(LENGTH // 2 + depth).flatten().long(),
        logits_indices=torch.arange(count, device=device),
        idx_mapping=requests.repeat_interleave(rows),
        local_pos=torch.arange(rows, dtype=torch.int32, device=device).repeat(batch),
        parent=parent,
        owner=requests % 3,
        text=torch.randint(TOKENS, (batch, LENGTH), dtype=torch.int32, device=device),
    )
    return (best, log_prob), known


def recycle_update_case(g: Geometry, batch: int, rows: int, device: torch.device) -> Case:
    best, known = step_rows(batch, rows, device)

    def with_table(kernel):
        table = empty_table(SLOTS, device)

        def run():
            kernel(table, *best, **known)
            return tuple(table)

        return run

    shape = dict(batch=batch, rows=rows)
    twin = reference_recycle.recycle_update
    return Case("recycle_update", shape, with_table(recycle.recycle_update), with_table(twin), compare=equal)


def equal(found: Outputs, expected: Outputs) -> tuple[float, bool]:
    """0, and whether all is equal; empty slots hold infinities."""
    return 0.0, all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def own_matches_case(g: Geometry, batch: int, context: int, device: torch.device) -> Case:
    """On a GPU vLLM keeps the texts in the host's memory; here they are the device's."""
    text = torch.randint(10 * TOKENS, (batch, context), dtype=torch.int32, device=device)
    text[:, -8:] = text[:, context // 2 - 8 : context // 2]
    inputs = text, torch.arange(batch, device=device), torch.full((batch,), context - 1, device=device).int()
    return Case(
        "own_matches",
        dict(batch=batch, context=context),
        lambda: (recycle.own_matches(*inputs),),
        lambda: (reference_recycle.own_matches(*inputs),),
        text.nbytes,
    )


def recycle_tree_case(g: Geometry, batch: int, rows: int, device: torch.device) -> Case:
    """Trees of requests that sample, from a table that has learned three steps."""
    table = empty_table(SLOTS)
    for _ in range(3):
        best, known = step_rows(batch, rows, torch.device("cpu"))
        reference_recycle.recycle_update(table, *best, **known)
    table = RecycleTable(*(column.to(device) for column in table))
    text, requests = known["text"].to(device), torch.arange(batch, device=device)
    base = torch.full((batch,), LENGTH - 1, dtype=torch.int32, device=device)
    inputs = table, reference_recycle.own_matches(text, requests, base)
    keywords = dict(
        request=requests, base=base, temperature=torch.ones(batch, device=device), seed=7919 * (1 + requests),
        chain=torch.zeros_like(base), owner=known["owner"].to(device), text=text, size=rows - 1, num_nodes=rows - 1,
        coupled=True,
    )  # fmt: skip
    return Case(
        "recycle_tree",
        dict(batch=batch, rows=rows),
        lambda: recycle.recycle_tree(*inputs, **keywords),
        lambda: reference_recycle.recycle_tree(*inputs, **keywords),
        compare=nearly_all_paths,
    )


def nearly_all_paths(found: Outputs, expected: Outputs) -> tuple[float, bool]:
    """0, and whether each tree has the same paths but one: of equally good ones rounding may leave out either."""
    pairs = zip(paths(*found[:2]), paths(*expected[:2]), strict=True)
    return 0.0, all(len(one ^ other) <= 2 for one, other in pairs)


def paths(tokens: torch.Tensor, parent: torch.Tensor) -> list[set[tuple[int, ...]]]:
    """Every node of each tree, as the tokens on the way to it."""
    trees = []
    for named, above in zip(tokens.tolist(), parent.tolist(), strict=True):
        found = [()]
        for token, node in zip(named, above[1:], strict=True):
            found.append((*found[node], token))
        trees.append(set(found))
    return trees
