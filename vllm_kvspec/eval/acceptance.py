# SPDX-License-Identifier: Apache-2.0
"""Acceptance of a head, offline in torch: the same tree expansion and noise as in the engine, no vLLM.

The target continues held-out prompts once (greedily, or with the Gumbel noise of a seed, which makes the text a
function of the seed). Then every position of that text serves as an anchor: the head drafts a tree there, and the
accepted path is what the tree shares with the text. Because the target's text is fixed, the engine's run over it visits
exactly the anchors reached by jumping ``accepted + 1`` ahead, so the free-running acceptance length is exact as well.
"""

from dataclasses import dataclass

import torch
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from vllm_kvspec.kernels.reference import gumbel_noise, tree_build
from vllm_kvspec.models.draft_head import KVSpecDraftModel
from vllm_kvspec.models.target import anchor_inputs, view_target
from vllm_kvspec.train.data import continue_prompts
from vllm_kvspec.tree import expand_tree, ranking_scale

# A row of a batch of anchors holds [G, V] logits and noise; this many keep a 4k vocabulary within some 100 MB.
ANCHORS_PER_BATCH = 64


@dataclass
class Text:
    """One continued prompt: all tokens, where the continuation starts, and the seed of its noise."""

    input_ids: list[int]
    prompt_length: int
    seed: int


@dataclass
class Acceptance:
    """Acceptance lengths (accepted + 1) of one kind of tree.

    ``tau``: mean over the drafts of a free run. ``tau_all``: mean over all positions. ``drafts``: drafts of the free
    run. ``conditional``: a_k, share accepted at depth k among those accepted up to depth k - 1.
    """

    tau: float
    tau_all: float
    drafts: int
    conditional: list[float]


class NoiseProcessor(LogitsProcessor):
    """Adds temperature * Gumbel noise of (seed, position, token) to the logits: greedy decoding then samples."""

    def __init__(self, seeds: torch.Tensor, temperature: float, padding: torch.Tensor):
        self.seeds, self.padding = seeds, padding
        self.temperature = torch.full(seeds.shape, temperature, dtype=torch.float32)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position = (input_ids.shape[1] - 1 - self.padding)[:, None]
        rows = torch.arange(len(self.seeds))
        return scores + gumbel_noise(self.seeds, self.temperature, position, rows, scores.shape[-1])[:, 0]


def write_texts(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
) -> list[Text]:
    """Continue ``prompts`` with the target; prompt i uses seed i."""
    longest = max(map(len, prompts))
    padding = torch.tensor([longest - len(prompt) for prompt in prompts])
    processor = [NoiseProcessor(torch.arange(len(prompts)), temperature, padding)] if temperature > 0 else None
    rows = continue_prompts(
        target, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=0.0, logits_processor=processor
    )
    return [Text(ids, len(prompt), seed) for seed, (ids, prompt) in enumerate(zip(rows, prompts, strict=True))]


def accepted_depth(
    tokens: torch.Tensor, parent: torch.Tensor, depth: torch.Tensor, truth: torch.Tensor
) -> torch.Tensor:
    """Length [A] of the longest path that agrees with the text.

    ``tokens`` [A, N] of nodes 1..N; ``parent`` and ``depth`` [A, N+1] as ``tree_build`` gives; ``truth`` [A, G]: the
    text after the anchor.
    """
    alive = torch.ones_like(parent, dtype=torch.bool)
    padded = torch.nn.functional.pad(truth, (0, max(0, tokens.shape[1] - truth.shape[1])), value=-1)
    for node in range(1, parent.shape[1]):
        agrees = tokens[:, node - 1] == padded.gather(1, depth[:, node : node + 1].long() - 1)[:, 0]
        alive[:, node] = agrees & alive.gather(1, parent[:, node : node + 1].long())[:, 0]
    return (alive * depth).amax(dim=1)


