# SPDX-License-Identifier: Apache-2.0
"""A logits processor that reads a row's history gives the same text with kvspec, whether it comes by flag or as a
plugin (a distribution with an entry point): every request gets a chain."""

import json
import sys

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


BY_FLAG = {"logits_processors": ["follows:Follows"]}


@pytest.fixture(scope="module")
def requests() -> list[dict]:
    return requests_mix.greedy_batch()[2:5]


@pytest.fixture(scope="module")
def plain(requests, tmp_path_factory) -> list:
    """What plain vLLM answers with the processor."""
    directory = tmp_path_factory.mktemp("plain")
    (directory / "follows.py").write_text(PROCESSOR)
    job = {"engine": {**engine_runner.PLAIN_ENGINE, **BY_FLAG}, "batches": [requests]}
    return engine_runner.run_script(job, directory, path=directory)["outputs"]


@pytest.fixture
def processor(tmp_path, monkeypatch):
    """Its directory, where this process finds it."""
    (tmp_path / "follows.py").write_text(PROCESSOR)
    monkeypatch.delitem(sys.modules, "follows", raising=False)
    monkeypatch.syspath_prepend(tmp_path)
    return tmp_path


@pytest.fixture
def check(requests, plain, make_engine, spec, same, tmp_path):
    """Oracle drafts, so that long paths are verified: what a wrong history does shows on them."""
    answers = [samples[0]["token_ids"] for samples in plain[0]]
    known = tmp_path / "known.json"
    known.write_text(json.dumps([r["prompt"] + tokens for r, tokens in zip(requests, answers, strict=True)]))

    def run(**flags) -> None:
        with make_engine(spec(8, drafter="oracle", oracle_file=str(known)), **flags) as llm:
            same(engine_runner.generate(llm, [requests]), plain)
            counters = engine_runner.spec_counters(llm)
        assert counters["accepted_tokens"] > counters["drafts"]

    return run


def test_as_a_plugin(check, processor):
    info = processor / "follows-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: follows\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.logits_processors]\nfollows = follows:Follows\n")
    check()


@pytest.mark.once
def test_by_flag(check, processor):
    check(**BY_FLAG)
