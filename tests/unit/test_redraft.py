# SPDX-License-Identifier: Apache-2.0
"""Drafting again from rows made before: the same rows under another token, and how a run through a text goes."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from vllm_kvspec.eval.acceptance import anchor_positions, text_acceptance
from vllm_kvspec.eval.redraft import Run, row_acceptance, run_beside, run_instead, run_overlapped
from vllm_kvspec.eval.texts import Text
from vllm_kvspec.models.draft_head import KVSpecDraftModel, head_config_for
from vllm_kvspec.models.drafting import draft_logits
from vllm_kvspec.models.target import view_target

BLOCK, VOCAB = 3, 12


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=VOCAB, tie_word_embeddings=True, max_position_embeddings=128, eos_token_id=None,
        bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    target = Qwen3ForCausalLM(config).eval()
    head = KVSpecDraftModel(head_config_for(config, draft_block_size=BLOCK, num_hidden_layers=1, transition_rank=4))
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
    return target, head.eval()


def test_row_0_is_the_fresh_draft_and_others_are_the_block_seen_from_within(pair):
    target, head = pair
    ids = target.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=30, do_sample=True)[0].tolist()
    text = Text(ids, 3, seed=5)
    for temperature in (0.0, 0.8):
        found = row_acceptance(head, target, text, [4, 8], temperature=temperature)
        fresh = text_acceptance(head, target, text, [4, 8], temperature=temperature, coupled=True)
        for n in (4, 8):
            assert found[n].shape == (BLOCK, len(fresh["chain"]))
            assert found[n][0].tolist() == fresh[str(n)].tolist()
            # What is left of the block bounds it, and somewhere it finds something.
            assert (found[n] <= BLOCK - torch.arange(BLOCK)[:, None]).all()
            assert found[n][1:].amax(1).tolist() > [0, 0]
    # The last row alone: its best tokens given the token before.
    positions = anchor_positions(text, BLOCK)[:, None] + torch.arange(BLOCK)
    sequence = torch.tensor([ids])
    view = view_target(target, head.config, sequence)
    logits = draft_logits(head, target, view, sequence, positions[:, 0], sequence[0, positions])[:, -1]
    hit = (logits.topk(4).indices == sequence[0, positions[:, -1:] + 1]).any(-1)
    assert 0 < hit.sum() < len(hit)
    found = row_acceptance(head, target, text, [4, 8], temperature=0.0)[4]
    assert found[-1].tolist() == hit.int().tolist()


def test_rows_are_decoded_under_the_token_that_the_text_has(pair):
    """A transition that drowns the rows: the draft follows the anchor's token, wherever the rows came from."""
    target, head = pair
    following = torch.randperm(VOCAB, generator=torch.Generator().manual_seed(3)).tolist()
    sure = KVSpecDraftModel(
        head_config_for(target.config, draft_block_size=BLOCK, num_hidden_layers=1, transition_rank=VOCAB)
    )
    sure.load_state_dict(head.state_dict() | {k: v for k, v in sure.state_dict().items() if "transition" in k})
    with torch.no_grad():
        sure.transition_in.weight.copy_(torch.eye(VOCAB))
        sure.transition_out.weight.zero_()
        sure.transition_out.weight[following, torch.arange(VOCAB)] = 1000.0
    ids = [0]
    while len(ids) < 20:
        ids.append(following[ids[-1]])
    found = row_acceptance(sure.eval(), target, Text(ids, 1, seed=0), [4], temperature=0.0)[4]
    assert (found == BLOCK - torch.arange(BLOCK)[:, None]).all()


def test_runs():
    # Three rows, five anchors; entry [row, base] of the block made at base.
    accepted = torch.tensor([[0, 1, 0, 3, 0], [1, 0, 0, 0, 2], [0, 1, 0, 0, 0]])
    # Fresh at 0, 1, 3: 1 + 2 + 4 tokens.
    assert run_instead(accepted, 3) == Run(3, 3, 7)
    # Fresh at 0 (1 token), its row 1 (2 tokens), then none is left: fresh at 3 (4 tokens).
    assert run_instead(accepted, 1) == Run(3, 2, 7)
    # Block of 0 at 0 (1 token), its row 1 at 1 (2 tokens), row 2 of the block of 1 at 3 (2 tokens).
    assert run_overlapped(accepted) == Run(3, 3, 5)
    # Fresh at 0 (1 token); at 1 the better of fresh (1) and the block of 0's row 1 (1); at 3 of 3 and row 2 of 1 (1).
    assert run_beside(accepted, accepted, accepted) == Run(3, 3, 7)
    worse = torch.zeros_like(accepted)
    assert run_beside(worse, accepted, worse) == Run(3, 3, 1 + 2 + 2)


def test_heads_that_cannot(pair):
    target, _ = pair
    head = KVSpecDraftModel(
        head_config_for(target.config, draft_block_size=BLOCK, num_hidden_layers=1, transition_rank=0)
    )
    with pytest.raises(ValueError, match="block head with a transition"):
        row_acceptance(head, target, Text([1, 2, 3, 4, 5, 6], 1, 0), [4], temperature=0.0)
