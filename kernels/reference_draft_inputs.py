# SPDX-License-Identifier: Apache-2.0
"""Torch twin of ``draft_inputs``: what the draft head needs of each request, at fixed addresses."""

from typing import NamedTuple

import torch


class DraftRows(NamedTuple):
    """One row per request of the batch, at addresses that do not change, so that a CUDA graph can read them.

    ``request`` int64, the request-state row; ``base`` int32, the anchor's position; ``anchor`` int64, its token;
    ``temperature`` fp32; ``seed`` int64; ``chain`` int32, 1 where the request must get a chain; all [Rmax].
    ``state`` [Rmax, H]: the target's last hidden state at ``base - 1``, or None for a head that does not read it.
    """

    request: torch.Tensor
    base: torch.Tensor
    anchor: torch.Tensor
    temperature: torch.Tensor
    seed: torch.Tensor
    chain: torch.Tensor
    state: torch.Tensor | None

    def first(self, count: int) -> "DraftRows":
        """Views of the first ``count`` rows."""
        return DraftRows(*(None if column is None else column[:count] for column in self))


def draft_inputs(
    idx_mapping: torch.Tensor,
    num_computed_tokens: torch.Tensor,
    last_sampled: torch.Tensor,
    temperature: torch.Tensor,
    seeds: torch.Tensor,
    chain: torch.Tensor,
    *,
    num_sampled: torch.Tensor,
    path: torch.Tensor | None,
    cu_num_logits: torch.Tensor,
    logits_indices: torch.Tensor,
    hidden_states: torch.Tensor,
    rows: DraftRows,
    padding_request: int,
) -> None:
    """Write every row of ``rows``: the B requests of the batch, then padding.

    A padding row has ``request = padding_request`` and zeros elsewhere: nothing of its context is read. The hidden
    state at ``base - 1`` is that of the last accepted node: row ``logits_indices[cu_num_logits[b] + path[b, s - 1]]``
    with s = num_sampled[b] samples (the first row of the request when s is 0, or without ``path``).

    Args:
        idx_mapping: int64 ``[B]``, B at most the number of ``rows``.
        num_computed_tokens: int32 ``[R]``, past the accepted tokens already.
        last_sampled: int64 ``[R, 1]``.
        temperature: fp32 ``[R]``.
        seeds: int64 ``[R]``.
        chain: int32 ``[R]``.
        num_sampled: int32 ``[B]``.
        path: int32 ``[B, N1]``, accepted nodes by depth, or None when this step verified no drafts.
        cu_num_logits: int32 ``[B+1]``.
        logits_indices: int64 ``[L]``.
        hidden_states: ``[T, H]``.
        rows: written.
        padding_request: request-state row that no request owns.
    """
    live = idx_mapping.shape[0]
    for column in rows:
        if column is not None:
            column[live:] = 0
    rows.request[live:] = padding_request
    rows.request[:live] = idx_mapping
    columns = (num_computed_tokens, last_sampled[:, 0], temperature, seeds, chain)
    for column, source in zip(rows[1:6], columns, strict=True):
        column[:live] = source[idx_mapping]
    if rows.state is None:
        return
    row = cu_num_logits[:live].long()
    if path is not None:
        last = (num_sampled[:live].long() - 1).clamp(min=0)
        row = row + path[:live].gather(1, last[:, None])[:, 0]
    rows.state[:live] = hidden_states[logits_indices[row]]
