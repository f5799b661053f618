# SPDX-License-Identifier: Apache-2.0
"""Multi-draft verification as a sampler would run it, over a vocabulary small enough for all that can happen.

A rule gets the drafted paths and returns what may come out, {(tokens, number of them accepted): probability}; the last
token is the target's own. Models are functions from a prefix to the distribution of the next token, float64 [V].
``written`` lets a rule draft and verify until ``length`` tokens stand, over all drafts that there can be.
"""

import functools
import itertools
import math
from collections import defaultdict
from collections.abc import Callable

import torch

from vllm_kvspec.eval import verification

Tokens = tuple[int, ...]
Model = Callable[[Tokens], torch.Tensor]
Outcomes = dict[tuple[Tokens, int], float]


def random_model(seed: int, vocab_size: int, zeros: bool = False) -> Model:
    """A distribution of its own for every prefix; with ``zeros``, the last token never comes."""

    @functools.cache
    def model(prefix: Tokens) -> torch.Tensor:
        generator = torch.Generator().manual_seed(hash((seed, prefix)) % 2**31)
        logits = 1.5 * torch.randn(vocab_size, generator=generator, dtype=torch.float64)
        if zeros:
            logits[-1] = float("-inf")
        return logits.softmax(-1)

    return model


def probability(model: Model, prefix: Tokens, path: Tokens) -> float:
    """Of ``path`` after ``prefix``."""
    return math.prod(float(model(prefix + path[:i])[token]) for i, token in enumerate(path))


def token_rule(p: Model, q: Model, prefix: Tokens, paths: tuple[Tokens, ...]) -> Outcomes:
    """Rejection sampling of one path."""
    return k_seq_rule(p, q, prefix, paths[:1])


def block_rule(p: Model, q: Model, prefix: Tokens, paths: tuple[Tokens, ...]) -> Outcomes:
    """Block verification of one path; arXiv 2403.10444."""
    return verify_block(p, q, prefix, paths[0])


def passes_at(kept: float, residual: float) -> float:
    """Block verification's chance to end a block inside it, from what the prefix keeps and its residual's sum."""
    return residual / (residual + 1 - kept) if residual + 1 - kept > 0 else 1.0


@functools.cache
def verify_block(p: Model, q: Model, prefix: Tokens, path: Tokens) -> Outcomes:
    """The last place that passes ends the block; the places before it need not pass."""
    kept, chances, residuals = 1.0, [], []
    for i, token in enumerate(path):
        here = prefix + path[:i]
        residuals.append((kept * p(here) - q(here)).clamp(min=0))
        chances.append(passes_at(kept, float(residuals[-1].sum())) if i else 1.0)
        kept = min(1.0, kept * float(p(here)[token] / q(here)[token]))
    residuals.append(p(prefix + path))
    chances.append(kept)
    found: Outcomes = defaultdict(float)
    none_later = 1.0
    for i in range(len(path), -1, -1):
        correct(found, path[:i], residuals[i], none_later * chances[i])
        none_later *= 1 - chances[i]
    return found


def correct(found: Outcomes, accepted: Tokens, weights: torch.Tensor, chance: float) -> None:
    """Add that ``accepted`` is followed by a token drawn from ``weights``."""
    total = float(weights.sum())
    for token, weight in enumerate(weights.tolist()):
        if weight > 0 and chance > 0:
            found[accepted + (token,), len(accepted)] += chance * weight / total


def odds_at(p: Model, q: Model, here: Tokens, token: int = 0) -> verification.PathOdds:
    """Of one next token, as the package computes it."""
    return verification.path_odds(p(here).log()[None, None], q(here).log()[None, None], torch.tensor([[token]]))


@functools.cache
def k_seq_step(p: Model, q: Model, here: Tokens, drafts: int) -> tuple[list[float], torch.Tensor]:
    """K-SEQ's chance of each token to pass, and what the correction is drawn from."""
    odds = odds_at(p, q, here)
    factor = verification.k_seq_factor(odds, drafts)
    share = float(verification.accepted_share(odds, factor))
    accepted = torch.minimum(q(here), p(here) / float(factor))
    passes = torch.where(q(here) > 0, accepted / q(here), 0.0)
    return passes.tolist(), (p(here) - accepted * (1 - (1 - share) ** drafts) / share).clamp(min=0)


