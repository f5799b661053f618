# SPDX-License-Identifier: Apache-2.0
"""Token counts of the training rows, and the reduced vocabulary that a head can be limited to."""

import logging

import numpy as np
import torch
from datasets import Dataset

logger = logging.getLogger(__name__)

ROWS_PER_BATCH = 1000


def token_counts(rows: Dataset, vocab_size: int) -> torch.Tensor:
    """How often each token is learned from (``loss_mask`` 1) in ``rows``: [V] int64.

    Raises ValueError for a token outside the vocabulary: rows of another model.
    """
    counts = np.zeros(vocab_size, dtype=np.int64)
    for batch in rows.with_format("arrow").iter(batch_size=ROWS_PER_BATCH):
        ids, mask = (batch[key].combine_chunks().flatten().to_numpy() for key in ("input_ids", "loss_mask"))
        if ids.min() < 0 or ids.max() >= vocab_size:
            raise ValueError(
                f"Training rows must hold tokens of the target (0..{vocab_size - 1}), found "
                f"{ids.min() if ids.min() < 0 else ids.max()}; prepare them with this target."
            )
        counts += np.bincount(ids[mask.astype(bool)], minlength=vocab_size)
    return torch.from_numpy(counts)


def frequent_tokens(counts: torch.Tensor, size: int) -> torch.Tensor:
    """The ``size`` most frequent tokens of ``counts`` [V], in ascending order: [size] int64; ties: the lower id.

    Warns when the rows have fewer different ones: the rest are the vocabulary's first, whatever they are.
    """
    if (different := int(counts.count_nonzero())) < size:
        logger.warning(
            "draft_vocab_size %d is more than the %d different tokens of the rows; the other %d are in the draft "
            "vocabulary for their low numbers only. Prepare more rows, or lower it.",
            size,
            different,
            size - different,
        )
    return counts.sort(descending=True, stable=True).indices[:size].sort().values
