# SPDX-License-Identifier: Apache-2.0
"""What brings SmolLM2, prompts and training chats here, without a network: archives are made in the test."""

import gzip
import importlib
import io
import json
import subprocess
import sys
import tarfile
import zipfile
from collections import Counter
from pathlib import Path

import pytest

from vllm_kvspec.train.data import load_texts

EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "smollm2"
ROWS = {
    "code": {"prompt": "def one():\n"},
    "writing": {"query": "写一首诗。", "domain1": "Poetry"},
    "tool": {"question": [[{"role": "user", "content": "Buy milk."}]], "function": [{"name": "buy"}, {"name": "sell"}]},
    "multi_turn": {
        "question": [[{"role": "user", "content": "List files."}], [], [{"role": "user", "content": "Go."}]]
    },
    "long_output": {"prompt": "Write 3000 words.", "length": 3000},
}
REQUEST = """\
You can call these functions:
{"name": "buy"}
{"name": "sell"}
Answer this request with function calls:
Buy milk."""
TURNS = {
    "code": ["def one():\n"],
    "writing": ["写一首诗。"],
    "tool": [REQUEST],
    "multi_turn": ["List files.", "Go."],
    "long_output": ["Write 3000 words."],
}


@pytest.fixture(autouse=True)
def example_scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(EXAMPLE))


@pytest.fixture
def archives():
    return importlib.import_module("archives")


@pytest.fixture
def downloads(archives, tmp_path, monkeypatch):
    """A folder with an archive of every prompt package, two rows each; pip must not be called."""
    prompts = importlib.import_module("prompts")
    members: dict[str, dict[str, bytes]] = {}
    for source in prompts.SOURCES:
        data = (json.dumps(ROWS[source.category]) + "\n").encode() * 2
        data = gzip.compress(data) if source.member.endswith(".gz") else data
        # A package's answers may have the same file name in another folder.
        members.setdefault(source.package.filename, {}).update(
            {f"top/{source.member}": data, f"top/answers/{Path(source.member).name}": b"{}"}
        )
    folder = tmp_path / "downloads"
    folder.mkdir()
    sources = []
    for filename, files in members.items():
        with zipfile.ZipFile(folder / filename, "w") as archive:
            for name, content in files.items():
                archive.writestr(name, content)
    for source in prompts.SOURCES:
        digest = archives.sha256(folder / source.package.filename)
        package = archives.Package(source.package.requirement, source.package.filename, digest)
        sources.append(prompts.Source(source.category, package, source.member, source.turns))
    monkeypatch.setattr(prompts, "SOURCES", tuple(sources))
    monkeypatch.setattr(subprocess, "run", lambda *args, **kwargs: pytest.fail("pip was called"))
    return folder


def run_prompts(output: Path, *flags: str, monkeypatch) -> list[dict]:
    prompts = importlib.import_module("prompts")
    monkeypatch.setattr(sys, "argv", ["prompts.py", str(output), *flags])
    prompts.main()
    return [json.loads(line) for line in output.read_text().splitlines()]


def test_prompts_of_all_packages_become_spec_bench_rows(downloads, tmp_path, monkeypatch):
    output = tmp_path / "prompts.jsonl"
    rows = run_prompts(output, "--downloads", str(downloads), monkeypatch=monkeypatch)
    assert [row["question_id"] for row in rows] == list(range(10))
    assert Counter(row["category"] for row in rows) == dict.fromkeys(TURNS, 2)
    assert all(row["turns"] == TURNS[row["category"]] for row in rows)
    texts = load_texts([str(output)])
    said = [[m["content"] for m in messages if m["role"] == "user"] for messages in texts["messages"]]
    assert said == [row["turns"] for row in rows]
    english = run_prompts(
        output, "--downloads", str(downloads), "--english", "--per_category", "1", monkeypatch=monkeypatch
    )
    assert [row["category"] for row in english] == ["code", "tool", "multi_turn", "long_output"]
    short = run_prompts(output, "--downloads", str(downloads), "--max_characters", "12", monkeypatch=monkeypatch)
    assert {row["category"] for row in short} == {"code", "writing"}
    rest = run_prompts(output, "--downloads", str(downloads), "--min_characters", "13", monkeypatch=monkeypatch)
    assert len(short) + len(rest) == len(rows) and len(rest) > 0


