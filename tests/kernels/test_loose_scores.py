# SPDX-License-Identifier: Apache-2.0
"""loose_scores: kernel against twin on random trees, the twin against the definition in float64, and the gates."""

import math

import pytest
import torch

from vllm_kvspec.kernels import loose_scores as kernel_module
from vllm_kvspec.kernels.loose_scores import loose_scores
from vllm_kvspec.kernels.reference_loose import loose_scores as twin

BOTH = pytest.mark.parametrize("score", [loose_scores, twin], ids=["kernel", "twin"])
LN3 = math.log(3)


def _entropy(logits: torch.Tensor) -> torch.Tensor:
    """By the definition, in float64."""
    prob = logits.double().softmax(-1).sort(-1, descending=True).values[..., :3]
    return -(prob * prob.log()).nan_to_num(0).sum(-1)


def _case(device, vocab: int, dtype=torch.float32, seed: int = 0) -> list[torch.Tensor]:
    """Three requests with 9, 1 and 6 rows; logits from nearly certain to flat, one in five of them -inf."""
    gen = torch.Generator().manual_seed(seed)
    logits = (
        torch.randn(16, vocab, generator=gen) * torch.linspace(0.2, 12, 16)[torch.randperm(16, generator=gen), None]
    )
    logits[torch.rand(16, vocab, generator=gen) < 0.2] = -math.inf
    logits[:, 0] = 0.0
    parent = torch.zeros(5, 9, dtype=torch.int32)
    for t in range(1, 9):
        parent[:, t] = torch.randint(t, (5,), generator=gen)
    sampled, draft = (torch.randint(min(vocab, 6), (16,), generator=gen) for _ in range(2))
    draft[4] = -1
    starts, mapping = torch.tensor([0, 9, 10, 16]).int(), torch.tensor([3, 0, 4])
    return [tensor.to(device) for tensor in (logits.to(dtype), sampled, draft, parent, starts, mapping)]


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(
    ("vocab", "dtype"),
    [(5, torch.float32), (1024, torch.float32), (2500, torch.float32), (2500, torch.bfloat16)],
    ids=["V5", "one-block", "partly-filled", "bf16"],
)
def test_kernel_and_twin_match_the_definition(device, vocab, dtype, seed):
    case = _case(device, vocab, dtype, seed)
    logits, sampled, draft, parent, starts, mapping = (tensor.cpu() for tensor in case)
    found = 0
    for threshold in (0.0, 0.3, 0.7, 1.05):
        expected = torch.full((16,), -math.inf)
        for b, r in enumerate(mapping.tolist()):
            first, end = starts[b], starts[b + 1]
            for t in range(1, end - first):
                row = first + parent[r, t]
                siblings = [first + s for s in range(1, end - first) if parent[r, s] == parent[r, t]]
                is_sampled = any(draft[s] == sampled[row] for s in siblings)
                if draft[first + t] >= 0 and not is_sampled and _entropy(logits[row]) >= threshold:
                    expected[first + t] = logits[row, draft[first + t]]
        found += int(expected.isfinite().sum())
        assert torch.equal(loose_scores(*case, threshold).cpu(), expected)
        assert torch.equal(twin(*case, threshold).cpu(), expected)
    assert found > 3


@BOTH
def test_the_three_most_probable_tokens_count(device, score, monkeypatch):
    """Equal ones in one lane, in others and in other blocks; the fourth adds to the sum alone."""
    monkeypatch.setattr(kernel_module, "BLOCK", 16)
    for places in ((0, 1, 2, 3), (0, 16, 32, 48), (5, 21, 6, 40)):
        for probs in ((0.25,) * 4, (0.5, 0.3, 0.1, 0.1), (0.97, 0.01, 0.01, 0.01)):
            logits = torch.full((2, 50), -math.inf)
            logits[:, list(places)] = torch.tensor(probs).log() + 7.0
            at = _entropy(logits[0]).item()
            drafted, parent = torch.tensor([0, places[3]]), torch.tensor([[0, 0]]).int()
            case = [
                logits,
                torch.tensor([places[0]] * 2),
                drafted,
                parent,
                torch.tensor([0, 2]).int(),
                torch.tensor([0]),
            ]
            case = [tensor.to(device) for tensor in case]
            assert score(*case, at - 1e-5)[1] == logits[0, places[3]]
            assert score(*case, at + 1e-5)[1] == -math.inf
    assert _entropy(torch.zeros(3)).item() == pytest.approx(LN3)


@BOTH
def test_what_the_target_cannot_sample_is_never_gone_to(device, score):
    logits = torch.zeros(2, 40)
    logits[:, 7] = -math.inf
    drafted, parent = torch.tensor([0, 7]), torch.tensor([[0, 0]]).int()
    case = [logits, torch.tensor([1, 1]), drafted, parent, torch.tensor([0, 2]).int(), torch.tensor([0])]
    assert score(*(tensor.to(device) for tensor in case), 0.0).tolist() == [-math.inf] * 2


@BOTH
def test_int32_drafts_and_no_requests(device, score):
    case = _case(device, 40)
    expected = score(*case, 0.0)
    assert torch.equal(score(*case[:2], case[2].int(), *case[3:], 0.0), expected)
    empty = [case[0][:0], case[1][:0], case[2][:0], case[3], case[4][:1], case[5][:0]]
    assert score(*empty, 0.0).shape == (0,)
