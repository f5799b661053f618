# SPDX-License-Identifier: Apache-2.0
"""Acceptance without a head, or of what is grafted onto a head's trees, offline in torch: the engine's own run over the
target's texts, one request at a time.

What is drafted depends on everything that was verified before, so there is no acceptance at an anchor as such: every
tree size is a run of its own through all texts in order, from an empty table. The target computes every node of every
tree, as in the engine.
"""

from collections import Counter

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from vllm_kvspec.eval.acceptance import noise_windows
from vllm_kvspec.eval.statistics import Acceptance, summarise_runs
from vllm_kvspec.eval.texts import Text, repeated_share
from vllm_kvspec.kernels import reference_recycle as recycle
from vllm_kvspec.kernels.reference import tree_walk
from vllm_kvspec.kernels.reference_candidates import Candidates
from vllm_kvspec.models.drafting import Head, draft_candidates
from vllm_kvspec.models.target import head_logits, view_target
from vllm_kvspec.rope import layer_types, layer_window
from vllm_kvspec.tree import RankingScales, ranking_scale

# Contexts in the table, as in the engine.
SLOTS = 1 << 18
CHAIN = 8


class Run:
    """One drafter's way through texts: ``accepted`` has the accepted tokens of every draft, by text, and ``sources``
    how many of all came from where. ``head``: what is grafted onto, ``beam`` and ``width`` of its trees."""

    def __init__(
        self,
        target: PreTrainedModel,
        num_nodes: int,
        *,
        chain: bool,
        coupled: bool = True,
        temperature: float = 0.0,
        head: Head | None = None,
        beam: int = 8,
        width: int = 4,
    ):
        config = target.config.get_text_config()
        # Of each kind of layer.
        self.windows = {kind: layer_window(config, i) for i, kind in enumerate(layer_types(config))}
        self.target, self.num_nodes = target, num_nodes
        self.chain, self.coupled, self.temperature = chain, coupled, temperature
        self.head, self.beam, self.width = head, *((1, 1) if chain else (beam, width))
        self.table = recycle.empty_table(SLOTS, target.device)
        self.accepted: list[list[int]] = []
        self.sources: Counter[str] = Counter()

    @torch.no_grad()
    def read(self, text: Text, last_anchor: int | None = None) -> None:
        """Draft through one text, from the first token that the target wrote on.

        A draft that agrees up to the text's end might have gone on, so it ends the run and does not count.
        ``last_anchor``: the last position to draft from.
        """
        ids = torch.tensor([text.input_ids], device=self.target.device)
        # It keeps what windows leave behind: of a tree's rows only some stay.
        cache = DynamicCache()
        view = view_target(self.target, self.head.config, ids) if self.head else None
        base = text.prompt_length
        self._forward(ids[:, :base], torch.arange(base, device=ids.device)[None], None, cache)
        accepted: list[int] = []
        while base < ids.shape[1] - 1 and (last_anchor is None or base <= last_anchor):
            path, sources = self._step(text, ids, base, view, cache)
            if base + len(path) == ids.shape[1]:
                break
            _keep(cache, base, path)
            self.sources.update(sources)
            accepted.append(len(path) - 1)
            base += len(path)
        self.accepted.append(accepted)

    def _step(self, text: Text, ids: torch.Tensor, base: int, view, cache) -> tuple[torch.Tensor, list[str]]:
        """Draft at ``base``, verify, learn: the root and the nodes int64 [n] that agree with the text, and where they
        come from."""
        device = ids.device
        head = self._candidates(text, ids, base, view) if self.head else None
        known = self._known(text, ids, base) | {"head": head}
        tokens, parent, depth, mask = recycle.recycle_tree(
            self.table, **known, chain=torch.tensor([int(self.chain)], device=device), size=self.num_nodes,
            num_nodes=self.num_nodes, head_width=self.width if self.head else 0,
        )  # fmt: skip
        nodes = torch.arange(self.num_nodes + 1, device=device)
        rows = torch.cat((ids[0, base : base + 1], tokens[0]))
        positions = base + depth[0].long()
        visible = torch.ones(len(nodes), base + len(nodes), dtype=torch.bool, device=device)
        visible[:, base:] = (mask[0][:, None] >> nodes) & 1 == 1
        logits = self._forward(rows[None], positions[None], visible, cache)
        # What the target samples on the path is the text; elsewhere it does not matter.
        sampled = torch.nn.functional.pad(ids[0], (0, self.num_nodes + 1), value=-1)[positions + 1]
        first = torch.zeros_like(nodes[:1])
        _, length, path = tree_walk(sampled, rows, parent, torch.tensor([0, len(nodes)], device=device), first)
        path = path[0, : int(length[0])].long()
        sources = recycle.path_sources(self.table, path=rows[path[1:]].tolist(), **known)
        best = logits.log_softmax(-1).topk(recycle.WIDTH, dim=-1)
        request = torch.zeros_like(nodes)
        recycle.recycle_update(
            self.table, best.indices, best.values, input_ids=rows, positions=positions, logits_indices=nodes,
            idx_mapping=request, local_pos=nodes, parent=parent, owner=request[:1], text=ids.int(),
        )  # fmt: skip
        return path, sources

    def _candidates(self, text: Text, ids: torch.Tensor, base: int, view) -> Candidates:
        """The head's."""
        config, at = self.head.config, torch.tensor([base], device=ids.device)
        temperature = torch.tensor([self.temperature], device=ids.device)
        noise = None
        if self.temperature > 0 and self.coupled:
            noise = noise_windows(text.seed, self.temperature, at, config.draft_block_size, config.vocab_size)
        scale = ranking_scale(temperature, self.coupled, RankingScales.of(config))
        sizes = {"beam": self.beam, "width": self.width, "num_nodes": self.num_nodes}
        return Candidates(*draft_candidates(self.head, self.target, view, ids, at, noise, scale, **sizes))

    def _known(self, text: Text, ids: torch.Tensor, base: int) -> dict:
        """Of the request, for the kernels."""

        def column(value: float, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.tensor([value], dtype=dtype, device=ids.device)

        known, request, here = ids.int(), column(0), column(base, torch.int32)
        return dict(
            matches=recycle.own_matches(known, request, here), request=request, base=here, owner=column(0), text=known,
            temperature=column(self.temperature, torch.float32), seed=column(text.seed), coupled=self.coupled,
        )  # fmt: skip

    def _forward(self, ids, positions, visible: torch.Tensor | None, cache: DynamicCache) -> torch.Tensor:
        """Logits [n, V] of ``ids`` [1, n], which go to the end of the cache. ``visible`` [n, m]: None for causal."""
        mask = None if visible is None else self._mask(visible, positions[0])
        out = self.target.base_model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        return head_logits(self.target, out.last_hidden_state[0]).float()

    def _mask(self, visible: torch.Tensor, positions: torch.Tensor) -> torch.Tensor | dict[str, torch.Tensor]:
        """What attention adds to the scores of n rows at ``positions`` [n], which are the last of the m keys; by kind
        of layer where there are several."""
        before = torch.arange(visible.shape[1] - len(positions), device=positions.device)
        distance = positions[:, None] - torch.cat((before, positions))
        blocked = torch.finfo(self.target.dtype).min
        masks = {}
        for kind, window in self.windows.items():
            seen = visible & (distance < window) if window else visible
            masks[kind] = torch.zeros(seen.shape, dtype=self.target.dtype, device=seen.device)
            masks[kind] = masks[kind].masked_fill(~seen, blocked)[None, None]
        return masks if len(masks) > 1 else masks.popitem()[1]


def _keep(cache: DynamicCache, base: int, path: torch.Tensor) -> None:
    """Of what a tree has added to the cache, its accepted path."""
    for layer in cache.layers:
        kept = torch.cat((torch.arange(base, device=path.device), base + path))
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]


