# SPDX-License-Identifier: Apache-2.0
"""The kernel benchmark at tiny shapes: it runs, it writes what it ran, and a wrong kernel gets no numbers."""

import importlib
import json

import pytest

ARGUMENTS = ["--small", "--batch", "2", "--rows", "5", "--layers", "1"]


@pytest.fixture
def bench(device):
    module = importlib.import_module("bench_kernels")
    return lambda output, *kernels: module.main(
        [*ARGUMENTS, "--device", device.type, "--output", str(output), "--kernels", *kernels]
    )


def test_report(bench, tmp_path, device):
    kernels = ["tree_attention", "paged_draft_attention", "kv_compact", "tree_inputs", "tree_walk", "draft_inputs"]
    kernels += ["recycle_update", "own_matches", "recycle_tree", "loose_scores"]
    assert bench(tmp_path / "kernels", *kernels) == 0
    record = json.loads((tmp_path / "kernels.json").read_text())
    assert [row["kernel"] for row in record["rows"]] == kernels
    assert all(row["ms"] > 0 for row in record["rows"])
    attention = record["rows"][0]
    assert (attention["batch"], attention["context"], attention["rows"]) == (2, 40, 5)
    assert {"date", "command", "device", "torch", "triton"} <= record["conditions"].keys()
    table = (tmp_path / "kernels.md").read_text()
    if device.type == "cpu":
        # No claim about speed without a GPU.
        assert "TB/s" not in attention
        assert "Interpreter timings" in table
    assert "| tree_walk | 2 |" in table


@pytest.mark.parametrize("kernel", ["tree_walk", "kv_compact"])
def test_a_wrong_kernel_is_not_timed(bench, tmp_path, monkeypatch, capsys, kernel):
    cases = importlib.import_module("tree_cases" if kernel == "tree_walk" else "kernel_cases")
    original = getattr(cases, kernel)

    def wrong(*inputs):
        if kernel == "kv_compact":
            # The path shifted by one request.
            inputs = (*inputs[:4], inputs[4].roll(1, 0), inputs[5])
            return original(*inputs)
        tokens, num_sampled, path = original(*inputs)
        return tokens, num_sampled + 1, path

    monkeypatch.setattr(cases, kernel, wrong)
    assert bench(tmp_path / "kernels", kernel) == 1
    assert f"{kernel} must agree with its torch twin" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_candidates_agree_in_most_requests(device):
    """Near-ties may swap a few; wrong scores or many other tokens are refused."""
    import torch

    agree = importlib.import_module("tree_cases").candidates_agree
    score, token = torch.randn(20, 6), torch.arange(120).view(20, 6)
    expected = (score, token, token.int())
    one_off = token.clone()
    one_off[0, 3] += 1
    assert agree((score, one_off, token.int()), expected) == (0.0, True)
    assert not agree((score, token + 1, token.int()), expected)[1]
    assert not agree((score + 0.1, token, token.int()), expected)[1]
