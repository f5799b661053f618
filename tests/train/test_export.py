# SPDX-License-Identifier: Apache-2.0
"""From the shipped recipe to an EAGLE-3 checkpoint, and what is refused. That vLLM drafts the same with it:
``tests/engine/test_export.py``."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from vllm_kvspec.cli import main
from vllm_kvspec.export import export
from vllm_kvspec.models.create import write_untrained_head
from vllm_kvspec.models.draft_head import KVSpecDraftModel

RECIPE = Path(__file__).parents[2] / "examples" / "eagle3.yaml"


def test_train_by_the_recipe_and_export(toy_flags, tmp_path):
    words = toy_flags.split()
    # The recipe's.
    for key in ("--num_layers", "--transition_rank", "--max_steps"):
        at = words.index(key)
        del words[at : at + 2]
    head, out = tmp_path / "head", tmp_path / "eagle3"
    words += ["--max_steps", "2", "--aux_hidden_state_layer_ids", "1", "0", "1", "--draft_vocab_size", "9"]
    main(["train", str(RECIPE), "--output_dir", str(head), *words])
    assert "vllm-kvspec export --format eagle3" in (head / "README.md").read_text()
    main(["export", "--format", "eagle3", "--draft_model", str(head), "--output_dir", str(out)])
    config, tensors = json.loads((out / "config.json").read_text()), load_file(out / "model.safetensors")
    assert config["speculators_model_type"] == "eagle3" and config["norm_before_residual"] is False
    # Counted from 1, each once, in order: columns of layer 1, 0, 1 become those of 0 and of 1.
    assert config["eagle_aux_hidden_state_layer_ids"] == [1, 2]
    assert config["transformer_layer_config"]["num_aux_hidden_states"] == 2
    ours = KVSpecDraftModel.from_pretrained(head, dtype="auto")
    first, second, third = ours.fuse_proj.weight.chunk(3, dim=1)
    assert torch.equal(tensors["fc.weight"], torch.cat((second, first + third), dim=1))
    assert tensors["lm_head.weight"].shape == (9, 32) and "block_embedding" not in tensors
    with pytest.raises(ValueError, match="output_dir must be new or empty"):
        export(str(head), str(out))


def test_other_heads_are_refused(target_dir, tmp_path):
    head = write_untrained_head(str(target_dir), str(tmp_path / "head"), context="hidden", num_hidden_layers=1)
    with pytest.raises(ValueError, match="context 'hidden' and fusion 'direct'.*examples/eagle3.yaml"):
        export(str(head), str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()


def test_a_head_of_another_target_is_refused(target_dir, tmp_path):
    fields = dict(context="hidden", fusion="eagle3", drafting="autoregressive", num_hidden_layers=1, transition_rank=0)
    head = write_untrained_head(str(target_dir), str(tmp_path / "head"), **fields)
    config = json.loads((head / "config.json").read_text())
    config["target"]["vocab_size"] = 99
    (head / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="trained for a target with vocab_size 99"):
        export(str(head), str(tmp_path / "out"))
