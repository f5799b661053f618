# SPDX-License-Identifier: Apache-2.0
"""The comparison of methods on prompts: the bundled pair end to end, and that a difference is counted."""

import importlib
import json
from pathlib import Path

import pytest

TINY = Path(__file__).parents[2] / "examples" / "tiny"
ROWS = [{"category": "code", "turns": ["def add(a, b):"]}, {"category": "chat", "turns": ["import os\n"]}]


@pytest.fixture
def bench():
    return importlib.import_module("bench_prompts")


def result(token_ids: list[list[int]], taus: list[float] | None, temperature: float = 0.0, batch: int = 1) -> dict:
    parts = [[i] for i in range(len(token_ids))]
    found = {"token_ids": token_ids, "taus": taus, "taus_again": None, "parts": parts, "seconds": [0.5] * len(parts)}
    return {"temperature": temperature, "batch": batch} | found


def test_rows(bench):
    plain = [result([[1, 2], [3, 4]], [1.0, 1.0]), result([[1, 2], [3, 4]], None, batch=8)]
    same, eight = bench.rows_of(
        "8", [result([[1, 2], [3, 4]], [2.0, 3.0]), result([[1, 2], [3, 5]], None, batch=8)], plain
    )
    assert (same["tau"], same["standard error"], same["identical"]) == (2.5, 0.5, "2 of 2")
    assert (eight["tau"], eight["identical"], eight["tokens/s"]) == (None, "1 of 2", 4.0)


def test_a_lossy_text_is_compared(bench):
    plain = [result([[1, 2, 3], [3, 4]], [1.0, 1.0])]
    lossy = result([[1, 2, 4], [3, 4]], [2.0, 3.0]) | {"log_probs": [-1.0, -2.0]}
    (row,) = bench.rows_of("fly", [lossy], plain)
    assert (row["identical"], row["first difference"], row["log-prob"], row["its standard error"]) == (
        "1 of 2", 2, -1.5, 0.5,
    )  # fmt: skip
    assert "fly" not in bench.parse_arguments(["--target", "t", "--head", "h", "--prompts", "p"]).methods


def test_speed_up_by_category(bench):
    prompts = [{"category": name} for name in ("code", "chat", "code")]
    plain = result([[1], [2], [3]], None)
    fast = plain | {"parts": [[0, 2], [1]], "seconds": [0.25, 1.0]}
    (row,) = bench.speed_up_by_category({"none": [plain], "8": [fast]}, prompts, "none")
    assert (row["code"], row["chat"]) == (4.0, 0.5)


def test_prompts_of_every_category(bench, tmp_path):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in [ROWS[0]] * 3 + [ROWS[1]] * 3))
    assert [row["category"] for row in bench.chosen_prompts(path, 4)] == ["code", "chat", "code", "chat"]


def test_eagle3_is_compared_where_there_is_a_checkpoint(bench):
    required = ["--target", "t", "--head", "h", "--prompts", "p"]
    assert "eagle3" not in bench.parse_arguments(required).methods
    arguments = bench.parse_arguments([*required, "--eagle3", "e"])
    assert bench.job(arguments, arguments.methods[-1], [])["engine"]["speculative_config"] == {
        "method": "eagle3", "model": "e", "num_speculative_tokens": 5,
    }  # fmt: skip


def test_parts(bench):
    required = ["--target", "t", "--head", "h", "--prompts", "p", "--temperatures", "0", "--rounds", "2"]
    prompts = [{"category": name} for name in ("code", "chat", "code", "code")]
    arguments = bench.parse_arguments([*required, "--batch", "1", "2"])
    parts = bench.parts_of(prompts, arguments)
    assert [part["prompts"] for part in parts] == [[0], [1], [2], [3]] * 2 + [[0, 2, 3], [1]] * 2
    # Nothing that was drafted from is drafted again, but a prefix cache must find its prompts.
    assert len({part["salt"] for part in parts}) == 4
    arguments.engine = {"enable_prefix_caching": True}
    assert len({part["salt"] for part in bench.parts_of(prompts, arguments)}) == 2


def test_answers_are_gathered(bench):
    part = {"temperature": 0.0, "batch": 1, "steps": 3}
    answers = [
        part
        | {"round": number, "prompts": [i], "token_ids": [[i, 1, 2, 3, 4]], "seconds": seconds, "cached": number * 7}
        for number, times in enumerate([(1.0, 2.0), (0.5, 3.0)])
        for i, seconds in enumerate(times)
    ]
    (found,) = bench.gathered(answers, [{}, {}], 2)
    assert found["token_ids"] == [[0, 1, 2, 3, 4], [1, 1, 2, 3, 4]]
    assert (found["taus"], found["seconds"]) == ([2.0, 2.0], [0.5, 2.0])
    (row,) = bench.rows_of("8", [found], [])
    assert (row["tau, last round"], row["cached tokens, last round"]) == (2.0, 14)
    slow = found | {"seconds": [2.0, 4.0]}
    assert bench.speed_up(found, slow)[0] == 2.4 and bench.speed_up(found, found) == (1.0, 0.0)


@pytest.mark.e2e
@pytest.mark.slow
def test_the_bundled_pair(bench, tmp_path):
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    arguments = ["--target", str(TINY / "target"), "--head", str(TINY / "draft"), "--max-tokens", "12"]
    arguments += ["--prompts", str(tmp_path / "prompts.jsonl"), "--max-model-len", "256", "--batch", "1", "2"]
    arguments += ["--methods", "none", "8", "--temperatures", "0", "0.7", "--output", str(tmp_path / "out")]
    assert bench.main([*arguments, "--interleave"]) == 0
    rows = json.loads((tmp_path / "out.json").read_text())["rows"]
    assert len(rows) == 8
    for row in rows:
        assert ("its error" in row) == (row["method"] == "8") and row["speed-up"] > 0
        if row["method"] == "8":
            assert row["identical"] == "2 of 2"
            assert row["tau"] is None if row["batch"] == 2 else row["tau"] > 1.2
        elif row["batch"] == 1:
            assert row["tau"] == 1.0
