# SPDX-License-Identifier: Apache-2.0
"""Each loss against its definition, token by token in float64, and what it is least at."""

import math

import pytest
import torch

from vllm_kvspec.train.losses import parse_loss, row_losses


def by_definition(p: list[float], q: list[float], label: int) -> dict[str, float]:
    accepted = sum(min(a, b) for a, b in zip(p, q, strict=True))
    return {
        "kl_div": sum(a * (math.log(a) - math.log(b)) for a, b in zip(p, q, strict=True)),
        "ce": -math.log(q[label]),
        "tv": sum(abs(a - b) for a, b in zip(p, q, strict=True)) / 2,
        "lk": -math.log(accepted),
    }


@pytest.mark.parametrize("loss_fn", ["kl_div", "ce", "tv", "lk", "ce=0.1,tv=0.9", "kl_div=0.5,lk"])
def test_losses_are_their_definitions(loss_fn):
    torch.manual_seed(0)
    # Wide enough that some probabilities are below 1e-6.
    draft, target = 5 * torch.randn(2, 3, 9, dtype=torch.float64), 5 * torch.randn(2, 3, 9, dtype=torch.float64)
    labels, has_label = torch.randint(9, (2, 3)), torch.rand(2, 3) > 0.3
    losses, defined = row_losses(draft.float(), target.float(), labels, has_label, loss_fn)
    assert losses.dtype == torch.float32
    for i in range(2):
        for j in range(3):
            p, q = target[i, j].softmax(0).tolist(), draft[i, j].softmax(0).tolist()
            terms = by_definition(p, q, labels[i, j].item())
            expected = sum(weight * terms[name] for name, weight in parse_loss(loss_fn).items())
            assert losses[i, j].item() == pytest.approx(expected, rel=1e-4, abs=1e-5)
    assert defined.equal(has_label if "ce" in loss_fn else torch.ones_like(has_label))


@pytest.mark.parametrize("loss_fn", ["kl_div", "tv", "lk"])
def test_distillation_is_least_at_the_target(loss_fn):
    torch.manual_seed(0)
    target = torch.randn(4, 7)
    labels, has_label = torch.zeros(4, dtype=torch.int64), torch.ones(4, dtype=torch.bool)
    least, _ = row_losses(target, target, labels, has_label, loss_fn)
    torch.testing.assert_close(least, torch.zeros(4), atol=1e-5, rtol=0)
    for _ in range(20):
        nearby = target + 0.1 * torch.randn(4, 7)
        assert (row_losses(nearby, target, labels, has_label, loss_fn)[0] > least).all()


@pytest.mark.parametrize("loss_fn", ["kl_div", "ce", "tv", "lk"])
def test_gradients_stay_finite_where_head_and_target_disagree_wholly(loss_fn):
    draft = torch.tensor([[80.0, 0.0, -80.0]], requires_grad=True)
    losses, _ = row_losses(draft, torch.tensor([[-80.0, 0.0, 80.0]]), torch.tensor([2]), torch.tensor([True]), loss_fn)
    losses.sum().backward()
    assert losses.isfinite().all() and draft.grad.isfinite().all()


@pytest.mark.parametrize("loss_fn", ["mse", "kl_div,mse=2", "ce=high", ""])
def test_unknown_losses_are_named(loss_fn):
    with pytest.raises(ValueError, match="loss_fn must name losses of"):
        parse_loss(loss_fn)
