# SPDX-License-Identifier: Apache-2.0
"""In the running engine the head, reading paged KV, gives the candidates of its definition in torch on transformers'
own KV cache: the rows that reach it are the right ones.
"""

import pytest
import requests_mix
import torch
from engine_runner import HEAD, TARGET, generate
from transformers import AutoModelForCausalLM

from vllm_kvspec.models.draft_head import KVSpecDraftModel
from vllm_kvspec.models.drafting import draft_candidates
from vllm_kvspec.models.target import view_target
from vllm_kvspec.tree import plan_levels

# fp32, other kernels on both sides.
TOLERANCE = 2e-3


@pytest.fixture
def drafts(monkeypatch) -> list[tuple[int, torch.Tensor, torch.Tensor]]:
    """(base, scores [M], tokens [M]) of every draft of the only running request."""
    from vllm_kvspec.engine.draft.head_drafter import Drafter

    seen = []
    original = Drafter.trees

    def trees(self, rows, *args):
        # All of the beam's levels; a tree of few nodes expands fewer.
        levels = plan_levels(self.head.config.draft_block_size, self.beam, self.width)
        candidates = self.expansion(rows)(levels=levels)
        seen.append((int(rows.base[0]), candidates.score[0].clone(), candidates.token[0].clone()))
        return original(self, rows, *args)

    monkeypatch.setattr(Drafter, "trees", trees)
    return seen


def test_candidates(make_engine, spec, drafts):
    requests = [requests_mix.request(length, 77, temperature=0.0, max_tokens=24) for length in (5, 64)]
    texts = []
    with make_engine(spec(8, budget="fixed")) as llm:
        for request in requests:
            drafts.clear()
            tokens = request["prompt"] + generate(llm, [[request]])[0][0][0]["token_ids"]
            texts.append((tokens, [draft for draft in drafts if draft[0] < len(tokens)]))

    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    head = KVSpecDraftModel.from_pretrained(HEAD, dtype=torch.float32).eval()
    for tokens, inside in texts:
        assert len(inside) >= 3
        ids = torch.tensor([tokens])
        base = torch.tensor([base for base, *_ in inside])
        with torch.no_grad():
            view = view_target(target, head.config, ids)
            scale = torch.full((len(base),), head.config.greedy_scale)
            score, token, _ = draft_candidates(head, target, view, ids, base, scale=scale, beam=8, width=4)
        found = torch.stack([score for _, score, _ in inside])
        torch.testing.assert_close(found, score, atol=TOLERANCE, rtol=TOLERANCE)
        # Candidates of nearly equal scores may change places.
        same = torch.stack([token for *_, token in inside]) == token
        assert same.float().mean() > 0.95
