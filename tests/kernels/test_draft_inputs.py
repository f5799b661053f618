# SPDX-License-Identifier: Apache-2.0
"""draft_inputs: kernel against twin, and the twin against the definition for one batch."""

import pytest
import torch

from vllm_kvspec.kernels import draft_inputs as kernel
from vllm_kvspec.kernels import reference_draft_inputs as twin

STATES, NODES, PADDING = 7, 5, 7
POISON = -77


def make_rows(num_rows: int, hidden_size: int, dtype: torch.dtype) -> twin.DraftRows:
    dtypes = (torch.int64, torch.int32, torch.int64, torch.float32, torch.int64, torch.int32)
    columns = (torch.full((num_rows,), POISON, dtype=d) for d in dtypes)
    state = torch.full((num_rows, hidden_size), float("nan"), dtype=dtype) if hidden_size else None
    return twin.DraftRows(*columns, state)


def make_case(
    device: torch.device, live: int, num_rows: int, hidden_size: int, has_path: bool, dtype=torch.float32
) -> dict:
    gen = torch.Generator().manual_seed(live)
    counts = torch.randint(1, NODES + 1, (live,), generator=gen) if has_path else torch.ones(live, dtype=torch.int64)
    cu = torch.cat((torch.zeros(1, dtype=torch.int64), counts.cumsum(0)))
    depth = torch.arange(NODES, dtype=torch.int32).repeat(live, 1)
    # Accepted nodes lie within the request's rows, and so does the last of them.
    num_sampled = (torch.rand(live, generator=gen) * counts).int() + 1
    num_sampled[:1] = 0
    path = (depth + torch.randint(0, 2, (live, NODES), generator=gen).int()).minimum(counts[:, None].int() - 1)
    case = dict(
        idx_mapping=torch.randperm(STATES, generator=gen)[:live],
        num_computed_tokens=torch.randint(1, 99, (STATES,), generator=gen, dtype=torch.int32),
        last_sampled=torch.randint(0, 1000, (STATES, 1), generator=gen),
        temperature=torch.rand(STATES, generator=gen),
        seeds=torch.randint(-(2**62), 2**62, (STATES,), generator=gen),
        chain=torch.randint(0, 2, (STATES,), generator=gen, dtype=torch.int32),
        num_sampled=num_sampled,
        path=path if has_path else None,
        cu_num_logits=cu.int(),
        logits_indices=torch.arange(int(cu[-1])) * 3 + 1,
        hidden_states=torch.randn(int(cu[-1]) * 3 + 2, max(hidden_size, 8), generator=gen).to(dtype),
        rows=make_rows(num_rows, hidden_size, dtype),
    )
    case = {name: value.to(device) if torch.is_tensor(value) else value for name, value in case.items()}
    case["rows"] = twin.DraftRows(*(None if c is None else c.to(device) for c in case["rows"]))
    return case | dict(padding_request=PADDING)


@pytest.mark.parametrize(
    ("live", "num_rows", "hidden_size", "has_path", "dtype"),
    [
        pytest.param(3, 3, 40, True, torch.float32, id="no-padding"),
        pytest.param(4, 8, 1030, True, torch.bfloat16, id="padded-two-pieces"),
        pytest.param(2, 4, 40, False, torch.float16, id="no-drafts-verified"),
        pytest.param(5, 6, 0, True, torch.float32, id="no-hidden-state"),
        pytest.param(0, 2, 40, False, torch.float32, id="only-padding"),
    ],
)
def test_kernel_matches_twin(device, live, num_rows, hidden_size, has_path, dtype):
    ours, theirs = (make_case(device, live, num_rows, hidden_size, has_path, dtype) for _ in range(2))
    kernel.draft_inputs(**ours)
    twin.draft_inputs(**theirs)
    for name, found, expected in zip(twin.DraftRows._fields, ours["rows"], theirs["rows"], strict=True):
        assert (found is None and expected is None) or torch.equal(found, expected), name


def test_twin_follows_the_definition():
    case = make_case(torch.device("cpu"), 3, 5, 40, True)
    twin.draft_inputs(**case)
    rows, requests = case["rows"], case["idx_mapping"].tolist()
    for b, request in enumerate(requests):
        samples = int(case["num_sampled"][b])
        node = int(case["path"][b, max(samples - 1, 0)])
        hidden_row = int(case["logits_indices"][int(case["cu_num_logits"][b]) + node])
        assert rows.request[b] == request
        assert rows.base[b] == case["num_computed_tokens"][request]
        assert rows.anchor[b] == case["last_sampled"][request, 0]
        assert torch.equal(rows.state[b], case["hidden_states"][hidden_row])
    assert rows.request[3:].tolist() == [PADDING, PADDING]
    for column in rows[1:]:
        assert not column[3:].any()


def test_first_rows_are_views():
    rows = make_rows(4, 8, torch.float32)
    rows.first(2).base[0] = 5
    assert rows.base[0] == 5
    assert rows.first(2).state.shape == (2, 8)
