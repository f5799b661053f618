# SPDX-License-Identifier: Apache-2.0
"""Acceptance of a head, offline in torch: the same tree expansion and noise as in the engine, no vLLM.

Every position of a text that the target wrote serves as an anchor: the head drafts there, and what is accepted is what
the draft shares with the text. Because the target's text is fixed, the engine's run over it visits exactly the anchors
reached by jumping ``accepted + 1`` ahead, so the free-running acceptance length is exact as well.

Acceptance is kept as survival: per anchor and depth k the probability, given the text, that the draft is accepted to
depth k + 1 at least. It is 0 or 1 for greedy, coupled and uncoupled drafts. Classic rejection sampling accepts the
draft token x ~ q with probability min(1, p(x) / q(x)) and otherwise draws from the residual; the token y that comes out
is distributed as p, and P(draft accepted | y) = min(1, q(y) / p(y)). Along a text drawn from the target the survival of
a chain under rejection sampling is therefore the product of min(1, q / p) over the text's own tokens: exact given the
text, with no random numbers of its own.
"""

import torch
from tqdm import tqdm
from transformers import PreTrainedModel

from vllm_kvspec.eval.statistics import Acceptance, mean_and_error, summarise
from vllm_kvspec.eval.texts import Text, repeated_share
from vllm_kvspec.kernels.reference import gumbel_noise, tree_build
from vllm_kvspec.models.drafting import Head, draft_candidates, draft_logits
from vllm_kvspec.models.target import TargetView, head_logits, view_target
from vllm_kvspec.tree import MAX_NODES, RankingScales, num_candidates, ranking_scale

GREEDY, COUPLED, UNCOUPLED, REJECTION = MODES = ("greedy", "coupled", "uncoupled", "rejection")
# A batch of anchors holds [A, G, V] logits and noise; this many values keep it within some 100 MB. Its rows attend to
# each other under a mask, at a cost that grows with their square.
VALUES_PER_BATCH = 1 << 22
ROWS_PER_BATCH = 1 << 9
# Where the first class of contexts ends, in tokens.
CONTEXT = 256


def modes_at(temperature: float) -> tuple[str, ...]:
    """The ways of drafting that differ at ``temperature``."""
    return (COUPLED, UNCOUPLED, REJECTION) if temperature > 0 else (GREEDY,)


def accepted_depth(
    tokens: torch.Tensor, parent: torch.Tensor, depth: torch.Tensor, truth: torch.Tensor
) -> torch.Tensor:
    """Length [A, N+1] of the longest path among the nodes 0..n that agrees with the text, for every n.

    ``tokens`` [A, N] of nodes 1..N; ``parent`` and ``depth`` [A, N+1] as ``tree_build`` gives; ``truth`` [A, G]: the
    text after the anchor. The first n nodes that ``tree_build`` returns are its tree of n nodes, so one pass measures
    all tree sizes.
    """
    alive = torch.ones_like(parent, dtype=torch.bool)
    padded = torch.nn.functional.pad(truth, (0, max(0, tokens.shape[1] - truth.shape[1])), value=-1)
    agrees = tokens == padded.gather(1, depth[:, 1:].long() - 1)
    for node in range(1, parent.shape[1]):
        alive[:, node] = agrees[:, node - 1] & alive.gather(1, parent[:, node : node + 1].long())[:, 0]
    return (alive * depth).cummax(dim=1).values


def fitting_sizes(num_nodes: list[int], block: int, beam: int, width: int) -> list[int]:
    """Those tree sizes that the expansion of a block can fill."""
    return [n for n in num_nodes if n <= min(MAX_NODES, num_candidates(block, beam, width))]


def anchor_positions(text: Text, block: int) -> torch.Tensor:
    """Positions [P] of a text's anchors: those whose whole block lies inside the text."""
    return torch.arange(text.prompt_length, len(text.input_ids) - block)


def noise_windows(seed: int, temperature: float, base: torch.Tensor, block: int, vocab_size: int) -> torch.Tensor:
    """The noise [A, G, V] that the target's sampler adds at ``base + d``; ``base`` [A] are neighbours."""
    positions = torch.arange(int(base[0]), int(base[-1]) + block, device=base.device)
    seeds, temperatures = torch.tensor([seed], device=base.device), torch.tensor([temperature], device=base.device)
    noise = gumbel_noise(seeds, temperatures, positions[None], torch.zeros_like(positions[:1]), vocab_size)[0]
    return noise[base[:, None] - base[0] + torch.arange(block, device=base.device)]


@torch.no_grad()
def text_acceptance(
    head: Head,
    target: PreTrainedModel,
    text: Text,
    num_nodes: list[int],
    *,
    temperature: float = 0.0,
    coupled: bool = True,
    beam: int = 8,
    width: int = 4,
    view: TargetView | None = None,
) -> dict[str, torch.Tensor]:
    """Accepted tokens at every anchor of one text: ``{"chain": [P], "8": [P], ...}`` int64, on the CPU.

    ``coupled`` draws the candidates with the target's noise when ``temperature`` is above 0. ``view``: of the text, if
    there is one already.
    """
    config, device = head.config, target.device
    block = config.draft_block_size
    ids = torch.tensor([text.input_ids], device=device)
    view = view or view_target(target, config, ids)
    found: dict[str, list[torch.Tensor]] = {"chain": [], **{str(n): [] for n in num_nodes}}
    for base in anchor_batches(text, head, device):
        truth = ids[0, base[:, None] + 1 + torch.arange(block, device=device)]
        temperatures = torch.full((len(base),), temperature, device=device)
        scale = ranking_scale(temperatures, coupled, RankingScales.of(config))
        noise = None
        if temperature > 0 and coupled:
            noise = noise_windows(text.seed, temperature, base, block, config.vocab_size)
        chain = torch.ones(len(base), dtype=torch.bool, device=device)
        inputs = (head, target, view, ids, base, noise, scale)
        chained = draft_candidates(*inputs, beam=1, width=1, chain=chain)
        found["chain"].append(accepted_depth(*tree_build(*chained, block)[:3], truth)[:, -1])
        if num_nodes:
            candidates = draft_candidates(*inputs, beam=beam, width=width, chain=None)
            accepted = accepted_depth(*tree_build(*candidates, max(num_nodes))[:3], truth)
            for n in num_nodes:
                found[str(n)].append(accepted[:, n])
    return {name: torch.cat(parts).cpu() if parts else torch.empty(0).long() for name, parts in found.items()}