def k_seq_rule(p: Model, q: Model, prefix: Tokens, paths: tuple[Tokens, ...]) -> Outcomes:
    """Token by token among the paths that agree so far; arXiv 2310.15141."""
    found: Outcomes = defaultdict(float)

    def follow(accepted: Tokens, left: list[Tokens], chance: float) -> None:
        depth = len(accepted)
        if depth == len(paths[0]):
            correct(found, accepted, p(prefix + accepted), chance)
            return
        passes, rest = k_seq_step(p, q, prefix + accepted, len(left))
        for path in left:
            token = path[depth]
            follow(accepted + (token,), [other for other in left if other[depth] == token], chance * passes[token])
            chance *= 1 - passes[token]
            if chance == 0:
                return
        correct(found, accepted, rest, chance)

    follow((), list(paths), 1.0)
    return found


@functools.cache
def places(p: Model, q: Model, prefix: Tokens, path: Tokens) -> Tokens:
    """A path's place in the order of all: at every node the probability of the tokens before its own."""
    return tuple(float(odds_at(p, q, prefix + path[:i], token).below) for i, token in enumerate(path))


@functools.cache
def selected_model(p: Model, q: Model, prefix: Tokens, drafts: int) -> Model:
    """The distribution of the last of ``drafts`` paths after ``prefix``."""

    def mass(path: Tokens) -> float:
        parents = (probability(q, prefix, path[:i]) for i in range(len(path)))
        before = sum(parent * place for parent, place in zip(parents, places(p, q, prefix, path), strict=True))
        return (before + probability(q, prefix, path)) ** drafts - before**drafts

    @functools.cache
    def model(here: Tokens) -> torch.Tensor:
        path = here[len(prefix) :]
        of_tokens = [mass(path + (token,)) for token in range(len(p(prefix)))]
        return torch.tensor(of_tokens, dtype=torch.float64) / mass(path)

    return model


def select(p: Model, q: Model, prefix: Tokens, paths: tuple[Tokens, ...]) -> Tokens:
    """The path that is verified: the last in the order."""
    return max(paths, key=lambda path: places(p, q, prefix, path))


def multipath_block_rule(p: Model, q: Model, prefix: Tokens, paths: tuple[Tokens, ...]) -> Outcomes:
    """The last of the paths, in the order of p / q, verified as a block; arXiv 2602.16961."""
    return verify_block(p, selected_model(p, q, prefix, len(paths)), prefix, select(p, q, prefix, paths))


def outcomes(rule: Callable, p: Model, q: Model, prefix: Tokens, drafts: int, depth: int) -> Outcomes:
    """What one verification gives, over all ``drafts`` independent paths of ``depth`` tokens from q."""
    tokens = range(len(p(prefix)))
    paths = [(path, probability(q, prefix, path)) for path in itertools.product(tokens, repeat=depth)]
    found: Outcomes = defaultdict(float)
    for choice in itertools.product([(path, chance) for path, chance in paths if chance > 0], repeat=drafts):
        drafted = math.prod(chance for _, chance in choice)
        for outcome, chance in rule(p, q, prefix, tuple(path for path, _ in choice)).items():
            found[outcome] += drafted * chance
    return found


def written(rule: Callable, p: Model, q: Model, drafts: int, depth: int, length: int) -> dict[Tokens, float]:
    """Distribution of the first ``length`` tokens that drafting and verifying again and again writes."""
    done: dict[Tokens, float] = defaultdict(float)
    unfinished: dict[Tokens, float] = {(): 1.0}
    while unfinished:
        prefix = min(unfinished, key=len)
        before = unfinished.pop(prefix)
        for (tokens, _), chance in outcomes(rule, p, q, prefix, drafts, depth).items():
            text = prefix + tokens
            if len(text) >= length:
                done[text[:length]] += before * chance
            else:
                unfinished[text] = unfinished.get(text, 0.0) + before * chance
    return done
