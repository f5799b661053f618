# SPDX-License-Identifier: Apache-2.0
"""Heads of other kinds that accept something untrained: the bundled one with parts taken away or replaced."""

from pathlib import Path

import torch
from engine_runner import HEAD
from safetensors.torch import load_file

from vllm_kvspec.config import KVSpecDraftConfig
from vllm_kvspec.models.draft_head import KVSpecDraftModel


def write_head(directory: Path, **fields) -> str:
    """The bundled head's weights in a head with other ``fields``."""
    config = KVSpecDraftConfig.from_pretrained(HEAD)
    head = KVSpecDraftModel(KVSpecDraftConfig.from_dict(config.to_dict() | fields))
    tensors = load_file(Path(HEAD) / "model.safetensors")
    if head.draft_token_ids is not None:
        ids = torch.arange(0, config.vocab_size, 2)[: head.config.draft_vocab_size]
        head.set_draft_vocabulary(ids)
        if "transition_out.weight" in head.state_dict():
            tensors["transition_out.weight"] = tensors["transition_out.weight"][ids]
    head.load_state_dict(tensors, strict=False)
    if head.config.has_tied_transition:
        torch.manual_seed(0)
        torch.nn.init.normal_(head.transition_hidden.weight, std=0.1)
    head.save_pretrained(directory)
    return str(directory)