@torch.no_grad()
def text_acceptance(
    head: KVSpecDraftModel,
    target: PreTrainedModel,
    text: Text,
    num_nodes: list[int],
    *,
    temperature: float = 0.0,
    coupled: bool = True,
    beam: int = 8,
    width: int = 4,
) -> dict[str, torch.Tensor]:
    """Accepted tokens at every anchor of one text: ``{"chain": [P], "8": [P], ...}`` int64.

    ``coupled`` draws the candidates with the target's noise when ``temperature`` is above 0.
    """
    config = head.config
    block = config.draft_block_size
    ids = torch.tensor([text.input_ids])
    view = view_target(target, config, ids)
    bases = torch.arange(text.prompt_length, len(text.input_ids) - block)
    found: dict[str, list[torch.Tensor]] = {"chain": [], **{str(n): [] for n in num_nodes}}
    for base in bases.split(ANCHORS_PER_BATCH):
        anchor_embeds, target_hidden = anchor_inputs(target, view, ids, base[None])
        hidden = head(anchor_embeds, base[None], view.context, target_hidden)[0]
        noise, temperatures = None, torch.full((len(base),), temperature)
        scale = ranking_scale(temperatures, coupled, config.greedy_scale)
        if temperature > 0 and coupled:
            rows = torch.zeros(len(base), dtype=torch.int64)
            positions = base[:, None] + torch.arange(block)
            noise = gumbel_noise(torch.tensor([text.seed]), temperatures[:1], positions, rows, config.vocab_size)
        weights = (head.transition_in.weight, head.transition_out.weight)
        logits, anchor = target.lm_head(hidden), ids[0, base]
        truth = ids[0, base[:, None] + 1 + torch.arange(block)]
        chain = torch.ones(len(base), dtype=torch.bool)
        chained = expand_tree(logits, anchor, *weights, noise, scale, beam=1, width=1, chain=chain)
        found["chain"].append(accepted_depth(*tree_build(*chained, block)[:3], truth))
        candidates = expand_tree(logits, anchor, *weights, noise, scale, beam=beam, width=width)
        for n in num_nodes:
            found[str(n)].append(accepted_depth(*tree_build(*candidates, n)[:3], truth))
    return {name: torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64) for name, parts in found.items()}


def summarise(accepted: list[torch.Tensor], block: int) -> Acceptance:
    """Acceptance over texts; ``accepted`` holds one [P] tensor of accepted tokens per text."""
    free_run: list[int] = []
    for per_anchor in accepted:
        steps, position = per_anchor.tolist(), 0
        while position < len(steps):
            free_run.append(steps[position])
            position += steps[position] + 1
    everywhere = torch.cat(accepted).float()
    run = torch.tensor(free_run)
    reached = [(run >= k).sum().item() for k in range(block + 1)]
    return Acceptance(
        tau=run.float().mean().item() + 1,
        tau_all=everywhere.mean().item() + 1,
        drafts=len(free_run),
        conditional=[reached[k + 1] / max(reached[k], 1) for k in range(block)],
    )


def repeated_share(text: Text, order: int = 8) -> float:
    """Share of a continuation's tokens that end an ``order``-gram seen before in the text: how repetitive it is."""
    ids, seen, repeated = text.input_ids, set(), 0
    for end in range(order, len(ids) + 1):
        gram = tuple(ids[end - order : end])
        repeated += end > text.prompt_length and gram in seen
        seen.add(gram)
    return repeated / max(len(ids) - text.prompt_length, 1)


def evaluate(
    head: KVSpecDraftModel,
    target: PreTrainedModel,
    texts: list[Text],
    num_nodes: list[int],
    **options,
) -> tuple[dict[str, Acceptance], dict[str, Acceptance]]:
    """Acceptance per kind of tree over all ``texts``, and over the less repetitive half of them.

    ``options`` are those of ``text_acceptance``. Small models loop when they decode greedily, and loops are easy to
    draft: the second figure keeps the first honest.
    """
    found = [text_acceptance(head, target, text, num_nodes, **options) for text in texts]
    order = sorted(range(len(texts)), key=lambda i: repeated_share(texts[i]))
    halves = (range(len(texts)), order[: (len(texts) + 1) // 2])
    block = head.config.draft_block_size
    return tuple({name: summarise([found[i][name] for i in part], block) for name in found[0]} for part in halves)
