# SPDX-License-Identifier: Apache-2.0
"""The GPU report: one page, whatever its steps do; what passed is not repeated."""

import importlib
import json
import sys

import pytest


@pytest.fixture
def bench():
    return importlib.import_module("gpu_report")


def test_a_page_whatever_the_steps_do(bench, tmp_path, monkeypatch):
    """One that passes, one that fails, one that hangs, one without its package; then only what did not pass."""

    def python(code: str) -> list[str]:
        return [sys.executable, "-c", code]

    count = f"import pathlib; p = pathlib.Path({str(tmp_path / 'count')!r}); p.open('a').write('x'); print('fine')"
    steps = [
        bench.Step("good", "it runs", python(count), "torch"),
        bench.Step("bad", "it fails", python("raise SystemExit('no | such kernel')"), "torch"),
        bench.Step("slow", "it hangs", python("import time; time.sleep(60)"), "torch"),
        bench.Step("missing", "it cannot run", python(""), "no_such_package"),
    ]
    monkeypatch.setattr(bench, "small_steps", lambda output: steps)
    arguments = ["--device", "cpu", "--small", "--limit", "5", "--output", str(tmp_path / "out")]
    assert bench.main(arguments) == 1
    page = (tmp_path / "out" / "gpu_report.md").read_text()
    rows = {row["step"]: row for row in json.loads((tmp_path / "out" / "gpu_report.json").read_text())["rows"]}
    assert [row["result"] for row in rows.values()] == [
        "passed",
        "failed, exit status 1",
        "stopped after 5 s",
        "not run: no_such_package is not installed",
    ]
    assert rows["good"]["last line"] == "fine" and "no | such kernel" in page
    assert bench.main([*arguments, "--only", "good", "bad"]) == 1
    assert (tmp_path / "count").read_text() == "x"


@pytest.mark.slow
def test_without_a_gpu(bench, tmp_path):
    arguments = ["--device", "cpu", "--small", "--output", str(tmp_path)]
    assert bench.main([*arguments, "--only", "kernels", "kernel times"]) == 0
    assert (tmp_path / "kernels-cpu-small.md").exists()


def test_a_cpu_is_not_reported_as_a_gpu(bench, tmp_path):
    for wrong in ([], ["--device", "cpu"], ["--device", "cpu", "--small", "--only", "kernel"]):
        with pytest.raises(SystemExit):
            bench.main([*wrong, "--output", str(tmp_path)])
