# SPDX-License-Identifier: Apache-2.0
"""The torch replacement of vLLM's grammar kernel forbids exactly the tokens whose bit is clear."""

from types import SimpleNamespace

import numpy as np
import torch

from vllm_kvspec.engine.cpu.interpreter import apply_grammar_bitmask


def test_grammar_bitmask():
    vocab_size = 70
    allowed = [{0, 33, 69}, {5}, {64}]
    bitmask = np.zeros((3, 3), dtype=np.int32)
    for row, tokens in enumerate(allowed):
        for token in tokens:
            bitmask.view(np.uint32)[row, token // 32] |= np.uint32(1 << (token % 32))
    # Request "b" (two rows) and request "c" (one row) have grammars; "a" (two rows) has none.
    batch = SimpleNamespace(req_ids=["a", "b", "c"], cu_num_logits_np=np.array([0, 2, 4, 5]))
    logits = torch.randn(5, vocab_size)
    before = logits.clone()
    apply_grammar_bitmask(None, logits, batch, ["b", "c"], bitmask)
    assert torch.equal(logits[:2], before[:2])
    for row, tokens in zip((2, 3, 4), allowed, strict=True):
        finite = set(logits[row].isfinite().nonzero()[:, 0].tolist())
        assert finite == tokens
        assert torch.equal(logits[row, sorted(tokens)], before[row, sorted(tokens)])
