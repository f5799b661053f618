# SPDX-License-Identifier: Apache-2.0
"""The eval and compare commands as a user runs them, on the bundled pair."""

import copy
import json
from pathlib import Path

import pytest

from vllm_kvspec.cli import main
from vllm_kvspec.eval import report as report_module
from vllm_kvspec.eval.compare import load_reports, markdown, parse_panels

ROOT = Path(__file__).resolve().parents[2]
PNG = b"\x89PNG"


@pytest.fixture(scope="module")
def directory(tmp_path_factory) -> Path:
    """Where ``eval`` has measured the bundled head on a few short texts."""
    directory = tmp_path_factory.mktemp("eval")
    data = directory / "texts.jsonl"
    sources = sorted((ROOT / "vllm_kvspec" / "engine").glob("*.py"))
    data.write_text("".join(json.dumps({"text": source.read_text()}) + "\n" for source in sources))
    main([*eval_command(data, directory / "results" / "a.json"), "--plot", str(directory / "plots")])
    return directory


def eval_command(data: Path, output: Path) -> list[str]:
    return (
        ["eval", "--target_model", str(ROOT / "examples/tiny/target"), "--draft_model"]
        + [str(ROOT / "examples/tiny/draft"), "--data_path", str(data), "--num_prompts", "3", "--prompt_length", "24"]
        + ["--max_new_tokens", "28", "--num_nodes", "4", "16", "--no_graft", "--output", str(output)]
    )


@pytest.fixture(scope="module")
def report(directory) -> dict:
    return json.loads((directory / "results" / "a.json").read_text())


def variant(report: dict, tmp_path: Path, file: str, **head) -> Path:
    """The report with other entries in its head, and other acceptance, as another head's report would have."""
    other = copy.deepcopy(report)
    other["conditions"]["head"].update(head)
    for run in other["runs"]:
        run["trees"]["chain"]["tau"] += 1
    path = tmp_path / file
    path.write_text(json.dumps(other))
    return path


def test_report_says_what_was_measured_and_how(directory, report):
    conditions = report["conditions"]
    assert conditions["command"].startswith("vllm-kvspec eval --target_model")
    assert conditions["versions"]["torch"] and conditions["dtype"] == "float32" and conditions["seed"] == 0
    assert conditions["head"]["name"] == "hybrid/block, 3 layers"
    assert conditions["head"]["config"]["draft_block_size"] == 8 and conditions["head"]["parameters"] > 1e6
    assert conditions["target"]["fingerprint"]["hidden_size"] == 192
    modes = [(run["temperature"], run["mode"]) for run in report["runs"]]
    assert modes == [(0, "greedy"), (1, "coupled"), (1, "uncoupled"), (1, "rejection")]
    for run in report["runs"]:
        assert list(run["trees"]) == (["chain"] if run["mode"] == "rejection" else ["chain", "4", "16"])
        assert run["trees"]["chain"]["anchors"] == 3 * (28 - 8)
        assert 1 <= run["trees"]["chain"]["tau"] <= 9
    error = report["bottlenecks"]["attention_query_error"]
    assert len(error["by_layer"]) == 3 and all(0 < value < 1 for layer in error["by_layer"] for value in layer)
    assert 0 < report["bottlenecks"]["gradient_share"]["gradient"] < 1
    assert {path.name for path in (directory / "plots").iterdir()} == {"acceptance.png", "tau.png"}
    assert all(path.read_bytes().startswith(PNG) for path in (directory / "plots").iterdir())
    # One file of texts per temperature beside the report, for the next head.
    assert len(list((directory / "results").glob("texts-*.json"))) == 2


def test_compare_writes_markdown_and_plots(report, tmp_path, capsys):
    paths = [
        variant(report, tmp_path, "a.json", name="kv", seed=0, weights_sha256="a"),
        variant(report, tmp_path, "b.json", name="kv", seed=1, weights_sha256="b"),
        variant(report, tmp_path, "c.json", name="hybrid", seed=None, weights_sha256="c", parameters=7654321),
    ]
    second = json.loads(paths[1].read_text())
    second["runs"][0]["trees"]["chain"]["tau"] += 2
    second["runs"][0]["trees"]["chain"]["conditional"][-1] = None
    paths[1].write_text(json.dumps(second))
    main(["compare", *map(str, paths), "--output", str(tmp_path / "out/heads.md"), "--plot", str(tmp_path / "out")])
    text = (tmp_path / "out" / "heads.md").read_text()
    assert text.strip() in capsys.readouterr().out
    tau, error = (report["runs"][0]["trees"]["chain"][key] for key in ("tau", "tau_se"))
    greedy = text[text.index("### T=0") : text.index("### T=1")]
    rows = {line.split(" | ")[0].strip("| "): line for line in greedy.splitlines() if line.startswith("| ")}
    assert f" {tau + 2:.2f} ± {2**0.5:.2f} " in rows["kv"]
    assert f" {tau + 1:.2f} ({error:.2f}) " in rows["hybrid"]
    assert "| kv | " in text and "2 (0, 1)" in text and "7,654,321" in text
    assert all((tmp_path / "out" / name).read_bytes().startswith(PNG) for name in ("acceptance.png", "tau.png"))
    reports = load_reports(paths)
    assert parse_panels(["KV: alone?: kv", "Both: kv hybrid"], reports) == {
        "KV: alone?": ["kv"],
        "Both": ["kv", "hybrid"],
    }
    for wrong in ("kv", "Both: kv hydrib", "None:"):
        with pytest.raises(ValueError, match="names of heads"):
            parse_panels([wrong], reports)


