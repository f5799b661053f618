# SPDX-License-Identifier: Apache-2.0
"""Heads of a target that repeats itself are accepted everywhere; one position off in training, and they are not."""

import pytest
import torch
from copy_language import BLOCK, PERIOD, SHAPE, STEPS, acceptance, copied, make_it_copy, train_head
from transformers import Qwen3Config, Qwen3ForCausalLM
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from vllm_kvspec.train import trainer
from vllm_kvspec.train.data import collate
from vllm_kvspec.train.trainer import supervised_rows

THETA = 100.0


@pytest.fixture(scope="module")
def target():
    config = Qwen3Config(rope_parameters={"rope_type": "default", "rope_theta": THETA}, **SHAPE)
    return make_it_copy(Qwen3ForCausalLM(config), layer=0, theta=THETA)


def test_the_target_repeats(target):
    prompt = [3, 1, 4, 1, 5, 9, 2]
    out = target.generate(torch.tensor([prompt]), max_new_tokens=30, do_sample=False, pad_token_id=0)
    assert out[0].tolist() == copied(prompt, PERIOD + 30)


@pytest.mark.parametrize(
    ("steps", "fields"),
    [
        (STEPS, {"context": "kv", "target_kv_layer_ids": [0]}),
        (STEPS, {"context": "hybrid", "target_kv_layer_ids": [0], "drafting": "autoregressive"}),
        (2 * STEPS, {"context": "hidden", "aux_hidden_state_layer_ids": [0], "drafting": "autoregressive"}),
    ],
    ids=["kv block", "hybrid ttt", "hidden ttt"],
)
def test_heads_of_a_copying_target_are_accepted_at_every_depth(target, tmp_path, steps, fields):
    found = acceptance(train_head(target, tmp_path, steps, **fields), target)
    assert found.survival == [1.0] * BLOCK
    assert found.tau == BLOCK + 1


def shift_anchors(monkeypatch):
    """The rows of the anchor after the one that the head drafts from."""
    monkeypatch.setattr(trainer, "supervised_rows", lambda base, *rest: supervised_rows(base + 1, *rest))


def shift_positions(monkeypatch):
    """The head's rows are rotated as if they stood one position further on; the target's are not."""
    right = Qwen3RotaryEmbedding.forward

    def shifted(self, hidden, positions):
        return right(self, hidden, positions + (self.config.model_type == "kvspec"))

    monkeypatch.setattr(Qwen3RotaryEmbedding, "forward", shifted)


def shifted_mask(rows):
    """The last token of every stretch is the user's."""
    batch = collate(rows)
    return batch | {"loss_mask": batch["loss_mask"].roll(1, dims=1)}


@pytest.mark.parametrize("mistake", [shift_anchors, shift_positions, shifted_mask])
def test_one_position_off_is_seen(target, tmp_path, monkeypatch, mistake):
    """The test above can fail: with this mistake in training, whole blocks are accepted by chance only."""
    options = {"context": "kv", "target_kv_layer_ids": [0]}
    if mistake is shifted_mask:
        options["collate"] = shifted_mask
    else:
        mistake(monkeypatch)
    head = train_head(target, tmp_path, **options)
    monkeypatch.undo()
    assert acceptance(head, target).survival[-1] < 0.3
