# SPDX-License-Identifier: Apache-2.0
"""A logits processor that reads a row's history gives the same text with kvspec, whether it comes by flag or as a
plugin (a distribution with an entry point): every request gets a chain."""

import engine_runner
import pytest
import requests_mix

PROCESSOR = '''
import torch
from vllm.v1.worker.gpu.sample.logits_processor import LogitsProcessor


class NoRepeats(LogitsProcessor):
    """Makes every token of a row's history less likely: what is committed, then the drafts before the row."""

    def __init__(self, vllm_config, req_states):
        self.states = req_states

    def apply(self, logits, context):
        for row, request in enumerate(context.expanded_idx_mapping.tolist()):
            before = context.input_ids[row - int(context.expanded_local_pos[row]) + 1 : row + 1]
            committed = self.states.all_token_ids.gpu[request, : int(self.states.total_len.gpu[request])]
            logits[row, torch.cat((committed, before)).long()] -= 2.0
        return logits
'''


@pytest.fixture
def processor(tmp_path):
    (tmp_path / "no_repeats.py").write_text(PROCESSOR)
    return tmp_path


@pytest.fixture
def plugin(processor):
    info = processor / "no_repeats-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: no-repeats\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text("[vllm.logits_processors]\nno_repeats = no_repeats:NoRepeats\n")
    return processor


def outputs(script, engine: dict, path) -> list:
    job = {"engine": engine, "batches": [requests_mix.greedy_batch()[2:5]]}
    return script(job, path=path)["outputs"]


def test_as_a_plugin(script, spec, plugin, reference, same):
    plain = outputs(script, engine_runner.PLAIN_ENGINE, plugin)
    assert [samples[0]["token_ids"] for samples in plain[0]] != [
        samples[0]["token_ids"] for samples in reference["greedy"][2:5]
    ]
    same(outputs(script, {"speculative_config": spec(8)}, plugin), plain)


def test_by_flag(script, spec, processor, same):
    flag = {"logits_processors": ["no_repeats:NoRepeats"]}
    plain = outputs(script, {**engine_runner.PLAIN_ENGINE, **flag}, processor)
    same(outputs(script, {"speculative_config": spec(8), **flag}, processor), plain)
