# SPDX-License-Identifier: Apache-2.0
"""Random batches: permuted request slots, prompts in chunks, drafts on some requests, and rows nobody owns."""

from dataclasses import dataclass

import torch

MAX_REQS = 7
MAX_LEN = 96
MAX_DRAFTS = 4
VOCAB = 1300


@dataclass
class Batch:
    gen: torch.Generator
    mapping: torch.Tensor
    query_start: torch.Tensor
    cu_logits: torch.Tensor
    # Per slot.
    computed: torch.Tensor
    prompt: torch.Tensor
    prefill: torch.Tensor
    all_tokens: torch.Tensor

    def ints(self, low, high, *shape, dtype=torch.int32) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=self.gen, dtype=dtype)

    def logits(self, rows: int, vocab: int = VOCAB, *, stride: int | None = None, dtype=torch.float32) -> torch.Tensor:
        """Some rows with -inf in most places, one with nothing else; rows ``stride`` apart."""
        values = torch.randn(rows, stride or vocab, generator=self.gen).to(dtype)
        hidden = torch.rand(rows, stride or vocab, generator=self.gen) < 0.9
        values[::3] = values[::3].masked_fill(hidden[::3], float("-inf"))
        return values[:, :vocab]

    @property
    def num_rows(self) -> int:
        return int(self.cu_logits[-1])

    @property
    def rows(self) -> torch.Tensor:
        """Slot of each logits row."""
        return self.mapping.repeat_interleave(self.cu_logits.diff())

    @property
    def local_pos(self) -> torch.Tensor:
        first = self.cu_logits[:-1].repeat_interleave(self.cu_logits.diff())
        return torch.arange(self.num_rows, dtype=torch.int32) - first


def make_batch(seed: int, num_reqs: int = 5, *, drafts: bool = True, dtype=torch.int64) -> Batch:
    gen = torch.Generator().manual_seed(seed)

    def ints(low, high, *shape):
        return torch.randint(low, high, shape, generator=gen, dtype=torch.int32)

    mapping = torch.randperm(MAX_REQS, generator=gen)[:num_reqs].to(dtype)
    num_logits = 1 + ints(0, MAX_DRAFTS + 1, num_reqs) * int(drafts)
    lengths = num_logits + ints(0, 6, num_reqs)
    prompt = ints(1, 40, MAX_REQS)
    return Batch(
        gen,
        mapping,
        torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0).int()]),
        torch.cat([torch.zeros(1, dtype=torch.int32), num_logits.cumsum(0).int()]),
        ints(0, 50, MAX_REQS),
        prompt,
        # Preempted requests resume with some of their output.
        prompt + ints(0, 4, MAX_REQS),
        ints(0, VOCAB, MAX_REQS, MAX_LEN),
    )