def test_an_archive_is_taken_only_with_its_checksum(archives, tmp_path, monkeypatch):
    package = archives.Package("thing==1", "thing-1.tar.gz", "")
    path, calls = tmp_path / package.filename, []

    def pip(command, check):
        calls.append(command)
        assert not path.exists()
        with tarfile.open(path, "w:gz") as archive:
            info = tarfile.TarInfo("thing-1/data/rows.jsonl")
            info.size = 3
            archive.addfile(info, io.BytesIO(b"{}\n"))

    monkeypatch.setattr(subprocess, "run", pip)
    path.write_bytes(b"cut off")
    with pytest.raises(ValueError, match=r"thing-1.tar.gz must have the sha256 , found [0-9a-f]{64}; delete"):
        archives.download(package, tmp_path)
    assert len(calls) == 1 and "thing==1" in calls[0] and "--no-deps" in calls[0]
    package = archives.Package("thing==1", path.name, archives.sha256(path))
    assert archives.download(package, tmp_path) == path and len(calls) == 1
    assert archives.read_member(path, "data/rows.jsonl") == b"{}\n"
    with pytest.raises(ValueError, match="must hold one other.jsonl, found"):
        archives.read_member(path, "other.jsonl")


def test_a_target_is_made_once_and_never_over_other_files(tmp_path, monkeypatch):
    make_target = importlib.import_module("make_target")
    calls = []

    def convert(source, output):
        calls.append([path.name for path in source.iterdir()])
        output.mkdir()
        (output / "model.safetensors").write_text("weights")

    def interrupted(source, output):
        convert(source, output)
        raise KeyboardInterrupt

    members = {make_target.GGUF_NAME: b"gguf", "LICENSE": b"Apache"}
    monkeypatch.setattr(make_target.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(make_target, "download", lambda package, directory: directory.mkdir(exist_ok=True))
    monkeypatch.setattr(make_target, "read_member", lambda wheel, name: members[name])
    monkeypatch.setattr(make_target, "convert", interrupted)
    target = tmp_path / "target"
    with pytest.raises(KeyboardInterrupt):
        make_target.make_target(target)
    assert not target.exists()
    monkeypatch.setattr(make_target, "convert", convert)
    assert make_target.make_target(target) and not make_target.make_target(target)
    assert calls == [[make_target.GGUF_NAME]] * 2 and [path.name for path in tmp_path.iterdir()] == ["target"]
    assert (target / "LICENSE").read_bytes() == b"Apache" and (target / "model.safetensors").is_file()
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="found other files"):
        make_target.make_target(tmp_path)


def test_gguf_is_asked_for_before_anything_is_downloaded(tmp_path, monkeypatch):
    make_target = importlib.import_module("make_target")
    monkeypatch.setattr(make_target.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="pip install gguf"):
        make_target.make_target(tmp_path / "target")
    assert not any(tmp_path.iterdir())


def test_training_chats_are_many_different_and_the_same_every_time():
    chats = importlib.import_module("chats")
    found = list(chats.chats(6000))
    assert len({turns[0] for turns in found}) == len(found) == 6000
    assert found[:50] == list(chats.chats(50)) != list(chats.chats(50, seed=1))
    assert 0.08 < sum(len(turns) > 1 for turns in found) / len(found) < 0.16
    # Nothing of the templates is left over, and no kind of question is missing.
    assert not [turns for turns in found if "{t}" in turns[0] or "{q}" in turns[0] or not turns[0].strip()]
    rng = chats.random.Random(0)
    assert all(len({kind(rng) for _ in range(40)}) > 25 for kind in chats.KINDS)


def test_more_chats_than_the_lists_hold_are_refused(monkeypatch):
    chats = importlib.import_module("chats")
    monkeypatch.setattr(chats, "KINDS", {chats.review: 1})
    with pytest.raises(ValueError, match="must give 200 different chats, found 72"):
        list(chats.chats(200))


def test_a_chat_is_read_as_turns_that_wait_for_answers(tmp_path):
    chats = importlib.import_module("chats")
    path = tmp_path / "chats.jsonl"
    path.write_text(json.dumps(chats.as_row(["Hello.", "Why?"])) + "\n")
    (row,) = load_texts([str(path)])
    assert [message["content"] for message in row["messages"]] == ["Hello.", "", "Why?", ""]