def change(path: Path, *keys, to) -> Path:
    report = json.loads(path.read_text())
    inner = report
    for key in keys[:-1]:
        inner = inner[key]
    inner[keys[-1]] = to
    path.write_text(json.dumps(report))
    return path


@pytest.mark.parametrize(
    ("keys", "to", "message"),
    [
        (("conditions", "dtype"), "bfloat16", "same dtype"),
        (("conditions", "beam"), 4, "same beam"),
        (("conditions", "target", "weights_sha256"), "f" * 64, "same target"),
        (("runs", 2, "texts_sha256"), "f" * 64, "same texts at T=1, uncoupled"),
        (("runs",), [], "must be a json file that"),
        (("conditions", "head", "weights_sha256"), "a", "given once"),
        (("conditions", "head", "steps"), 77, "seeds of one recipe"),
    ],
)
def test_only_like_with_like(report, tmp_path, keys, to, message):
    first = variant(report, tmp_path, "a.json", name="kv", weights_sha256="a", steps=5)
    second = variant(report, tmp_path, "b.json", name="kv", weights_sha256="b", steps=5)
    assert "| kv | " in markdown(load_reports([first, second]))
    with pytest.raises(ValueError, match=message):
        load_reports([first, change(second, *keys, to=to)])


def test_fewer_runs_are_not_compared_silently(report, tmp_path):
    first = variant(report, tmp_path, "a.json", weights_sha256="a")
    second = variant({**report, "runs": report["runs"][:1]}, tmp_path, "b.json", weights_sha256="b")
    with pytest.raises(ValueError, match="same temperatures and modes"):
        load_reports([first, second])


@pytest.mark.parametrize("graft", [False, True])
def test_drafts_that_depend_on_all_before(directory, report, tmp_path, capsys, graft):
    """The same command without a head, or with grafts: runs through the same texts, each tree size its own."""
    command = eval_command(directory / "texts.jsonl", tmp_path / "report.json")
    at = command.index("--draft_model")
    if graft:
        # As it is served by default.
        command.remove("--no_graft")
    else:
        del command[at : at + 2]
    main([*command, "--temperatures", "0", "--plot", str(tmp_path), "--no_bottlenecks"])
    found = json.loads((tmp_path / "report.json").read_text())
    name = report["conditions"]["head"]["name"] + ", graft" if graft else "no head"
    assert found["conditions"]["head"]["name"] == name and "bottlenecks" not in found
    (run,), trees = found["runs"], found["runs"][0]["trees"]
    assert run["texts_sha256"] == report["runs"][0]["texts_sha256"]
    assert list(trees) == ["chain", "4", "16"] and 1 <= trees["4"]["tau"] <= trees["16"]["tau"]
    assert len(trees["16"]["conditional"]) == 8 and trees["16"]["fresh"] == [None] * 8
    assert list(run["sources"]["16"]) == ["head"] * graft + ["two tokens", "one token", "own text", "guess"]
    for name, sources in run["sources"].items():
        assert sum(sources.values()) == pytest.approx(trees[name]["tau"] - 1, abs=1e-3)
    assert "by where they came from" in " ".join(capsys.readouterr().out.split())


def test_grafts_need_a_head(directory, tmp_path):
    command = eval_command(directory / "texts.jsonl", tmp_path / "report.json")
    at = command.index("--draft_model")
    with pytest.raises(ValueError, match="Grafts need a head"):
        main([*command[:at], *command[at + 2 :], "--graft"])


def test_too_short_texts_are_refused(directory, tmp_path):
    arguments = ["eval", "--target_model", str(ROOT / "examples/tiny/target"), "--draft_model"]
    arguments += [str(ROOT / "examples/tiny/draft"), "--data_path", str(directory / "texts.jsonl")]
    arguments += ["--num_prompts", "2", "--prompt_length", "8", "--max_new_tokens", "8", "--output"]
    with pytest.raises(ValueError, match="longer than the head's block of 8"):
        main([*arguments, str(tmp_path / "report.json")])
    assert not (tmp_path / "report.json").exists()


def test_an_interrupted_measurement_goes_on_with_the_next_run(directory, report, tmp_path, monkeypatch):
    output, evaluate, measured = tmp_path / "report.json", report_module.evaluate, []

    def interrupted(*args, **options):
        measured.append((options["temperature"], options["mode"]))
        if len(measured) == 3:
            raise KeyboardInterrupt
        return evaluate(*args, **options)

    monkeypatch.setattr(report_module, "evaluate", interrupted)
    command = eval_command(directory / "texts.jsonl", output)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    with pytest.raises(ValueError, match="must be finished, found .*report.json interrupted"):
        load_reports([output])
    main(command)
    runs = [(0.0, "greedy"), (1.0, "coupled"), (1.0, "uncoupled"), (1.0, "rejection")]
    assert measured == [*runs[:3], *runs[2:]]
    assert without_command(json.loads(output.read_text())) == without_command(report)
    # All is there now; with other settings nothing is.
    main([*command, "--temperatures", "0"])
    assert len(measured) == 5 and len(json.loads(output.read_text())["runs"]) == 1
    main([*command, "--temperatures", "0", "--no_bottlenecks", "--width", "2"])
    assert len(measured) == 6


def without_command(report: dict) -> dict:
    conditions = {key: value for key, value in report["conditions"].items() if key != "command"}
    return report | {"conditions": conditions}
