# SPDX-License-Identifier: Apache-2.0
"""Acceptance without a head, offline in torch: the engine's own run over the target's texts, one request at a time.

What is drafted depends on everything that was verified before, so there is no acceptance at an anchor as such: every
tree size is a run of its own through all texts in order, from an empty table. The target computes every node of every
tree, as in the engine.
"""

import torch
from tqdm import tqdm
from transformers import DynamicCache, PreTrainedModel

from vllm_kvspec.eval.statistics import Acceptance, summarise_runs
from vllm_kvspec.eval.texts import Text, repeated_share
from vllm_kvspec.kernels import reference_recycle as recycle
from vllm_kvspec.kernels.reference import tree_walk
from vllm_kvspec.models.target import head_logits

# Contexts in the table, as in the engine.
SLOTS = 1 << 18
CHAIN = 8


class Run:
    """One drafter's way through texts: ``accepted`` has the accepted tokens of every draft, by text."""

    def __init__(
        self, target: PreTrainedModel, num_nodes: int, *, chain: bool, coupled: bool = True, temperature: float = 0.0
    ):
        window = getattr(target.config.get_text_config(), "sliding_window", None)
        self.target, self.window, self.num_nodes = target, window, num_nodes
        self.chain, self.coupled, self.temperature = chain, coupled, temperature
        self.table = recycle.empty_table(SLOTS, target.device)
        self.accepted: list[list[int]] = []

    @torch.no_grad()
    def read(self, text: Text, last_anchor: int | None = None) -> None:
        """Draft through one text, from the first token that the target wrote on.

        A draft that agrees up to the text's end might have gone on, so it ends the run and does not count.
        ``last_anchor``: the last position to draft from. Raises ValueError when the text is longer than a window.
        """
        if self.window and len(text.input_ids) + self.num_nodes > self.window:
            raise ValueError(
                f"Without a head, texts must fit the target's sliding window of {self.window} tokens; found one of "
                f"{len(text.input_ids)}. Ask for fewer tokens."
            )
        ids = torch.tensor([text.input_ids], device=self.target.device)
        cache = DynamicCache(config=self.target.config)
        base = text.prompt_length
        self._forward(ids[:, :base], torch.arange(base, device=ids.device)[None], None, cache)
        accepted: list[int] = []
        while base < ids.shape[1] - 1 and (last_anchor is None or base <= last_anchor):
            path = self._step(text, ids, base, cache)
            if base + len(path) == ids.shape[1]:
                break
            _keep(cache, base, path)
            accepted.append(len(path) - 1)
            base += len(path)
        self.accepted.append(accepted)

    def _step(self, text: Text, ids: torch.Tensor, base: int, cache: DynamicCache) -> torch.Tensor:
        """Draft at ``base``, verify, learn: the root and the nodes int64 [n] that agree with the text."""
        device = ids.device
        tokens, parent, depth, mask = self._tree(text, ids, base)
        nodes = torch.arange(self.num_nodes + 1, device=device)
        rows = torch.cat((ids[0, base : base + 1], tokens[0]))
        positions = base + depth[0].long()
        visible = torch.ones(len(nodes), base + len(nodes), dtype=torch.bool, device=device)
        visible[:, base:] = (mask[0][:, None] >> nodes) & 1 == 1
        logits = self._forward(rows[None], positions[None], visible, cache)
        best = logits.log_softmax(-1).topk(recycle.WIDTH, dim=-1)
        request = torch.zeros_like(nodes)
        recycle.recycle_update(
            self.table, best.indices, best.values, input_ids=rows, positions=positions, logits_indices=nodes,
            idx_mapping=request, local_pos=nodes, parent=parent, owner=request[:1], text=ids.int(),
        )  # fmt: skip
        # What the target samples on the path is the text; elsewhere it does not matter.
        sampled = torch.nn.functional.pad(ids[0], (0, self.num_nodes + 1), value=-1)[positions + 1]
        _, length, path = tree_walk(sampled, rows, parent, torch.tensor([0, len(nodes)], device=device), request[:1])
        return path[0, : int(length[0])].long()

    def _tree(self, text: Text, ids: torch.Tensor, base: int) -> tuple[torch.Tensor, ...]:
        def column(value: float, dtype: torch.dtype = torch.int64) -> torch.Tensor:
            return torch.tensor([value], dtype=dtype, device=ids.device)

        known, request, here = ids.int(), column(0), column(base, torch.int32)
        return recycle.recycle_tree(
            self.table, recycle.own_matches(known, request, here), request=request, base=here,
            temperature=column(self.temperature, torch.float32), seed=column(text.seed), chain=column(self.chain),
            owner=column(0), text=known, size=self.num_nodes, num_nodes=self.num_nodes, coupled=self.coupled,
        )  # fmt: skip

    def _forward(self, ids, positions, visible: torch.Tensor | None, cache: DynamicCache) -> torch.Tensor:
        """Logits [n, V] of ``ids`` [1, n], which go to the end of the cache. ``visible`` [n, m]: None for causal."""
        mask = None
        if visible is not None:
            mask = torch.zeros(visible.shape, dtype=self.target.dtype, device=ids.device)
            mask = mask.masked_fill(~visible, torch.finfo(mask.dtype).min)[None, None]
        out = self.target.base_model(
            input_ids=ids, position_ids=positions, attention_mask=mask, past_key_values=cache, use_cache=True
        )
        return head_logits(self.target, out.last_hidden_state[0]).float()


def _keep(cache: DynamicCache, base: int, path: torch.Tensor) -> None:
    """Of what a tree has added to the cache, its accepted path."""
    for layer in cache.layers:
        kept = torch.cat((torch.arange(base, device=path.device), base + path))
        layer.keys, layer.values = layer.keys[:, :, kept], layer.values[:, :, kept]


def evaluate(
    target: PreTrainedModel, texts: list[Text], num_nodes: list[int], *, coupled: bool, temperature: float
) -> tuple[dict[str, Acceptance], dict[str, Acceptance]]:
    """As ``acceptance.evaluate``: over all texts, and over the less repetitive half. The chain is CHAIN tokens long."""
    order = sorted(range(len(texts)), key=lambda i: repeated_share(texts[i]))
    half = order[: (len(texts) + 1) // 2]
    found: dict[str, list[list[int]]] = {}
    for name, size in (("chain", CHAIN), *((str(n), n) for n in num_nodes)):
        run = Run(target, size, chain=name == "chain", coupled=coupled, temperature=temperature)
        for text in tqdm(texts, desc=f"{name}, T={temperature:g}", unit="text", leave=False, disable=None):
            run.read(text)
        found[name] = run.accepted
    return tuple(
        {name: summarise_runs([runs[i] for i in part], CHAIN) for name, runs in found.items()}
        for part in (range(len(texts)), half)
    )
