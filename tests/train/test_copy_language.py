# SPDX-License-Identifier: Apache-2.0
"""A target that repeats what it wrote PERIOD tokens ago: heads learn it perfectly, or something is off by one.

The target is a Qwen3 whose weights are set by hand. Its first layer's keys are the same for every token, so their
rotation says where they stand and nothing else; its query turns by PERIOD - 1 positions and finds the token to repeat,
which its value holds. Nothing but that position's KV tells what comes next: a head that reads the right positions is
accepted everywhere, and one that was trained a position off is right by chance only.
"""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM, TrainingArguments
from transformers.models.qwen3.modeling_qwen3 import Qwen3RotaryEmbedding

from vllm_kvspec.eval.acceptance import evaluate
from vllm_kvspec.eval.texts import Text
from vllm_kvspec.models.draft_head import KVSpecDraftModel, head_config_for
from vllm_kvspec.train import trainer
from vllm_kvspec.train.data import collate
from vllm_kvspec.train.trainer import KVSpecTrainer, LossSettings, init_from_target, supervised_rows

VOCAB, PERIOD, BLOCK = 14, 7, 4
HEAD_DIM, THETA = 16, 100.0
# The residual stream: a constant, the token, the token to come.
CONSTANT, TOKEN, NEXT = 0, slice(1, 1 + VOCAB), slice(1 + VOCAB, 1 + 2 * VOCAB)
STEPS, BATCH = 80, 8


@pytest.fixture(scope="module")
def target():
    config = Qwen3Config(
        hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1,
        head_dim=HEAD_DIM, vocab_size=VOCAB, tie_word_embeddings=False, max_position_embeddings=128,
        rope_parameters={"rope_type": "default", "rope_theta": THETA}, eos_token_id=None, bos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(1.0 if "norm" in name else 0.0)
    one_hot, half = torch.eye(VOCAB), HEAD_DIM // 2
    turn = (PERIOD - 1) * THETA ** (-torch.arange(half) / half)
    attention = model.model.layers[0].self_attn
    model.model.embed_tokens.weight[:, CONSTANT] = 1.0
    model.model.embed_tokens.weight[:, TOKEN] = one_hot
    attention.k_proj.weight[:half, CONSTANT] = 1.0
    attention.q_proj.weight[:half, CONSTANT] = turn.cos()
    attention.q_proj.weight[half:, CONSTANT] = -turn.sin()
    # Sharp: the weight of the right position is above 0.999.
    attention.q_norm.weight.fill_(8.0)
    attention.k_norm.weight.fill_(4.0)
    attention.v_proj.weight[:VOCAB, TOKEN] = one_hot
    attention.o_proj.weight[NEXT, :VOCAB] = one_hot
    model.lm_head.weight[:, NEXT] = 4 * one_hot
    return model


def copied(prompt: list[int], length: int) -> list[int]:
    """What the target writes after a prompt of PERIOD tokens."""
    return [prompt[i % PERIOD] for i in range(length)]


def make_rows(count: int) -> list[dict]:
    """Rows in which stretches of the target's own text alternate with a user's random tokens.

    A stretch is just long enough for one block, so that only one anchor teaches the last depth.
    """
    generator, rows = torch.Generator().manual_seed(0), []
    for _ in range(count):
        ids = torch.randint(VOCAB, (PERIOD,), generator=generator).tolist()
        mask = [0] * PERIOD
        for _ in range(3):
            for _ in range(BLOCK + 1):
                ids.append(ids[-PERIOD])
            user = torch.randint(VOCAB, (3,), generator=generator).tolist()
            ids, mask = ids + user, mask + [1] * (BLOCK + 1) + [0] * len(user)
        rows.append({"input_ids": ids, "loss_mask": mask, "temperature": 1.0})
    return rows


def train_head(target, directory, steps=STEPS, collate=collate, **fields):
    torch.manual_seed(0)
    fields = {"num_hidden_layers": 1, "draft_block_size": BLOCK, "transition_rank": 2, "intermediate_size": 32} | fields
    head = KVSpecDraftModel(head_config_for(target.config, **fields))
    init_from_target(head, target)
    args = TrainingArguments(
        str(directory), max_steps=steps, per_device_train_batch_size=BATCH, learning_rate=1e-2, warmup_steps=10,
        lr_scheduler_type="cosine", use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True,
        remove_unused_columns=False, logging_strategy="no",
    )  # fmt: skip
    KVSpecTrainer(
        model=head, args=args, train_dataset=make_rows(256), data_collator=collate, target=target,
        settings=LossSettings(anchors_per_sequence=15, loss_fn="ce"),
    ).train()  # fmt: skip
    return head.eval()


def acceptance(head, target):
    """Conditional acceptance per depth, and tau, of chains over texts the head has not seen."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCAB, (PERIOD,), generator=generator).tolist() for _ in range(8)]
    found, _ = evaluate(head, target, [Text(copied(prompt, 40), PERIOD, 0) for prompt in prompts], [BLOCK])
    return found["chain"]


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
