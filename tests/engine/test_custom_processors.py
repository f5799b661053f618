# SPDX-License-Identifier: Apache-2.0
"""A logits processor that reads a row's history gives the same text with kvspec, whether it comes by flag or as a
plugin (a distribution with an entry point): every request gets a chain."""

import json

import engine_runner
import pytest
import requests_mix

PROCESSOR = '''
import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor


class Follows(LogitsProcessor):
    """Makes the next token a function of all tokens before: what is committed, then the drafts before the row."""

    def __init__(self, vllm_config, req_states):
        self.states = req_states

    def apply(self, logits, context):
        for row, request in enumerate(context.expanded_idx_mapping.tolist()):
            before = context.input_ids[row - int(context.expanded_local_pos[row]) + 1 : row + 1]
            committed = self.states.all_token_ids.gpu[request, : int(self.states.total_len.gpu[request])]
            logits[row, (committed.sum() + before.sum()) * 31 % logits.shape[1]] += 100.0
        return logits
'''


@pytest.fixture
def processor(tmp_path):
    (tmp_path / "follows.py").write_text(PROCESSOR)
    return tmp_path


@pytest.fixture
def plugin(processor):
    info = processor / "follows-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: follows\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.logits_processors]\nfollows = follows:Follows\n")
    return processor


@pytest.fixture
def check(script, spec, same, tmp_path):
    """Oracle drafts, so that long paths are verified: what a wrong history does shows on them."""
    requests = requests_mix.greedy_batch()[2:5]

    def run(path, **flags) -> None:
        plain = script({"engine": {**engine_runner.PLAIN_ENGINE, **flags}, "batches": [requests]}, path=path)["outputs"]
        answers = [samples[0]["token_ids"] for samples in plain[0]]
        known = tmp_path / "known.json"
        known.write_text(json.dumps([r["prompt"] + tokens for r, tokens in zip(requests, answers, strict=True)]))
        oracle = {"speculative_config": spec(8, drafter="oracle", oracle_file=str(known)), **flags}
        found = script({"engine": oracle, "batches": [requests]}, path=path)
        same(found["outputs"], plain)
        assert found["counters"]["accepted_tokens"] > found["counters"]["drafts"]

    return run


def test_as_a_plugin(check, plugin):
    check(plugin)


@pytest.mark.once
def test_by_flag(check, processor):
    check(processor, logits_processors=["follows:Follows"])
