# SPDX-License-Identifier: Apache-2.0
"""From a step's draft rows to trees: the head's pass, the candidates of every level, the best nodes.

Everything here depends on the number of rows only, never on their content, and reads no tensor on the host: a call can
be recorded as a CUDA graph and replayed on other rows.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.functional import pad

from vllm_kvspec.engine import ops
from vllm_kvspec.engine.config.keys import KVSpecConfig
from vllm_kvspec.engine.draft.head import KVSpecDraftModel
from vllm_kvspec.engine.draft.logits import DraftLogits, language_model
from vllm_kvspec.engine.draft.recycle import RecycleDrafter
from vllm_kvspec.engine.draft.transition import DraftTransition
from vllm_kvspec.engine.target_kv import PagedLayer
from vllm_kvspec.kernels.reference_candidates import Candidates, Level, Parents, empty_candidates, root_parents
from vllm_kvspec.kernels.reference_draft_inputs import DraftRows
from vllm_kvspec.tree import RankingScales, ancestor_masks, depths, fixed_levels, plan_levels

Expand = Callable[..., Candidates]
# Tokens int64 [B, N]; parent, depth int32 and ancestor_mask int64 [B, N1].
Trees = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]


class Drafter:
    """The head on its target. ``context`` and ``block_tables`` are bound when KV caches exist. ``recycler``: what
    grafts onto the head's trees, if anything."""

    def __init__(
        self,
        config: KVSpecConfig,
        head: KVSpecDraftModel,
        target_model: nn.Module,
        recycler: RecycleDrafter | None = None,
    ):
        self.head = head
        self.recycler = recycler
        self.target_model = target_model
        self.logits, self.transition = self.make_outputs()
        self.coupled = config.draft_noise == "coupled"
        self.num_nodes = config.num_speculative_tokens
        self.parents = config.parents
        device = head.norm.weight.device
        # A chain is the tree of one child per node.
        self.beam, self.width = config.beam, 1 if config.tree == "chain" else config.tree_width
        self.max_depth = config.max_depth(head.config)
        self.levels = self.plan(self.num_nodes)
        if self.parents:
            self.levels, self.fixed_nodes = fixed_levels(self.parents, device)
            shape = ([0, *self.parents], depths(self.parents))
            self.fixed_parent, self.fixed_depth = (torch.tensor(x, dtype=torch.int32, device=device) for x in shape)
            self.fixed_mask = torch.tensor(ancestor_masks(self.parents), dtype=torch.int64, device=device)
            self._survive_sleep()
        self.context: list[PagedLayer] = []
        self.block_tables: list[torch.Tensor] = []

    def make_outputs(self) -> tuple[Callable[[torch.Tensor], torch.Tensor], DraftTransition | None]:
        """What makes logits of the head's hidden states, and what tokens before them add."""
        return DraftLogits(self.target_model, self.head), DraftTransition(self.target_model, self.head)

    def _survive_sleep(self) -> None:
        """Make the fixed shape's tensors buffers of the head: sleep at level 2 discards everything that loading has
        allocated, and restores only buffers."""
        tensors = [self.fixed_nodes, self.fixed_parent, self.fixed_depth, self.fixed_mask]
        tensors += [level.slots for level in self.levels]
        for i, tensor in enumerate(tensors):
            self.head.register_buffer(f"fixed_tree_{i}", tensor, persistent=False)

    def weights_changed(self) -> None:
        """The target or the head has got other weights in place: what was made of them is made again."""
        self.logits.refresh()
        self.transition.refresh()

    def bind(self, context: list[PagedLayer], block_tables: list[torch.Tensor]) -> None:
        """``context``: one target layer per head layer. ``block_tables``: int32 [Rmax, M] per KV cache group."""
        self.context, self.block_tables = context, block_tables

    def plan(self, num_nodes: int) -> list[Level]:
        """Levels of a tree of ``num_nodes`` nodes; none of them can be deeper than the tree has nodes."""
        return plan_levels(min(self.max_depth, num_nodes), self.beam, self.width, num_nodes)

    def trees(self, rows: DraftRows, with_chains: bool, num_nodes: int | None = None) -> Trees:
        """Trees of B = ``len(rows.base)`` requests. ``with_chains``: some of them must get a chain.

        Only a tree of fixed shape asks for ``with_chains``: then chains are drafted as well. The other trees take them
        from ``rows.chain``. ``num_nodes``: how many the next step will verify at most, if it is known to be fewer than
        all; the nodes beyond them are unused.
        """
        if self.parents is None:
            levels = self.plan(num_nodes or self.num_nodes)
            candidates = self.expansion(rows, len(levels))(levels=levels, chain=rows.chain)
            if self.recycler is not None:
                return self.recycler.trees(rows, with_chains, num_nodes, candidates, self.width)
            return self._build(candidates)
        expand = self.expansion(rows)
        batch = len(rows.base)
        tokens = expand(levels=self.levels).token[:, self.fixed_nodes]
        fixed = (tokens, *(t.expand(batch, -1) for t in (self.fixed_parent, self.fixed_depth, self.fixed_mask)))
        if not with_chains:
            return fixed
        chain_levels = plan_levels(min(self.head.config.draft_block_size, self.num_nodes), 1, 1)
        chains = self._build(expand(levels=chain_levels))
        is_chain = rows.chain[:, None] != 0
        return tuple(torch.where(is_chain, chain, other) for chain, other in zip(chains, fixed, strict=True))

    def _build(self, candidates: Candidates) -> Trees:
        """Trees of ``self.num_nodes`` nodes. Where there are fewer candidates, -inf continues as a chain."""
        score, token, parent = candidates
        if missing := max(0, self.num_nodes - score.shape[1]):
            score = pad(score, (0, missing), value=float("-inf"))
            token, parent = pad(token, (0, missing)), pad(parent, (0, missing))
        return ops.tree_build(score, token, parent, self.num_nodes)

    def expansion(self, rows: DraftRows, depth: int | None = None) -> Expand:
        """Candidates of the rows' trees as a function of levels, ``depth`` of them at most, and chains."""
        options = self.options(rows) | {"draft_ids": self.head.draft_ids}
        if self.head.config.drafting == "autoregressive":
            return partial(self._path_candidates, rows, **options)
        inputs = self.head.block_rows(self.embed(rows.anchor), rows.state)
        hidden = self.head(inputs, rows.base, self.context, self.block_tables)[:, :depth]
        logits = self.logits(hidden.flatten(0, 1)).view(*hidden.shape[:2], -1)
        gate = self.transition.gate(hidden)
        return partial(ops.tree_candidates, logits, rows.anchor, *self.transition.factors, gate=gate, **options)

    def options(self, rows: DraftRows) -> dict[str, Any]:
        """What candidates need to know of the rows' requests and of the head."""
        return dict(
            base=rows.base,
            idx_mapping=torch.arange(len(rows.base), device=rows.base.device),
            temperature=rows.temperature,
            seeds=rows.seed,
            coupled=self.coupled,
            scales=RankingScales.of(self.head.config),
        )

    def _path_candidates(self, rows: DraftRows, *, levels: Sequence[Level], **options) -> Candidates:
        """Level by level: each node's path from the anchor is a block of its own, over its request's context.

        The rows before a path's last are computed again in every level. That is exact, because they do not see later
        rows, and needs no cache; their inputs are kept.
        """
        candidates = empty_candidates(len(rows.base), levels, rows.base.device)
        parents, offset = root_parents(rows.anchor), 0
        state = None if rows.state is None else rows.state[:, None]
        inputs = None
        for depth, level in enumerate(levels):
            row = self.head.path_row(self.embed(parents.token), state).unsqueeze(2)
            inputs = row if inputs is None else torch.cat((inputs, row), dim=2)
            state = self._last_outputs(inputs, rows.base)
            logits = self.logits(state.flatten(0, 1)).view(*state.shape[:2], -1)
            parents = ops.tree_level(
                logits, parents, *self.transition.factors,
                level=level, depth=depth, gate=self.transition.gate(state), candidates=candidates, offset=offset,
                **options,
            )  # fmt: skip
            if parents is None:
                break
            source = source_paths(parents, offset, level.width)
            inputs, state = take(inputs, source), take(state, source)
            offset += level.num_parents * level.width
        return candidates

    def embed(self, tokens: torch.Tensor) -> torch.Tensor:
        """``tokens`` int64 [...] -> the target's embeddings [..., H]."""
        # Where images come in, the whole model's would also prepare the next forward of the target.
        return language_model(self.target_model).embed_input_ids(tokens.flatten()).view(*tokens.shape, -1)

    def _last_outputs(self, inputs: torch.Tensor, base: torch.Tensor) -> torch.Tensor:
        """The head's output at the last row of every path: ``inputs`` [B, P, R, H] -> [B, P, H]."""
        batch, paths = inputs.shape[:2]
        tables = [_repeat(table[:batch], paths) for table in self.block_tables]
        hidden = self.head(inputs.flatten(0, 1), _repeat(base, paths), self.context, tables)
        return hidden[:, -1].view(batch, paths, -1)


def _repeat(tensor: torch.Tensor, times: int) -> torch.Tensor:
    """Every row ``times`` times in a row, [B, ...] -> [B * times, ...]."""
    # Contiguous: of a single row it would be a view with stride 0, and kernels step from row to row.
    return tensor.unsqueeze(1).expand(-1, times, *tensor.shape[1:]).flatten(0, 1).contiguous()


def source_paths(parents: Parents, offset: int, width: int) -> torch.Tensor:
    """Which path of the level before each parent continues, int64 [B, P]; its candidates begin at ``offset``."""
    return (parents.index.long() - offset) // width


def take(tensor: torch.Tensor, paths: torch.Tensor) -> torch.Tensor:
    """Per request the given paths: ``tensor`` [B, P, ...], ``paths`` int64 [B, Q] -> [B, Q, ...]."""
    index = paths.view(*paths.shape, *[1] * (tensor.dim() - 2))
    return tensor.gather(1, index.expand(-1, -1, *tensor.shape[2:]))
