# SPDX-License-Identifier: Apache-2.0
"""A new head for a target: the starting point of training, or random weights to try a server with."""

from pathlib import Path

import torch
from transformers import AutoConfig, AutoTokenizer

from vllm_kvspec.models.draft_head import KVSpecDraftModel, head_config_for


def write_untrained_head(
    target_model: str, output_dir: str, *, seed: int = 0, dtype: torch.dtype = torch.bfloat16, **overrides
) -> Path:
    """Write an untrained head for ``target_model`` (directory or name) to ``output_dir`` and return it.

    ``overrides`` are fields of ``KVSpecDraftConfig``. Its output projections and transition bias are zero, so it
    proposes from the block's inputs alone: good for tests of the machinery, never accepted much.
    """
    target_config = AutoConfig.from_pretrained(target_model).get_text_config()
    config = head_config_for(target_config, AutoTokenizer.from_pretrained(target_model), **overrides)
    torch.manual_seed(seed)
    KVSpecDraftModel(config).to(dtype).save_pretrained(output_dir)
    return Path(output_dir)
