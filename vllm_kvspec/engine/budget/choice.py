# SPDX-License-Identifier: Apache-2.0
"""How many tree nodes a step should verify, from the load: pure functions of batch size, context and acceptance.

Nodes are free while the step is bound by reading weights and KV cache, and cost compute once the batch fills the
device. ``choose_nodes`` takes the number with the most expected tokens per second; 0 means a plain decode step without
a pass of the head, so by its own model the choice is never slower than not speculating. Because the nodes of a tree are
ranked, the first n of them are a tree too, and because the head keeps no KV cache, a request can go from 0 nodes back
to any number with nothing to catch up.

Two cost models have the same method ``step_seconds``: ``Roofline`` (computed from shapes) and ``MeasuredCosts`` (timed
steps, see ``step_costs.py``). ``Acceptance`` is the running estimate of what n nodes yield. No vLLM here.
"""

import json
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import exp, sqrt
from pathlib import Path
from typing import Any, Protocol

from vllm_kvspec.rope import layer_heads
from vllm_kvspec.tree import MAX_NODES

# tau by number of nodes, for a head whose checkpoint has no "acceptance_profile". After some steps only its shape
# counts, because the running estimate scales it. Shape: tau - 1 of the bundled head on 24 held-out prompts, the mean of
# temperature 0 and 1 after scaling each to 1 at 16 nodes. Height: a cautious tau of 3 at 16 nodes.
DEFAULT_PROFILE = {1: 1.50, 2: 1.82, 4: 2.21, 8: 2.66, 16: 3.00, 32: 3.34, 63: 3.54}
# The same without a head, from SmolLM2-135M's chats (docs/recycle.md). Shape: the mean of temperature 0 and 1 as above.
# Height: that of temperature 1, the lower of the two.
RECYCLE_PROFILE = {1: 1.11, 2: 1.18, 4: 1.24, 8: 1.33, 16: 1.39, 32: 1.46, 63: 1.54}
# Request steps after which an observation has lost 63% of its weight: steps that bring new ones, and steps without
# nodes, which bring none. The second bounds how often a hopeless workload is tried again.
HORIZON, IDLE_HORIZON = 512.0, 4096.0
# Weight of the profile, in request steps at its largest tree.
PRIOR_STEPS = 4.0
# A number of nodes is judged by the profile's curve as if that had been seen in so many request steps, and by its own.
CURVE_STEPS = 32.0
# How much better than seen a number of nodes may be that nothing was seen of; divided by the root of 1 + its request
# steps / CURVE_STEPS. What looks no worse than that is tried for a few steps.
DOUBT = 0.09
# Plain decoding is left for so many times its speed at least: timed steps are a few percent off, and where trees and
# plain decoding are equal by them, trees have turned out slower (SmolLM2 on two cores, 8 requests: by a tenth).
LEAST_GAIN = 1.05


class Costs(Protocol):
    """A cost model."""

    def step_seconds(self, batch: int, context: float, nodes: int) -> float:
        """Seconds of one engine step of ``batch`` requests with ``context`` cached tokens in all: the verification of
        ``nodes`` + 1 rows per request and, when ``nodes`` > 0, the head's pass for the next step."""
        ...


@dataclass(frozen=True)
class Device:
    """What bounds a pass: bytes per second and (dense, 16-bit) FLOP per second.

    Decisions depend on the ratio alone. The default, 184 FLOP per byte, was measured on an H200 and lies between the
    specifications of an A100 (156) and an H100 (295).
    """

    bandwidth: float = 4.3e12
    flops: float = 790e12


@dataclass(frozen=True)
class Pass:
    """One forward pass: weights read once, work per row, KV read per token of context, work per row and token."""

    weight_bytes: float
    row_flops: float
    context_bytes: float
    row_context_flops: float

    def seconds(self, device: Device, batch: int, context: float, rows: int) -> float:
        """Roofline of linear layers plus roofline of attention, for ``rows`` rows per request, ``context`` in all."""
        linear = max(self.weight_bytes / device.bandwidth, self.row_flops * batch * rows / device.flops)
        attention = max(
            self.context_bytes * context / device.bandwidth, self.row_context_flops * rows * context / device.flops
        )
        return linear + attention


