# SPDX-License-Identifier: Apache-2.0
"""The head in vLLM, reading paged KV, gives the logits of its definition in torch on transformers' own KV cache."""

import pytest
import requests_mix
import torch
from engine_runner import HEAD, TARGET, generate
from transformers import AutoModelForCausalLM

from vllm_kvspec.models.draft_head import KVSpecDraftModel
from vllm_kvspec.models.target import anchor_inputs, view_target

# fp32, other kernels on both sides.
TOLERANCE = 2e-3


@pytest.fixture
def drafts(monkeypatch) -> list[tuple[int, torch.Tensor]]:
    """(base, logits [G, V]) of every draft of the only running request."""
    from vllm_kvspec.engine.speculator import KVSpecSpeculator

    seen = []
    original = KVSpecSpeculator._noise

    def noise(self, base, *args):
        seen.append(int(base[0]))
        return original(self, base, *args)

    build = KVSpecSpeculator._build_trees

    def build_trees(self, logits, *args):
        seen[-1] = (seen[-1], logits[0].clone())
        return build(self, logits, *args)

    monkeypatch.setattr(KVSpecSpeculator, "_noise", noise)
    monkeypatch.setattr(KVSpecSpeculator, "_build_trees", build_trees)
    return seen


@pytest.mark.parametrize("prompt_len", [5, 64])
def test_logits(make_engine, spec, drafts, prompt_len):
    request = requests_mix.request(prompt_len, 77, temperature=0.0, max_tokens=24)
    with make_engine(spec(8)) as llm:
        tokens = request["prompt"] + generate(llm, [[request]])[0][0][0]["token_ids"]

    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    head = KVSpecDraftModel.from_pretrained(HEAD, dtype=torch.float32).eval()
    inside = [(base, logits) for base, logits in drafts if base < len(tokens)]
    assert len(inside) >= 3
    ids = torch.tensor([tokens])
    with torch.no_grad():
        view = view_target(target, head.config, ids)
        base = torch.tensor([[base for base, _ in inside]])
        anchor_embeds, target_hidden = anchor_inputs(target, view, ids, base)
        expected = target.lm_head(head(anchor_embeds, base, view.context, target_hidden))[0]
    found = torch.stack([logits for _, logits in inside])
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=TOLERANCE)
