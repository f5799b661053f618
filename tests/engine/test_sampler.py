# SPDX-License-Identifier: Apache-2.0
"""Which requests get a chain, and why: vLLM's penalties read the drafts before a row as its prefix."""

import pytest
from vllm import SamplingParams
from vllm.sampling_params import StructuredOutputsParams


@pytest.fixture
def needs_chain():
    from vllm_kvspec.engine.runner import needs_chain

    return needs_chain


@pytest.mark.parametrize(
    "params",
    [
        {"repetition_penalty": 1.1},
        {"presence_penalty": 0.1},
        {"frequency_penalty": -0.1},
        {"bad_words": ["x"]},
        {"structured_outputs": StructuredOutputsParams(regex="a+")},
    ],
    ids=lambda params: next(iter(params)),
)
def test_chain(needs_chain, params):
    assert needs_chain(SamplingParams(**params))


@pytest.mark.parametrize(
    "params",
    [
        {},
        {"temperature": 0.7, "top_p": 0.9, "top_k": 5, "seed": 1},
        {"min_tokens": 3},
        {"stop": ["x"]},
        {"logprobs": 2},
    ],
    ids=str,
)
def test_tree(needs_chain, params):
    assert not needs_chain(SamplingParams(**params))


@pytest.mark.cpu
def test_penalties_are_wrong_on_a_tree():
    """The reason for the fallback, on processed logits of the tree root -> (1 -> 3, 2).

    vLLM's kernel takes the local_pos drafts up to a row as its prefix. For node 3 (depth 2) these are nodes 2 and 3:
    the other branch counts as said, its own parent does not. On a chain they are the row's ancestors.
    """
    import torch
    from vllm.v1.worker.gpu.sample.penalties import apply_penalties

    vocab = 8
    drafts = torch.tensor([3, 4, 5, 6], dtype=torch.int32)

    def presence(local_pos: list[int]) -> torch.Tensor:
        logits = torch.zeros(4, vocab)
        apply_penalties(
            logits,
            torch.zeros(4, dtype=torch.int64),
            drafts,
            torch.tensor(local_pos, dtype=torch.int32),
            repetition_penalty=torch.ones(1),
            frequency_penalty=torch.zeros(1),
            presence_penalty=torch.ones(1),
            prompt_bin_mask=torch.zeros(1, 1, dtype=torch.int32),
            output_bin_counts=torch.zeros(1, vocab, dtype=torch.int32),
        )
        return logits

    tree = presence([0, 1, 1, 2])[3]
    assert (tree[5], tree[4]) == (-1.0, 0.0)
    chain = presence([0, 1, 2, 3])[3]
    assert (chain[4], chain[5], chain[6], chain[7]) == (-1.0, -1.0, -1.0, 0.0)
