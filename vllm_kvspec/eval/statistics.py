# SPDX-License-Identifier: Apache-2.0
"""From survival per anchor to acceptance: conditional rates, free runs, the teacher-forced gap, standard errors.

Every figure is a ratio of sums over the texts, so that the bootstrap over texts is two matrix products: resampled
counts of the texts times numerators and denominators.
"""

from dataclasses import dataclass, replace

import torch

RESAMPLES = 1000


@dataclass
class Acceptance:
    """Acceptance of one kind of tree; lists have one value per depth k = 0 .. G - 1, ``*_se`` are bootstrap errors.

    ``tau``: tokens per verification (accepted + 1) of a free run through the texts, the engine's own figure;
    ``drafts``: how many verifications that is. Everything below is over ALL ``anchors`` instead, so that heads are
    compared on the same ones: ``tau_all`` the same mean; ``conditional`` a_k, share accepted at depth k among those
    accepted up to k - 1; ``survival``: share accepted at all depths up to k; ``retention``: a_{G-1} / a_0.
    ``fresh``: among the anchors that were right up to depth k - 1, how often a new draft at ``base + k`` gets its first
    token right; ``gap`` = fresh - a_k on exactly these anchors: what depth costs, all else equal.
    ``conditional_free_run``: a_k over the free run. NaN where no anchor was right that far.
    """

    tau: float
    tau_se: float
    drafts: float
    anchors: int
    tau_all: float
    tau_all_se: float
    conditional: list[float]
    conditional_se: list[float]
    survival: list[float]
    retention: float
    retention_se: float
    fresh: list[float]
    gap: list[float]
    gap_se: list[float]
    conditional_free_run: list[float]


def free_run_visits(survival: torch.Tensor) -> torch.Tensor:
    """Probability [P] that a run from the first anchor drafts at each; ``survival`` [P, G], see ``acceptance``.

    A draft that is accepted to depth k continues k + 1 positions ahead.
    """
    count, block = survival.shape
    ones, zeros = survival.new_ones(count, 1), survival.new_zeros(count, 1)
    exactly = torch.cat((ones, survival), dim=1) - torch.cat((survival, zeros), dim=1)
    visits = survival.new_zeros(count + block + 1)
    visits[:1] = 1
    for position in range(count):
        visits[position + 1 : position + block + 2] += visits[position] * exactly[position]
    return visits[:count]


def text_sums(survival: torch.Tensor) -> dict[str, torch.Tensor]:
    """Sums over one text's anchors, from ``survival`` [P, G]; the names are those ``_ratios`` divides."""
    count, block = survival.shape
    visits = free_run_visits(survival)
    reached = torch.cat((survival.new_ones(count, 1), survival), dim=1)
    # Depth k can be compared where base + k is an anchor too.
    fresh = survival.new_zeros(3, block)
    for k in range(min(block, count)):
        inside = slice(0, count - k)
        right = reached[inside, k]
        fresh[:, k] = torch.stack((right.sum(), reached[inside, k + 1].sum(), (right * survival[k:, 0]).sum()))
    return {
        "drafts": visits.sum(),
        "run": visits @ reached,
        "anchors": survival.new_tensor(count),
        "all": reached.sum(0),
        "right": fresh[0],
        "right_next": fresh[1],
        "right_fresh": fresh[2],
    }


