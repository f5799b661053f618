# SPDX-License-Identifier: Apache-2.0
"""Gathers the draft head's inputs of a step into buffers at fixed addresses, padding included.

The head's pass is a CUDA graph, but what it starts from lies where the step left it: request-state tensors that vLLM
moves between steps, hidden states of an eager or a captured forward. One launch before the graph brings them together;
a program copies a piece of one request's hidden state, and the first one its scalars.
"""

import torch
import triton
import triton.language as tl

from vllm_kvspec.kernels.reference_draft_inputs import DraftRows

BLOCK_H = 1024


@triton.jit(do_not_specialize=["num_reqs"])
def _draft_inputs_kernel(
    idx_mapping_ptr,
    num_computed_ptr,
    last_sampled_ptr,
    temperature_ptr,
    seeds_ptr,
    chain_ptr,
    num_sampled_ptr,
    path_ptr,
    cu_num_logits_ptr,
    logits_indices_ptr,
    hidden_ptr,
    out_request_ptr,
    out_base_ptr,
    out_anchor_ptr,
    out_temperature_ptr,
    out_seed_ptr,
    out_chain_ptr,
    out_state_ptr,
    stride_last_sampled,
    stride_path,
    stride_hidden,
    stride_state,
    num_reqs,
    padding_request,
    hidden_size,
    HAS_PATH: tl.constexpr,
    HAS_STATE: tl.constexpr,
    BLOCK_H: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    piece = tl.program_id(1)
    live = b < num_reqs
    request = tl.load(idx_mapping_ptr + b, mask=live, other=0).to(tl.int64)
    if piece == 0:
        base = tl.load(num_computed_ptr + request, mask=live, other=0)
        anchor = tl.load(last_sampled_ptr + request * stride_last_sampled, mask=live, other=0)
        tl.store(out_request_ptr + b, tl.where(live, request, padding_request))
        tl.store(out_base_ptr + b, base)
        tl.store(out_anchor_ptr + b, anchor)
        tl.store(out_temperature_ptr + b, tl.load(temperature_ptr + request, mask=live, other=0.0))
        tl.store(out_seed_ptr + b, tl.load(seeds_ptr + request, mask=live, other=0))
        tl.store(out_chain_ptr + b, tl.load(chain_ptr + request, mask=live, other=0))
    if HAS_STATE:
        node = tl.load(cu_num_logits_ptr + b, mask=live, other=0).to(tl.int64)
        if HAS_PATH:
            last = tl.maximum(tl.load(num_sampled_ptr + b, mask=live, other=1) - 1, 0)
            node += tl.load(path_ptr + b * stride_path + last, mask=live, other=0)
        row = tl.load(logits_indices_ptr + node, mask=live, other=0).to(tl.int64)
        column = piece * BLOCK_H + tl.arange(0, BLOCK_H)
        inside = column < hidden_size
        state = tl.load(hidden_ptr + row * stride_hidden + column, mask=inside & live, other=0.0)
        tl.store(out_state_ptr + b * stride_state + column, state, mask=inside)


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
    """Write every row of ``rows``: the requests of the batch, then padding; see `reference_draft_inputs.draft_inputs`.

    idx_mapping int64 ``[B]``, num_computed_tokens int32 ``[R]``, last_sampled int64 ``[R, 1]``, temperature fp32
    ``[R]``, seeds int64 ``[R]``, chain int32 ``[R]``, num_sampled int32 ``[B]``, path int32 ``[B, N1]`` or None,
    cu_num_logits int32 ``[B+1]``, logits_indices int64 ``[L]``, hidden_states ``[T, H]``. Inner dimensions are
    contiguous.
    """
    num_rows = rows.request.shape[0]
    if num_rows == 0:
        return
    has_state = rows.state is not None
    hidden_size = rows.state.shape[1] if has_state else 0
    # Pointers that the variant does not read still have to be some tensor.
    unused = rows.request
    _draft_inputs_kernel[(num_rows, max(1, triton.cdiv(hidden_size, BLOCK_H)))](
        idx_mapping,
        num_computed_tokens,
        last_sampled,
        temperature,
        seeds,
        chain,
        num_sampled,
        unused if path is None else path,
        cu_num_logits,
        logits_indices,
        hidden_states,
        *rows[:6],
        rows.state if has_state else unused,
        last_sampled.stride(0),
        0 if path is None else path.stride(0),
        hidden_states.stride(0),
        rows.state.stride(0) if has_state else 0,
        idx_mapping.shape[0],
        padding_request,
        hidden_size,
        HAS_PATH=path is not None,
        HAS_STATE=has_state,
        BLOCK_H=BLOCK_H,
    )
