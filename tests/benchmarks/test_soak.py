# SPDX-License-Identifier: Apache-2.0
"""The soak in short: it finds nothing wrong with kvspec, and a planted defect at once."""

import importlib
import json
import sys

import pytest

# Its round 0 is offline with trees, eight requests at once and a KV pool that cannot hold them; its round 2 over HTTP
# with chains, as many nodes in every step.
POOL = ["--seed", "49", "--requests", "60", "--round-seconds", "300"]
PLANTED = """
import sys
sys.path[:0] = [{benchmarks!r}]
import soak_worker
from vllm_kvspec.engine import ops
# The accepted path stays where the tree was.
ops.kv_compact = lambda *args: None
soak_worker.main()
"""


@pytest.fixture
def soak():
    return importlib.import_module("soak")


@pytest.fixture(scope="module")
def work(tmp_path_factory) -> str:
    """Plain decoding's answers, for both tests."""
    return str(tmp_path_factory.mktemp("work"))


def sample(**changes) -> dict:
    whole = {"token_ids": [5, 6, 7], "text": "abc", "finish_reason": "length", "logprobs": [{"5": -0.1, "8": -2.0}] * 3}
    return {**whole, **changes}


@pytest.mark.parametrize(
    ("found", "whole", "what"),
    [
        ({}, True, None),
        ({"token_ids": [5, 6], "text": "ab", "finish_reason": None}, False, None),
        ({"token_ids": [], "text": ""}, False, None),
        ({"logprobs": None}, True, None),
        ({"token_ids": [5, 9, 7]}, True, "token"),
        ({"token_ids": [5, 9]}, False, "token"),
        ({"token_ids": [5, 6]}, True, "length"),
        ({"token_ids": [5, 6, 7, 8]}, False, "length"),
        ({"text": "abd"}, True, "text"),
        ({"text": "b"}, False, "text"),
        ({"finish_reason": "stop"}, True, "finish_reason"),
        ({"logprobs": [{"5": -0.1, "8": -2.0}, {"5": -0.2, "8": -2.0}, {}]}, True, "logprobs"),
    ],
)
def test_comparison(soak, found, whole, what):
    difference = importlib.import_module("soak_requests").first_difference(sample(**found), sample(), whole)
    assert (difference and difference["what"]) == what
    if what in ("token", "logprobs"):
        assert difference["position"] == 1


def test_what_is_drawn_follows_from_the_seed(soak):
    requests = importlib.import_module("soak_requests")
    text = list(range(1000))
    drawn = requests.draw_requests(3, 400, text)
    assert drawn == requests.draw_requests(3, 400, text) != requests.draw_requests(4, 400, text)
    assert all(len(one["prompt"]) + one["params"]["max_tokens"] <= requests.MAX_MODEL_LEN for one in drawn)
    arguments = soak.parse_arguments([])
    rounds = [soak.draw_round(arguments, number) for number in range(15)]
    assert rounds == [soak.draw_round(arguments, number) for number in range(15)]
    assert len({(one.http, one.drafter) for one in rounds}) == 10


@pytest.mark.e2e
@pytest.mark.slow
def test_nothing_differs_and_a_planted_defect_does(soak, work, tmp_path, monkeypatch, capsys):
    """Offline with a tiny pool of KV, then the same without compaction; the record goes on."""
    common = [*POOL, "--round-requests", "80", "--rounds", "1", "--work", work, "--output", str(tmp_path / "soak")]
    assert soak.main(common) == 0
    (row,) = json.loads((tmp_path / "soak.json").read_text())["rows"]
    assert row["served"] == "offline" and row["problem"] is None
    assert row["tokens"] > 500 and row["aborts"] > 0 and row["preemptions"] > 0 and row["tau"] > 1.2
    planted = tmp_path / "planted.py"
    planted.write_text(PLANTED.format(benchmarks=str(soak.HERE)))
    monkeypatch.setattr(soak, "WORKER", [sys.executable, str(planted)])
    assert soak.main(common) == 1
    rows = json.loads((tmp_path / "soak.json").read_text())["rows"]
    assert rows[0] == row and rows[1]["differences"] > 0 and [one["round"] for one in rows] == [0, 1]
    details = json.loads((tmp_path / "soak-differences.json").read_text())
    # Enough to run it again, and clear of rounding.
    assert {"request", "drafter", "options", "round", "position", "found", "expected"} <= details[0].keys()
    assert max(one["gap"] for one in details if "gap" in one) > 0.1
    assert "1 rounds so far" in capsys.readouterr().out
    # A record of other requests is not gone on with.
    with pytest.raises(SystemExit, match="name another --output"):
        soak.main([*common, "--requests", "61"])


@pytest.mark.e2e
@pytest.mark.slow
def test_a_killed_engine_over_http(soak, work, tmp_path, capsys):
    """Clients are told, the server ends and is started again, nothing hangs. One round alone minds no record."""
    (tmp_path / "soak.json").write_text(json.dumps({"conditions": {"seed": 3}, "rows": []}))
    common = [*POOL, "--round-requests", "40", "--work", work, "--output", str(tmp_path / "soak")]
    assert soak.main([*common, "--round", "2"]) == 0
    out = capsys.readouterr().out
    row = json.loads(out[out.index("{\n") :])
    assert row["kills"] == row["restarts"] == 1 and row["clients told"] > 0
    assert row["tokens"] > 100 and row["problem"] is None