def decoder_pass(config: Any, element_bytes: int = 2, shards: int = 1) -> Pass:
    """The pass of a dense decoder with a gated MLP and an LM head, from a Hugging Face text config (the config of a
    head or an assistant works as well: each of its layers reads the KV of one target layer). ``shards``: tensor
    parallel size."""
    text = getattr(config, "text_config", None) or config
    sizes = [layer_heads(text, layer) for layer in range(text.num_hidden_layers)]
    query = text.num_attention_heads * sum(head_dim for _, head_dim in sizes)
    key_value = sum(2 * kv_heads * head_dim for kv_heads, head_dim in sizes)
    mlps = 3 * text.num_hidden_layers * text.intermediate_size
    # An assistant's: tokens' embeddings and states come in, states go out.
    projections = 3 * getattr(config, "backbone_hidden_size", 0)
    parameters = text.hidden_size * (2 * query + key_value + mlps + projections + _scored_rows(config, text))
    return Pass(
        weight_bytes=parameters * element_bytes / shards,
        row_flops=2 * parameters / shards,
        context_bytes=key_value * element_bytes / shards,
        row_context_flops=4 * query / shards,
    )


def _scored_rows(config: Any, text: Any) -> int:
    """Rows of the LM head that a pass multiplies by."""
    if getattr(config, "use_ordered_embeddings", False):
        clusters = config.num_centroids
        return clusters + config.centroid_intermediate_top_k * (text.vocab_size // clusters)
    return getattr(config, "draft_vocab_size", None) or text.vocab_size


# What drafting costs without a head: next to nothing.
NO_PASS = Pass(0.0, 0.0, 0.0, 0.0)


@dataclass(frozen=True)
class Roofline:
    """Costs from shapes: a bound, without launch gaps, sampling or the choice of candidates."""

    target: Pass
    head: Pass
    block: int
    device: Device = Device()
    beam: int = 0
    """0: one pass scores the ``block`` positions. Else every level is a pass of this many rows."""

    def verify_seconds(self, batch: int, context: float, nodes: int) -> float:
        """The target's forward of ``nodes`` + 1 rows per request; ``nodes`` = 0 is a plain decode step."""
        return self.target.seconds(self.device, batch, context, nodes + 1)

    def draft_seconds(self, batch: int, context: float, nodes: int = MAX_NODES) -> float:
        """The head's passes over the target's KV; a tree of ``nodes`` nodes has at most as many levels."""
        if self.beam:
            return min(self.block, nodes) * self.head.seconds(self.device, batch, context, self.beam)
        return self.head.seconds(self.device, batch, context, self.block)

    def step_seconds(self, batch: int, context: float, nodes: int) -> float:
        draft = self.draft_seconds(batch, context, nodes) if nodes else 0.0
        return self.verify_seconds(batch, context, nodes) + draft


class MeasuredCosts:
    """Timed engine steps. ``steps[nodes]`` is a list of (batch, seconds) at almost no context, batches ascending, and
    ``context[nodes]`` seconds per token of context; both have an entry for 0 nodes, a plain decode step.

    Linear between batches and beyond the last. More nodes never cost less; a larger batch may, where the libraries of a
    CPU multiply four rows faster than two. Keys may be strings, as in JSON. Raises ValueError for a malformed table.
    """

    def __init__(self, steps: Mapping[Any, Sequence[Sequence[float]]], context: Mapping[Any, float]):
        self.nodes = sorted(int(n) for n in steps)
        points = {int(n): sorted((int(batch), float(t)) for batch, t in column) for n, column in steps.items()}
        self._context = {int(n): float(t) for n, t in context.items()}
        if sorted(self._context) != self.nodes or self.nodes[:1] != [0] or self.nodes[-1] > MAX_NODES:
            raise ValueError(
                f"A cost table's steps and context must have the same numbers of nodes, from 0 to at most {MAX_NODES}; "
                f"got {self.nodes} and {sorted(self._context)}."
            )
        if any(not column or column[0][0] != 1 or min(t for _, t in column) <= 0 for column in points.values()):
            raise ValueError(
                f"A cost table's steps must start at batch 1 and take some time; got {points}. Measure them again."
            )
        least: dict[int, float] = {}
        longest = 0.0
        self._points = {}
        for n in self.nodes:
            batches, times = zip(*points[n], strict=True)
            least = {b: max(t, least.get(b, 0.0)) for b, t in zip(batches, times, strict=True)}
            self._points[n] = batches, list(least.values())
            self._context[n] = longest = max(longest, self._context[n])

    def step_seconds(self, batch: int, context: float, nodes: int) -> float:
        return _interpolate(*self._points[nodes], batch) + self._context[nodes] * context


def _interpolate(xs: Sequence[float], ys: Sequence[float], x: float) -> float:
    """Piecewise linear through the points; the last piece goes on beyond the end, but not downwards."""
    if len(xs) == 1:
        return ys[0]
    if x > xs[-1] and ys[-1] < ys[-2]:
        return ys[-1]
    i = min(max(bisect_left(xs, x), 1), len(xs) - 1)
    slope = (ys[i] - ys[i - 1]) / (xs[i] - xs[i - 1])
    return ys[i - 1] + slope * (x - xs[i - 1])


def read_costs(path: str | Path) -> MeasuredCosts:
    """A cost table from a JSON file with the arguments of ``MeasuredCosts``. Raises ValueError."""
    try:
        return MeasuredCosts(**json.loads(Path(path).read_text()))
    except (OSError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(
            'kvspec\'s budget_costs must be a JSON file like {"steps": {"0": [[1, 0.004]], "8": [[1, 0.005]]}, '
            f'"context": {{"0": 0, "8": 0}}}}; {str(path)!r} could not be read as one: {error}'
        ) from error


def accepted_by_nodes(profile: Mapping[Any, float]) -> list[float]:
    """Accepted tokens for 0..63 nodes: linear between the points of ``profile``, nodes -> tau, and flat beyond.

    Keys may be strings, as in JSON. Raises ValueError unless tau is at least 1, does not fall and ends above 1.
    """
    points = sorted((int(nodes), float(tau)) for nodes, tau in profile.items())
    taus = [tau for _, tau in points]
    in_range = points and points[0][0] >= 1 and points[-1][0] <= MAX_NODES
    if not in_range or taus[0] < 1 or taus[-1] <= 1 or taus != sorted(taus):
        raise ValueError(
            f"A head's acceptance_profile must give tau by number of nodes in 1..{MAX_NODES}, at least 1, not falling "
            f"and ending above 1; got {dict(profile)}. Write what `vllm-kvspec eval` measured, or leave it out."
        )
    xs, ys = [0, *(nodes for nodes, _ in points)], [0.0, *(tau - 1 for tau in taus)]
    return [_interpolate(xs, ys, n) if n < xs[-1] else ys[-1] for n in range(MAX_NODES + 1)]


def acceptance_profile(head: Any | None) -> Mapping[Any, float]:
    """tau by number of nodes to begin with: what the head's checkpoint says, or a default; ``head`` None: no head."""
    if head is None:
        return RECYCLE_PROFILE
    return getattr(head, "acceptance_profile", None) or DEFAULT_PROFILE


class Acceptance:
    """Running estimate of the tokens accepted per request step, for every number of nodes.

    The profile's curve, scaled by the ratio of accepted to foreseen tokens over the last ``HORIZON`` request steps,
    with ``PRIOR_STEPS`` steps of trust in the profile; and what was seen with this very number of nodes, because the
    curve's shape is another head's or another text's. Steps without nodes show nothing, so the estimate drifts back to
    the profile, and a workload that was given up is tried again for a few steps.
    """

    def __init__(self, profile: Mapping[Any, float] | None = None):
        self.curve = accepted_by_nodes(profile or DEFAULT_PROFILE)
        self._prior = PRIOR_STEPS * self.curve[-1]
        self._seen = self._foreseen = 0.0
        self._own: dict[int, tuple[float, float]] = {}

    @property
    def scale(self) -> float:
        return (self._prior + self._seen) / (self._prior + self._foreseen)

    def observe(self, nodes: int, accepted: int) -> None:
        """A request's step with ``nodes`` nodes accepted ``accepted`` of them."""
        self._fade(1 / HORIZON)
        self._seen += accepted
        self._foreseen += self.curve[nodes]
        steps, total = self._seen_with(nodes)
        self._own[nodes] = steps + 1, total + accepted

    def forget(self, steps: int) -> None:
        """``steps`` request steps went by without nodes."""
        self._fade(steps / IDLE_HORIZON)

    def _fade(self, amount: float) -> None:
        kept = exp(-amount)
        self._seen *= kept
        self._foreseen *= kept
        self._own = {nodes: (kept * steps, kept * total) for nodes, (steps, total) in self._own.items()}

    def _seen_with(self, nodes: int) -> tuple[float, float]:
        """Request steps with ``nodes`` nodes, and the tokens accepted in them."""
        return self._own.get(nodes, (0.0, 0.0))

    def accepted(self, nodes: int) -> float:
        """Expected accepted tokens of a request step with ``nodes`` nodes."""
        steps, total = self._seen_with(nodes)
        return min(nodes, (CURVE_STEPS * self.scale * self.curve[nodes] + total) / (CURVE_STEPS + steps))

    def doubt(self, nodes: int) -> float:
        """By how much of it the tokens of such a step may be more than expected."""
        return DOUBT / sqrt(1 + self._seen_with(nodes)[0] / CURVE_STEPS)


def tokens_per_second(costs: Costs, accepted: float, batch: int, context: float, nodes: int) -> float:
    """Of each request."""
    return (1 + accepted) / costs.step_seconds(batch, context, nodes)


def choose_nodes(
    costs: Costs,
    acceptance: Acceptance,
    sizes: Sequence[int],
    batch: int,
    context: float,
    max_rows: float = float("inf"),
) -> int:
    """The number of nodes in ``sizes`` that may well have the most tokens per second, the smallest of equals; 0 unless
    that is expected to be more than ``LEAST_GAIN`` times plain decoding's.

    ``batch``: requests in the step; ``context``: their cached tokens in all; ``max_rows``: rows that one step may have.
    """
    least = LEAST_GAIN * tokens_per_second(costs, 0.0, batch, context, 0)
    best, best_rate = 0, 0.0
    for nodes in sorted(sizes):
        if nodes == 0 or batch * (nodes + 1) > max_rows:
            continue
        rate = tokens_per_second(costs, acceptance.accepted(nodes), batch, context, nodes)
        hoped = rate * (1 + acceptance.doubt(nodes))
        if rate > least and hoped > best_rate:
            best, best_rate = nodes, hoped
    return best


class NodeBudget:
    """The choice with its state, for the scheduler: ``nodes`` for a step, ``acceptance.observe`` for its outcome."""

    def __init__(self, costs: Costs, acceptance: Acceptance, sizes: Sequence[int], max_rows: float = float("inf")):
        self.costs = costs
        self.acceptance = acceptance
        self.sizes = sizes
        self.max_rows = max_rows

    def nodes(self, batch: int, context: float) -> int:
        """Nodes per request for a step of ``batch`` requests with ``context`` cached tokens in all."""
        return choose_nodes(self.costs, self.acceptance, self.sizes, batch, context, self.max_rows)

    def describe(self, batch: int, context: float, nodes: int) -> str:
        """One line for the log: the choice and why."""
        accepted = self.acceptance.accepted(nodes)
        plain = tokens_per_second(self.costs, 0.0, batch, context, 0)
        gain = tokens_per_second(self.costs, accepted, batch, context, nodes) / plain
        return (
            f"{nodes} nodes per request at batch {batch} with {context / batch:.0f} tokens of context each: "
            f"{1 + accepted:.2f} tokens per step and {gain:.2f} times plain decoding expected"
        )


def budget_sizes(ceiling: int) -> list[int]:
    """The numbers of nodes to choose from, descending: the ceiling, powers of two below it, and 0.

    Few, because each needs its own CUDA graphs (one query length each).
    """
    return [ceiling, *(size for size in (32, 16, 8, 4, 2) if size < ceiling), 0]
