# SPDX-License-Identifier: Apache-2.0
"""Drafters for tests: random tree shapes, with known or random tokens. They work on the host, one request at a time.

``oracle`` knows each request's continuation (``oracle_file``) and puts it on a random branch, often not the first, with
wrong siblings, and now and then a whole wrong level: every kind of accepted path gets walked. ``random`` draws tokens
from the request's own text.
"""

import json
import random
from pathlib import Path

import torch

WRONG_LEVEL = 0.15


class TestDrafter:
    """Proposes (tokens [B][N], parents [B][N]) from host-side state."""

    __test__ = False

    def __init__(self, config, req_states, vocab_size: int):
        self.num_nodes = config.num_speculative_tokens
        self.req_states = req_states
        self.vocab_size = vocab_size
        self.random = random.Random(0)
        self.sequences = json.loads(Path(config.oracle_file).read_text()) if config.drafter == "oracle" else None
        self.fixed_parents = config.parents

    def propose(self, idx_mapping: torch.Tensor, chain: torch.Tensor) -> tuple[list[list[int]], list[list[int]]]:
        tokens, parents = [], []
        for row in idx_mapping.tolist():
            text = self.req_states.all_token_ids.gpu[row, : int(self.req_states.total_len.gpu[row])].tolist()
            shape = list(range(self.num_nodes)) if chain[row] else self.fixed_parents or self._random_shape()
            parents.append(shape)
            tokens.append(self._oracle_tokens(text, shape) if self.sequences else self._random_tokens(text))
        return tokens, parents

    def _random_shape(self) -> list[int]:
        """Mostly bushy and a few levels deep: each node hangs under one of the last few nodes."""
        return [self.random.randint(max(0, node - 4), node - 1) for node in range(1, self.num_nodes + 1)]

    def _random_tokens(self, text: list[int]) -> list[int]:
        return [self.random.choice(text or [0]) for _ in range(self.num_nodes)]

    def _oracle_tokens(self, text: list[int], shape: list[int]) -> list[int]:
        tokens = [self.random.randrange(self.vocab_size) for _ in shape]
        known = next((s for s in self.sequences if len(s) > len(text) and s[: len(text)] == text), None)
        if known is None:
            return tokens
        node = 0
        for token in known[len(text) :]:
            children = [child for child, parent in enumerate(shape, start=1) if parent == node]
            if not children or self.random.random() < WRONG_LEVEL:
                break
            node = self.random.choice(children)
            tokens[node - 1] = token
        return tokens
