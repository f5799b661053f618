# SPDX-License-Identifier: Apache-2.0
"""Forced acceptance (benchmarks only): the accepted depth follows the asked profile, on trees and on the engine."""

import pytest
import torch
from engine_runner import generate, spec_counters
from requests_mix import request

from vllm_kvspec.tree import chain_parents, depths, parents_from_widths

RATES = [0.9, 0.6, 0.5, 0.1]
CONDITIONAL = torch.tensor([0.9, 0.6 / 0.9, 0.5 / 0.6, 0.1 / 0.5])


@pytest.fixture
def synthetic():
    from vllm_kvspec.engine.verify import synthetic

    return synthetic


def accepted_depths(synthetic, parents: list[int], num_reqs: int) -> torch.Tensor:
    """Accepted nodes of each of num_reqs requests with the same tree, one token for all its nodes but the first."""
    from vllm_kvspec.kernels.reference import tree_walk

    parent = torch.tensor([[0, *parents]], dtype=torch.int32).repeat(num_reqs, 1)
    num_rows = parent.shape[1]
    starts = torch.arange(num_reqs + 1) * num_rows
    generator = torch.Generator().manual_seed(0)
    seeds = torch.randint(2**62, (num_reqs,), generator=generator)
    requests = torch.arange(num_reqs).repeat_interleave(num_rows)
    depth = torch.tensor(depths(parents)).repeat(num_reqs)
    uniform = synthetic.uniform_by_position(seeds, 1000 + depth, requests)
    draft = torch.full((num_reqs * num_rows,), 7)
    # The target's own samples would accept everything: only forcing can reject.
    target, forced_draft = synthetic.force_acceptance(
        torch.full_like(draft, 7), draft, (starts[:-1, None] + parent).flatten(), depth, uniform, CONDITIONAL
    )
    tokens, num_sampled, path = tree_walk(target, forced_draft, parent, starts.int(), torch.arange(num_reqs))
    children = [parents.index(node) + 1 if node in parents else None for node in range(num_rows)]
    spine = [0]
    while children[spine[-1]] is not None:
        spine.append(children[spine[-1]])
    for count, nodes in zip(num_sampled.tolist(), path.tolist(), strict=True):
        assert nodes[:count] == spine[:count]
    return num_sampled - 1


@pytest.mark.cpu
@pytest.mark.parametrize(
    "parents", [chain_parents(6), parents_from_widths([3, 2, 1, 1]), [0, 0, 1, 2, 3, 4, 5]], ids=str
)
def test_histogram_matches_the_profile(synthetic, parents):
    num_reqs = 3000
    accepted = accepted_depths(synthetic, parents, num_reqs)
    reachable = 0
    node = 0
    while node in parents:
        node, reachable = parents.index(node) + 1, reachable + 1
    for position, rate in enumerate(RATES, start=1):
        expected = rate if position <= reachable else 0.0
        found = (accepted >= position).float().mean().item()
        # Four standard errors.
        assert abs(found - expected) <= 4 * (expected * (1 - expected) / num_reqs) ** 0.5, f"depth {position}"
    assert accepted.max() <= min(len(RATES), reachable)


@pytest.mark.cpu
def test_draws_depend_on_seed_and_position_only(synthetic):
    seeds = torch.tensor([3, 4])
    first = synthetic.uniform_by_position(seeds, torch.tensor([5, 5, 6]), torch.tensor([0, 1, 0]))
    again = synthetic.uniform_by_position(seeds, torch.tensor([6, 5]), torch.tensor([0, 0]))
    assert first[0] == again[1]
    assert first[2] == again[0]
    assert len(set(first.tolist())) == 3


@pytest.mark.cpu
def test_an_invalid_draft_stays_unaccepted(synthetic):
    draft = torch.tensor([0, -1, 5])
    target, forced = synthetic.force_acceptance(
        torch.tensor([1, 2, 3]), draft, torch.tensor([0, 0, 1]), torch.tensor([0, 1, 2]), torch.zeros(3), torch.ones(2)
    )
    assert (target[0].item(), forced[1].item()) == (1, -1)


@pytest.mark.parametrize("keys", [{"tree": "auto"}, {"tree": [2, 1, 1, 1]}, {"tree": "chain"}], ids=str)
def test_engine_reaches_the_asked_length(make_engine, spec, keys):
    forced = {"rejection_sample_method": "synthetic", "synthetic_acceptance_length": 3.5}
    batch = [request(n, 17 * n, temperature=n % 2, seed=n, max_tokens=60, ignore_eos=True) for n in range(3, 11)]
    with make_engine(spec(8, **keys, **forced)) as llm:
        outputs = generate(llm, [batch])[0]
        counters = spec_counters(llm)
    assert all(len(samples[0]["token_ids"]) == 60 for samples in outputs)
    # The path of first children of an "auto" tree of 8 nodes ends early now and then.
    shortfall = 0.3 if keys["tree"] == "auto" else 0.15
    assert 2.5 - shortfall < counters["accepted_tokens"] / counters["drafts"] < 2.65