@torch.no_grad()
def rejection_survival(head: Head, target: PreTrainedModel, text: Text, *, temperature: float) -> torch.Tensor:
    """Survival [P, G] fp64 of chains under classic rejection sampling, given the text; see the module docstring."""
    config, device = head.config, target.device
    ids = torch.tensor([text.input_ids], device=device)
    view = view_target(target, config, ids)
    log_p = next_token_log_probs(target, view, ids, temperature)
    offsets = torch.arange(config.draft_block_size, device=device)
    parts = []
    for base in anchor_batches(text, head, device):
        positions = base[:, None] + offsets
        logits = draft_logits(head, target, view, ids, base, ids[0, positions])
        log_q = (logits.float() / temperature).log_softmax(dim=-1)
        log_q = log_q.gather(-1, ids[0, positions + 1].unsqueeze(-1)).squeeze(-1)
        parts.append((log_q - log_p[positions]).clamp(max=0).double().cumsum(dim=1).exp())
    return torch.cat(parts).cpu() if parts else torch.empty(0, config.draft_block_size).double()


def next_token_log_probs(
    target: PreTrainedModel, view: TargetView, ids: torch.Tensor, temperature: float
) -> torch.Tensor:
    """The target's log-probability [S - 1] of each next token of ``ids`` [1, S] at ``temperature``."""
    logits = head_logits(target, view.hidden[0, :-1]).float() / temperature
    return logits.log_softmax(dim=-1).gather(1, ids[0, 1:, None])[:, 0]


def anchor_batches(text: Text, head: Head, device: torch.device) -> list[torch.Tensor]:
    """The text's anchors in batches of neighbours, smaller where every path of a tree has rows of its own."""
    block = head.config.draft_block_size
    base = anchor_positions(text, block).to(device)
    rows = ROWS_PER_BATCH // (1 if head.config.drafting == "block" else 4)
    size = min(VALUES_PER_BATCH // (block * head.config.vocab_size), rows // block)
    return list(base.split(max(1, size))) if len(base) else []


def text_survival(
    head: Head, target: PreTrainedModel, text: Text, num_nodes: list[int], *, mode: str, **options
) -> dict[str, torch.Tensor]:
    """Survival [P, G] fp64 at every anchor of one text per kind of tree (only "chain" for mode "rejection").

    ``options``: ``temperature``, ``beam`` and ``width`` of ``text_acceptance``.
    """
    if mode == REJECTION:
        return {"chain": rejection_survival(head, target, text, temperature=options["temperature"])}
    found = text_acceptance(head, target, text, num_nodes, coupled=mode == COUPLED, **options)
    depths = torch.arange(head.config.draft_block_size)
    return {name: (accepted[:, None] > depths).double() for name, accepted in found.items()}


def evaluate(
    head: Head,
    target: PreTrainedModel,
    texts: list[Text],
    num_nodes: list[int],
    *,
    mode: str = GREEDY,
    **options,
) -> tuple[dict[str, Acceptance], dict[str, Acceptance], dict[str, list[dict]]]:
    """Acceptance per kind of tree over all ``texts``, over the less repetitive half of them, and ``by_context``.

    ``options`` are those of ``text_survival``. Small models loop when they decode greedily, and loops are easy to
    draft: the second figure keeps the first honest.
    """
    progress = tqdm(texts, desc=f"drafts, {mode}", unit="text", leave=False, disable=None)
    found = [text_survival(head, target, text, num_nodes, mode=mode, **options) for text in progress]
    order = sorted(range(len(texts)), key=lambda i: repeated_share(texts[i]))
    halves = (range(len(texts)), order[: (len(texts) + 1) // 2])
    whole, half = ({name: summarise([found[i][name] for i in part]) for name in found[0]} for part in halves)
    return whole, half, {"by_context": by_context(texts, [survival["chain"] for survival in found])}


def by_context(texts: list[Text], survival: list[torch.Tensor]) -> list[dict]:
    """The chain by how much text is before the anchor, in classes that end at powers of two, over all anchors.

    ``survival`` [P, G] of each text. Each class: its last ``context`` in tokens, ``anchors``, ``tau`` (the mean of
    accepted + 1) with its standard error ``tau_se`` over the texts, ``first``: the share whose first token is accepted.
    """
    classes = [
        torch.tensor(
            [max(CONTEXT, 1 << (text.prompt_length + i - 1).bit_length()) for i in range(len(found))], dtype=torch.int64
        )
        for text, found in zip(texts, survival, strict=True)
    ]
    rows = []
    for context in torch.cat(classes).unique().tolist():
        inside = [found[of == context] for found, of in zip(survival, classes, strict=True)]
        tau, error = mean_and_error([1 + part.sum(1) for part in inside])
        of_one_text = sum(len(part) > 0 for part in inside) == 1
        first, _ = mean_and_error([part[:, 0] for part in inside])
        rows.append({"context": context, "anchors": sum(map(len, inside)), "tau": tau, "first": first})
        rows[-1]["tau_se"] = float("nan") if of_one_text else error
    return rows
