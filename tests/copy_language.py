# SPDX-License-Identifier: Apache-2.0
"""A target that repeats what it wrote PERIOD tokens ago: heads learn it perfectly, or something is off by one.

Its weights are set by hand. One layer's keys are the same for every token, so their rotation says where they stand and
nothing else; its query turns by PERIOD - 1 positions and finds the token to repeat, which its value holds. Nothing but
that position's KV tells what comes next: a head that reads the right positions is accepted everywhere, and one that was
trained a position off, or turns its queries otherwise than the target its keys, is right by chance only.
"""

import torch
from transformers import PreTrainedModel, TrainingArguments

from vllm_kvspec.eval.acceptance import evaluate
from vllm_kvspec.eval.texts import Text
from vllm_kvspec.models.draft_head import KVSpecDraftModel, head_config_for
from vllm_kvspec.train.data import collate
from vllm_kvspec.train.trainer import KVSpecTrainer, LossSettings, init_from_target

VOCAB, PERIOD, BLOCK = 14, 7, 4
HEAD_DIM = 16
# The residual stream: a constant, the token, the token to come.
CONSTANT, TOKEN, NEXT = 0, slice(1, 1 + VOCAB), slice(1 + VOCAB, 1 + 2 * VOCAB)
STEPS, BATCH = 80, 8
SHAPE = dict(
    hidden_size=32, intermediate_size=8, num_hidden_layers=2, num_attention_heads=1, num_key_value_heads=1,
    head_dim=HEAD_DIM, vocab_size=VOCAB, tie_word_embeddings=False, max_position_embeddings=128, eos_token_id=None,
    bos_token_id=None,
)  # fmt: skip


def make_it_copy(model: PreTrainedModel, layer: int, theta: float, unit_norm: float = 1.0) -> PreTrainedModel:
    """Set the weights of a target of ``SHAPE`` so that ``layer`` copies; its RoPE has base ``theta``.

    ``unit_norm``: the weight with which the model's norms multiply by one.
    """
    model.eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        parameter.fill_(unit_norm if "norm" in name else 0.0)
    one_hot, half = torch.eye(VOCAB), HEAD_DIM // 2
    turn = (PERIOD - 1) * theta ** (-torch.arange(half) / half)
    attention = model.model.layers[layer].self_attn
    model.model.embed_tokens.weight[:, CONSTANT] = 1.0
    model.model.embed_tokens.weight[:, TOKEN] = one_hot
    attention.k_proj.weight[:half, CONSTANT] = 1.0
    attention.q_proj.weight[:half, CONSTANT] = turn.cos()
    attention.q_proj.weight[half:, CONSTANT] = -turn.sin()
    # Sharp: the weight of the right position is above 0.999.
    attention.q_norm.weight.fill_(7.0 + unit_norm)
    attention.k_norm.weight.fill_(3.0 + unit_norm)
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


def train_head(target, directory, steps=STEPS, collate=collate, **fields) -> KVSpecDraftModel:
    """A head of one layer, trained on the target's text; ``fields``: of its configuration."""
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


def unseen_texts(length: int) -> list[Text]:
    """Eight texts of the target, none of which a head was trained on."""
    generator = torch.Generator().manual_seed(1)
    prompts = [torch.randint(VOCAB, (PERIOD,), generator=generator).tolist() for _ in range(8)]
    return [Text(copied(prompt, length), PERIOD, 0) for prompt in prompts]


def acceptance(head, target, length: int = 40):
    """Conditional acceptance per depth, and tau, of chains over texts the head has not seen."""
    return evaluate(head, target, unseen_texts(length), [BLOCK])[0]["chain"]