def evaluate(
    target: PreTrainedModel,
    texts: list[Text],
    num_nodes: list[int],
    *,
    coupled: bool,
    temperature: float,
    head: Head | None = None,
    **options,
) -> tuple[dict[str, Acceptance], dict[str, Acceptance], dict[str, dict]]:
    """As ``acceptance.evaluate``: over all texts, and over the less repetitive half; and ``sources``: of each, how many
    of its tokens are accepted per draft. Chains are CHAIN tokens long, or the head's block. ``options``: those of
    ``Run``."""
    order = sorted(range(len(texts)), key=lambda i: repeated_share(texts[i]))
    half = order[: (len(texts) + 1) // 2]
    length = head.config.draft_block_size if head else CHAIN
    found: dict[str, Run] = {}
    for name, size in (("chain", length), *((str(n), n) for n in num_nodes)):
        options |= {"chain": name == "chain", "coupled": coupled, "temperature": temperature, "head": head}
        found[name] = Run(target, size, **options)
        for text in tqdm(texts, desc=f"{name}, T={temperature:g}", unit="text", leave=False, disable=None):
            found[name].read(text)
    whole, less = (
        {name: summarise_runs([run.accepted[i] for i in part], length) for name, run in found.items()}
        for part in (range(len(texts)), half)
    )
    named = recycle.SOURCES if head else recycle.SOURCES[1:]
    sources = {name: {of: run.sources[of] / whole[name].drafts for of in named} for name, run in found.items()}
    return whole, less, {"sources": sources}
