# SPDX-License-Identifier: Apache-2.0
"""Offline acceptance against what can be known by other means: oracles, step-by-step decoding, arithmetic."""

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from vllm_kvspec.eval.acceptance import (
    NoiseProcessor,
    Text,
    accepted_depth,
    evaluate,
    repeated_share,
    summarise,
    text_acceptance,
)
from vllm_kvspec.kernels.reference import gumbel_noise
from vllm_kvspec.models.draft_head import KVSpecDraftModel, head_config_for

BLOCK, VOCAB = 3, 40


@pytest.fixture(scope="module")
def pair():
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=VOCAB, tie_word_embeddings=True, max_position_embeddings=128,
    )  # fmt: skip
    target = Qwen3ForCausalLM(config).eval()
    return target, KVSpecDraftModel(head_config_for(config, draft_block_size=BLOCK, num_hidden_layers=1)).eval()


def test_accepted_depth_follows_paths_not_levels():
    # Node 1 (token 5) has the child 3 (token 7); node 2 (token 6) has the child 4 (token 8).
    parent, depth = torch.tensor([[0, 0, 0, 1, 2]]), torch.tensor([[0, 1, 1, 2, 2]])
    tokens = torch.tensor([[5, 6, 7, 8]])
    for truth, expected in (([5, 7, 1], 2), ([6, 7, 1], 1), ([6, 8, 1], 2), ([9, 7, 8], 0), ([7, 5, 5], 0)):
        assert accepted_depth(tokens, parent, depth, torch.tensor([truth])).item() == expected, truth


def test_free_run_jumps_over_accepted_tokens():
    # Anchors 0..5 would accept these many tokens; the run visits 0, 3, 4.
    acceptance = summarise([torch.tensor([2, 9, 9, 0, 1, 9])], block=BLOCK)
    assert acceptance.drafts == 3
    assert acceptance.tau == pytest.approx(1 + (2 + 0 + 1) / 3)
    assert acceptance.tau_all == pytest.approx(1 + 30 / 6)
    assert acceptance.conditional == pytest.approx([2 / 3, 1 / 2, 0])


def test_repeated_share():
    looping = Text([1, 2, 3] * 6, 3, 0)
    assert repeated_share(looping, order=3) == pytest.approx(13 / 15)
    assert repeated_share(Text(list(range(20)), 3, 0), order=3) == 0


def test_a_head_that_knows_the_text_is_accepted_everywhere(pair):
    """An oracle through the transition bias: W1 W2 = one large entry per (token, successor)."""
    target, head = pair
    ids = [i % 7 for i in range(30)]
    oracle = KVSpecDraftModel(
        head_config_for(target.config, draft_block_size=BLOCK, num_hidden_layers=1, transition_rank=VOCAB)
    )
    with torch.no_grad():
        oracle.transition_in.weight.copy_(torch.eye(VOCAB))
        oracle.transition_out.weight.zero_()
        for token in range(7):
            oracle.transition_out.weight[(token + 1) % 7, token] = 1000.0
    found, half = evaluate(oracle.eval(), target, [Text(ids, 2, 0)], [1, BLOCK, 8])
    assert found == half
    assert found["chain"].tau == found["3"].tau == found["8"].tau == BLOCK + 1
    assert found["1"].tau == 2
    assert found["chain"].conditional == [1.0] * BLOCK


@pytest.mark.parametrize("coupled", [False, True])
def test_trees_contain_the_chain_and_grow(pair, coupled):
    target, head = pair
    text = Text(torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(1)).tolist(), 4, 3)
    found = text_acceptance(head, target, text, [4, 16, 63], temperature=0.9, coupled=coupled, beam=8, width=6)
    assert found["chain"].shape == (40 - BLOCK - 4,)
    assert (found["4"] <= found["16"]).all() and (found["16"] <= found["63"]).all()


def test_noise_processor_uses_true_positions():
    """Left padding must not move the noise: position = column - padding."""
    seeds, scores = torch.tensor([7, 8]), torch.zeros(2, VOCAB)
    out = NoiseProcessor(seeds, 0.5, torch.tensor([0, 2]))(torch.zeros(2, 6, dtype=torch.int64), scores)
    for row, (seed, position) in enumerate(((7, 5), (8, 3))):
        expected = gumbel_noise(
            torch.tensor([seed]), torch.tensor([0.5]), torch.tensor([[position]]), torch.tensor([0]), VOCAB
        )
        torch.testing.assert_close(out[row], expected[0, 0])


def test_coupling_makes_a_perfect_head_perfect_under_sampling(pair):
    """When the head's logits are the target's, coupled candidates are exactly the sampled tokens."""
    target, _ = pair
    # A target that ignores its context: the next token's logits depend on nothing, so zero hidden states suit both.
    temperature, length = 1.0, 30
    positions = torch.arange(length)[None]
    noise = gumbel_noise(torch.tensor([5]), torch.tensor([temperature]), positions, torch.tensor([0]), VOCAB)
    ids = [0, *noise[0].argmax(-1).tolist()]
    flat = Qwen3ForCausalLM(target.config).eval()
    with torch.no_grad():
        flat.lm_head.weight.zero_()
    head = KVSpecDraftModel(head_config_for(flat.config, draft_block_size=BLOCK, num_hidden_layers=1)).eval()
    with_noise, _ = evaluate(head, flat, [Text(ids, 1, 5)], [8], temperature=temperature, coupled=True)
    without, _ = evaluate(head, flat, [Text(ids, 1, 5)], [8], temperature=temperature, coupled=False)
    assert with_noise["chain"].tau == BLOCK + 1
    assert without["chain"].tau < 2
