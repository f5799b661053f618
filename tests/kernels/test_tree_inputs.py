# SPDX-License-Identifier: Apache-2.0
"""tree_inputs: kernel against twin, and the twin against the definition for one tree."""

import pytest
import torch

from vllm_kvspec.kernels import reference
from vllm_kvspec.kernels.tree_inputs import tree_inputs

POISON = -77


def _case(device: torch.device, counts: list[int], num_nodes: int, max_reqs: int, seed: int = 0) -> dict:
    gen = torch.Generator().manual_seed(seed)
    num_rows = sum(counts)
    states = max_reqs + 2
    depth = torch.randint(1, 9, (states, num_nodes), generator=gen, dtype=torch.int32)
    depth[:, 0] = 0
    mask = torch.randint(1, 1 << 40, (states, num_nodes), generator=gen)
    # Two scheduled rows before every logits row: prompt chunks that yield no logits.
    logits_indices = torch.arange(num_rows) * 3 + 2
    inputs = dict(
        positions=torch.randint(0, 5000, (3 * num_rows + 2,), generator=gen),
        logits_indices=logits_indices,
        cu_num_logits=torch.tensor([0, *torch.tensor(counts).cumsum(0).tolist()], dtype=torch.int32),
        idx_mapping=torch.randperm(states, generator=gen)[: len(counts)],
        depth=depth,
        ancestor_mask=mask,
        batch_mask=torch.full((max_reqs, num_nodes), POISON),
        batch_len=torch.full((max_reqs,), POISON, dtype=torch.int32),
        local_pos=torch.full((num_rows,), POISON, dtype=torch.int32),
    )
    return {name: tensor.to(device) for name, tensor in inputs.items()}


@pytest.mark.parametrize(
    ("counts", "num_nodes", "max_reqs"),
    [
        pytest.param([5], 5, 1, id="one-tree"),
        pytest.param([9, 1, 4, 0, 9], 9, 8, id="mixed-trees-decode-empty"),
        pytest.param([64, 64], 64, 3, id="largest-tree"),
        pytest.param([2, 1, 2], 2, 3, id="chain-of-one"),
        pytest.param([0, 0], 6, 4, id="no-logits"),
    ],
)
def test_kernel_matches_twin(device, counts, num_nodes, max_reqs):
    ours, twin = _case(device, counts, num_nodes, max_reqs), _case(device, counts, num_nodes, max_reqs)
    tree_inputs(**ours)
    reference.tree_inputs(**twin)
    for name, tensor in twin.items():
        assert torch.equal(ours[name], tensor), name


def test_twin_follows_the_definition():
    case = _case(torch.device("cpu"), [4, 1], 5, 3)
    before = case["positions"].clone()
    reference.tree_inputs(**case)
    row = case["idx_mapping"][0]
    base = before[2]
    assert case["positions"][[2, 5, 8, 11]].tolist() == (base + case["depth"][row, :4]).tolist()
    assert case["positions"][14] == before[14]
    assert case["batch_len"].tolist() == [4, 0, 0]
    assert case["batch_mask"][0].tolist() == [*case["ancestor_mask"][row, :4].tolist(), POISON]
    assert case["local_pos"].tolist() == [*case["depth"][row, :4].tolist(), 0]
