# SPDX-License-Identifier: Apache-2.0
"""Trees from a Gemma 4 assistant: a pass for every level, the level's nodes as rows beside each other."""

from collections.abc import Sequence
from functools import partial

from vllm_kvspec.engine import ops
from vllm_kvspec.engine.draft.head_drafter import Drafter, Expand, source_paths, take
from vllm_kvspec.kernels.reference_candidates import Candidates, Level, empty_candidates, root_parents
from vllm_kvspec.kernels.reference_draft_inputs import DraftRows


class AssistantDrafter(Drafter):
    """An assistant (``draft/assistant.py``) on its target."""

    def make_outputs(self):
        return self.head.logits, None

    def weights_changed(self) -> None:
        """Nothing was made of them."""

    def expansion(self, rows: DraftRows, depth: int | None = None) -> Expand:
        return partial(self._level_by_level, rows, **self.options(rows))

    def _level_by_level(self, rows: DraftRows, *, levels: Sequence[Level], **options) -> Candidates:
        candidates = empty_candidates(len(rows.base), levels, rows.base.device)
        parents, offset, state = root_parents(rows.anchor), 0, rows.state[:, None]
        for depth, level in enumerate(levels):
            embeds = self.embed(parents.token)
            hidden, state = self.head(embeds, state, rows.base, self.context, self.block_tables)
            logits, tokens = self.logits(hidden)
            parents = ops.tree_level(
                logits, parents, None, None,
                level=level, depth=depth, candidates=candidates, offset=offset, draft_ids=tokens, **options,
            )  # fmt: skip
            if parents is None:
                break
            state = take(state, source_paths(parents, offset, level.width))
            offset += level.num_parents * level.width
        return candidates