def _ratios(sums: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """The figures from sums with any leading shape."""
    conditional = _divide(sums["all"][..., 1:], sums["all"][..., :-1])
    fresh = _divide(sums["right_fresh"], sums["right"])
    return {
        "tau": _divide(sums["run"].sum(-1), sums["drafts"]),
        "tau_all": _divide(sums["all"].sum(-1), sums["anchors"]),
        "conditional": conditional,
        "survival": _divide(sums["all"][..., 1:], sums["anchors"].unsqueeze(-1)),
        "retention": _divide(conditional[..., -1], conditional[..., 0]),
        "fresh": fresh,
        "gap": fresh - _divide(sums["right_next"], sums["right"]),
        "conditional_free_run": _divide(sums["run"][..., 1:], sums["run"][..., :-1]),
    }


def _divide(numerator: torch.Tensor, denominator: torch.Tensor) -> torch.Tensor:
    """Numerator over denominator, NaN where nothing was counted."""
    return torch.where(denominator > 0, numerator / denominator.clamp(min=1e-30), torch.nan)


def _spread(values: torch.Tensor) -> torch.Tensor:
    """Standard deviation over the first dimension of what is not NaN."""
    deviation = values - values.nanmean(dim=0)
    return deviation.square().nanmean(dim=0).sqrt()


def summarise(survival: list[torch.Tensor], seed: int = 0) -> Acceptance:
    """Acceptance over texts; ``survival`` holds one [P, G] tensor of probabilities per text.

    Standard errors: the standard deviation of each figure over ``RESAMPLES`` draws of the texts with replacement.
    """
    return _summary([text_sums(text.double()) for text in survival], seed)


def _summary(per_text: list[dict[str, torch.Tensor]], seed: int) -> Acceptance:
    """The figures and their errors, from the sums of each text."""
    stacked = {name: torch.stack([sums[name] for sums in per_text]) for name in per_text[0]}
    found = _ratios({name: sums.sum(0) for name, sums in stacked.items()})
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randint(len(per_text), (RESAMPLES, len(per_text)), generator=generator)
    counts = torch.zeros(draws.shape, dtype=torch.float64).scatter_add_(1, draws, torch.ones_like(draws).double())
    resampled = _ratios({name: torch.tensordot(counts, sums, dims=1) for name, sums in stacked.items()})
    errors = {f"{name}_se": _spread(values) for name, values in resampled.items()}
    figures = {name: value.tolist() for name, value in {**found, **errors}.items()}
    return Acceptance(
        drafts=stacked["drafts"].sum().item(),
        anchors=int(stacked["anchors"].sum()),
        **{name: figures[name] for name in Acceptance.__dataclass_fields__ if name in figures},
    )


def summarise_runs(accepted: list[list[int]], block: int, seed: int = 0) -> Acceptance:
    """Acceptance of drafts that only a run has: ``accepted`` holds the accepted tokens of every draft, by text.

    The anchors are those of the run; lists end at depth ``block``; what needs other anchors is NaN.
    """
    deepest = max([block, *(count for text in accepted for count in text)])
    depths, none = torch.arange(deepest + 1), torch.zeros(deepest, dtype=torch.float64)
    sums = []
    for text in filter(None, accepted):
        reached = (torch.tensor(text)[:, None] >= depths).double().sum(0)
        drafts = {"drafts": reached[0], "anchors": reached[0], "run": reached, "all": reached}
        sums.append(drafts | {"right": none, "right_next": none, "right_fresh": none})
    found = _summary(sums, seed)
    short = {name: value[:block] for name, value in vars(found).items() if isinstance(value, list)}
    # No depth is comparable with the first: the drafts that went deep are others.
    return replace(found, **short, retention=float("nan"), retention_se=float("nan"))


def ratio_and_parts(numerators: torch.Tensor, denominators: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The ratio of the sums of both, fp64 [texts], and what every text adds to its error, [texts].

    The root of the sum of their squares is the standard error with texts as the units; of differences of the parts of
    two ratios over the same texts, that of the ratios' difference.
    """
    ratio = numerators.sum() / denominators.sum()
    return ratio.item(), (numerators - ratio * denominators) / denominators.sum()


def ratio_and_error(numerators: torch.Tensor, denominators: torch.Tensor) -> tuple[float, float]:
    """The ratio of the sums of both, fp64 [texts], and its standard error with texts as the units."""
    ratio, parts = ratio_and_parts(numerators, denominators)
    return ratio, parts.norm().item()


def mean_and_error(values: list[torch.Tensor]) -> tuple[float, float]:
    """Mean over all anchors of ``values`` ([P] per text), and its standard error with texts as the units."""
    sums = torch.stack([text.double().sum() for text in values])
    return ratio_and_error(sums, torch.tensor([len(text) for text in values], dtype=torch.float64))
