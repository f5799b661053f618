# SPDX-License-Identifier: Apache-2.0
"""LoRA and the draft head: it reads the target's embedding and LM head as they are without adapters."""

from torch import nn
from vllm.lora.layers import BaseLayerWithLoRA, LogitsProcessorWithLoRA, VocabParallelEmbeddingWithLoRA

# What an embedding and a product with the LM head go through.
WRAPPERS = (VocabParallelEmbeddingWithLoRA, LogitsProcessorWithLoRA)


class WithoutAdapters:
    """A context in which the target's embedding and LM head are the base model's.

    vLLM's wrappers of both find a row's adapter by its place in the batch that the target has just verified; a draft
    has other rows. The head was trained on the base model too. The layers between, which drafting does not run, are
    left alone. Without LoRA there is nothing to replace.
    """

    def __init__(self, target_model: nn.Module):
        self.wrapped: list[tuple[nn.Module, str, BaseLayerWithLoRA]] = [
            (parent, name, child)
            for parent in target_model.modules()
            if not isinstance(parent, BaseLayerWithLoRA)
            for name, child in parent._modules.items()
            if isinstance(child, WRAPPERS)
        ]

    def __enter__(self) -> None:
        for parent, name, wrapper in self.wrapped:
            setattr(parent, name, wrapper.base_layer)

    def __exit__(self, *exception) -> None:
        for parent, name, wrapper in self.wrapped:
            setattr(parent, name, wrapper)
