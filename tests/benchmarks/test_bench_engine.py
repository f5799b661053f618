# SPDX-License-Identifier: Apache-2.0
"""The engine benchmark on a tiny geometry: parity, forced acceptance that is reached, no KV room lost, refusals."""

import importlib
import json

import pytest

TOKENS = [{"prompt": [1, 2], "token_ids": [5, 6, 7], "logprobs": [{"5": -0.1}, {"6": -1.0, "9": -1.1}, {"7": -0.2}]}]


@pytest.fixture
def bench():
    return importlib.import_module("bench_engine")


@pytest.mark.e2e
@pytest.mark.slow
def test_methods(bench, tmp_path, device):
    """On CPU without EAGLE-3: its speculator's kernels need a GPU, and on V1 acceptance cannot be forced."""
    rates = [0.9, 0.6, 0.3]
    methods = ["none", "native" if device.type == "cpu" else "eagle3", "kvspec-tree"]
    arguments = ["--small", "--device", device.type, "--steps", "12", "--rates", *map(str, rates)]
    arguments += ["--methods", *methods]
    assert bench.main([*arguments, "--output", str(tmp_path / "engine")]) == 0
    rows = json.loads((tmp_path / "engine.json").read_text())["rows"]
    assert [row["method"] for row in rows] == methods
    plain, other, tree = rows
    assert plain["tau"] == 1.0
    # 24 draws with standard deviation 1.1, always the same ones: the seeds are fixed.
    assert tree["tau"] == pytest.approx(1 + sum(rates), abs=0.5)
    assert tree["KV tokens"] == plain["KV tokens"]
    if other["method"] == "eagle3":
        assert other["tau"] == pytest.approx(1 + sum(rates), abs=0.5)
        assert other["KV tokens"] < plain["KV tokens"]
    else:
        assert other["tau"] == 1.0
        assert other["speed-up"] == 1.0
    for row in rows:
        assert row["ms per step"] == pytest.approx(row["verify ms"] + row["draft ms"] + row["rest ms"])
        assert row["verify ms"] > 0
    assert plain["draft ms"] == 0 < tree["draft ms"]


def changed(token: int) -> list[dict]:
    return [{**TOKENS[0], "token_ids": [5, token, 7]}]


@pytest.mark.parametrize(
    ("found", "near_tie", "differs"),
    [
        (TOKENS, 0.0, False),
        (changed(9), 0.25, False),
        (changed(9), 0.05, True),
        (changed(9), 0.0, True),
        (changed(8), 0.25, True),
    ],
    ids=["same", "near-tie", "not so near", "exact", "unlikely token"],
)
def test_parity(bench, found, near_tie, differs):
    assert (bench.parity_problem(found, TOKENS, near_tie) is not None) == differs


def test_wrong_tokens_are_refused(bench, tmp_path, monkeypatch, capsys):
    def run(job, directory, arguments):
        wrong = job["engine"]["speculative_config"] is not None
        return [{"parity": changed(8) if wrong else TOKENS}], None

    monkeypatch.setattr(bench, "run", run)
    assert bench.main(["--small", "--device", "cpu", "--output", str(tmp_path / "engine")]) == 1
    assert "kvspec-tree must decode as plain vLLM does" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_a_method_that_fails_is_reported(bench, tmp_path, monkeypatch):
    def run(job, directory, arguments):
        if job["parity"]:
            return [{"parity": TOKENS}], None
        return [], "stopped after 9 s"

    monkeypatch.setattr(bench, "run", run)
    assert bench.main(["--small", "--device", "cpu", "--output", str(tmp_path / "engine")]) == 0
    assert "| kvspec-tree | stopped after 9 s |" in (tmp_path / "engine.md").read_text()


def test_every_method_gets_the_same_rates(bench, tmp_path, monkeypatch):
    seen = {}

    def run(job, directory, arguments):
        spec = job["engine"]["speculative_config"]
        if spec and not job["parity"]:
            seen[spec["method"], spec.get("tree"), spec.get("budget")] = spec["synthetic_acceptance_rates"]
        return ([{"parity": TOKENS}] if job["parity"] else []), None

    monkeypatch.setattr(bench, "run", run)
    arguments = ["--small", "--device", "cpu", "--rates", "0.5", "0.25", "--methods", *bench.METHODS]
    assert bench.main([*arguments, "--output", str(tmp_path / "engine")]) == 0
    # All but plain vLLM, on either model runner.
    assert len(seen) == len(bench.METHODS) - 2
    for rates in seen.values():
        assert rates[:2] == [0.5, 0.25]
        assert not any(rates[2:])
