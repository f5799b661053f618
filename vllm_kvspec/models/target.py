# SPDX-License-Identifier: Apache-2.0
"""What a head sees of its target: the KV of whole sequences, last hidden states, embedding and LM head, in torch."""

from dataclasses import dataclass

import torch
from transformers import PreTrainedModel

from vllm_kvspec.config import KVSpecDraftConfig


@dataclass
class TargetView:
    """One forward of the target over sequences ``[B, S]``.

    ``context``: per head layer the keys (normed, rotated: as in the KV cache) and values ``[B, Hkv, S, D]`` of its
    target layer. ``hidden`` [B, S, H]: last hidden states after the final norm.
    """

    context: list[tuple[torch.Tensor, torch.Tensor]]
    hidden: torch.Tensor


@torch.no_grad()
def view_target(target: PreTrainedModel, config: KVSpecDraftConfig, input_ids: torch.Tensor) -> TargetView:
    """Run the target (a causal LM of transformers) over ``input_ids`` [B, S], padded on the right if at all."""
    out = target.base_model(input_ids=input_ids, use_cache=True)
    layers = out.past_key_values.layers
    context = [(layers[i].keys, layers[i].values) for i in config.target_kv_layer_ids]
    return TargetView(context, out.last_hidden_state)


def anchor_inputs(
    target: PreTrainedModel, view: TargetView, input_ids: torch.Tensor, base: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Embeddings of the anchors at positions ``base`` [B, A] and the target's hidden states before them, [B, A, H]."""
    rows = torch.arange(base.shape[0], device=base.device)[:, None]
    hidden = view.hidden[rows, (base - 1).clamp(min=0)] * (base > 0).unsqueeze(-1)
    return target.get_input_embeddings()(input_ids[rows, base]), hidden
