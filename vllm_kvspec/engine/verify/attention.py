# SPDX-License-Identifier: Apache-2.0
"""What the CUDA and CPU attention backends share: the tree state, the call of the op, and what it cannot compute."""

import torch
from vllm.v1.attention.backend import AttentionImpl, AttentionType

from vllm_kvspec.engine import ops
from vllm_kvspec.engine.verify.tree_state import TreeState


class HasTreeState:
    """Base of our metadata builders. A layer with another builder would take tree rows for a chain."""

    # Set by the runner once the KV caches exist.
    tree_state: TreeState


def attend(
    impl: AttentionImpl,
    query: torch.Tensor,
    k_cache: torch.Tensor,
    v_cache: torch.Tensor,
    metadata,
    sliding_window: int,
    output: torch.Tensor,
    q_scale: float | torch.Tensor = 1.0,
    k_scale: float | torch.Tensor = 1.0,
    v_scale: float | torch.Tensor = 1.0,
) -> None:
    """Write the attention of a batch's rows, on trees or not, to ``output`` [num_tokens, num_heads, head_dim].

    ``query`` has that shape too; ``k_cache`` and ``v_cache`` are [num_blocks, block_size, num_kv_heads, head_dim].
    ``metadata`` has vLLM's fields and ``tree_state``. ``sliding_window`` is in tokens, 0 for full attention. ``impl``
    has the layer's soft-cap (0 or None for none) and its sinks [num_heads] or None.
    """
    tokens = metadata.num_actual_tokens
    ops.tree_attention(
        query[:tokens],
        k_cache,
        v_cache,
        metadata.block_table,
        metadata.query_start_loc,
        metadata.seq_lens,
        metadata.tree_state.batch_mask,
        metadata.tree_state.batch_len,
        scale=impl.scale,
        max_query_len=metadata.max_query_len,
        sliding_window=sliding_window,
        q_scale=q_scale,
        k_scale=k_scale,
        v_scale=v_scale,
        soft_cap=float(impl.logits_soft_cap or 0.0),
        sinks=impl.sinks,
        out=output[:tokens].view(tokens, impl.num_heads, impl.head_size),
    )


def refuse_attention_features(alibi_slopes, attn_type) -> None:
    """Raise ValueError for what the tree attention kernel does not compute."""
    found = {
        "ALiBi": alibi_slopes is not None,
        f"{attn_type} attention": attn_type != AttentionType.DECODER,
    }
    for feature, present in found.items():
        if present:
            raise ValueError(
                f"kvspec's tree attention needs plain decoder attention; this model has {feature}. "
                "Serve it without kvspec."
            )
