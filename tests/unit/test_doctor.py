# SPDX-License-Identifier: Apache-2.0
"""The doctor: nothing to complain about here, and one failed line with an advice for each thing that can be wrong."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_kvspec import doctor
from vllm_kvspec.cli import main
from vllm_kvspec.engine.hooks import compat, patches
from vllm_kvspec.models.create import write_untrained_head

TINY = Path(__file__).resolve().parents[2] / "examples/tiny"
TARGET, HEAD = str(TINY / "target"), str(TINY / "draft")


def failed(*models: str) -> dict[str, doctor.Finding]:
    return {finding.name: finding for finding in doctor.findings(*models) if finding.ok is False}


def test_the_shipped_pair_is_healthy(capsys):
    main(["doctor", "--target_model", TARGET, "--draft_model", HEAD])
    out = capsys.readouterr().out
    assert "vLLM accepts the pair" in out and "FAILED" not in out and "left out" not in out
    assert "grafted" in out


def test_a_target_without_a_head(capsys):
    main(["doctor", "--target_model", TARGET])
    out = capsys.readouterr().out
    assert "vLLM accepts the target" in out and "recycle" in out and "FAILED" not in out


def test_a_head_of_another_target(tmp_path, capsys):
    from transformers import AutoConfig, AutoTokenizer

    AutoTokenizer.from_pretrained(TARGET).save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(TARGET)
    config.num_key_value_heads = 4
    config.save_pretrained(tmp_path)
    with pytest.raises(SystemExit) as exit_:
        main(["doctor", "--target_model", str(tmp_path), "--draft_model", HEAD])
    assert exit_.value.code == 1
    assert "head fits target: use the head that was trained for this target" in capsys.readouterr().out
    found = failed(str(tmp_path), HEAD)
    assert set(found) == {"head fits target", "vLLM accepts the pair"}
    assert "num_key_value_heads 2" in found["head fits target"].found


def test_a_head_that_cannot_be_served(tmp_path):
    write_untrained_head(
        TARGET, str(tmp_path), context="hidden", num_hidden_layers=1, aux_hidden_state_layer_ids=[1, 4, 7]
    )
    found = failed(TARGET, str(tmp_path))
    assert set(found) == {"vLLM accepts the pair"}
    assert "not served" in found["vLLM accepts the pair"].found


def test_a_damaged_head(tmp_path):
    head = shutil.copytree(HEAD, tmp_path / "head")
    weights = head / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])
    found = failed(None, str(head))
    assert set(found) == {"head"} and "copy or train it again" in found["head"].do


def test_a_target_that_is_not_there(tmp_path):
    assert set(failed(str(tmp_path / "nothing"))) == {"target", "vLLM accepts the target"}


@pytest.mark.parametrize(
    ("name", "break_it", "words"),
    [
        ("plugin's entry point", lambda m: m.setenv("VLLM_PLUGINS", "lora_resolver"), "leaves kvspec out"),
        ("plugin's entry point", lambda m: m.setattr(doctor, "entry_points", lambda group: []), "no plugin kvspec"),
        ("vLLM in the supported range", lambda m: m.setattr("vllm.__version__", "0.40.0"), "found 0.40.0"),
        (
            "vLLM's names that are overridden",
            lambda m: m.setattr("vllm.v1.worker.gpu.sample.gumbel.gumbel_sample", lambda logits: logits),
            "gumbel_sample has no parameter expanded_idx_mapping",
        ),
    ],
    ids=["plugins-variable", "not-installed", "version", "renamed"],
)
def test_a_broken_installation(monkeypatch, name, break_it, words):
    break_it(monkeypatch)
    try:
        finding = failed()[name]
    finally:
        monkeypatch.undo()
        # A version that does not fit leaves kvspec refused in this process.
        patches.accept_kvspec()
    assert words in finding.found and finding.do
    assert compat.version_problem() is None


def test_without_vllm():
    """As on a machine that only trains: a None in sys.modules is how Python says that a module cannot be imported."""
    code = (
        "import sys; sys.modules['vllm'] = None\n"
        "from vllm_kvspec.doctor import findings\n"
        f"for f in findings({TARGET!r}, {HEAD!r}): print(f.name, f.ok, f.found, sep='|')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found = {name: (ok, words) for name, ok, words in (line.split("|") for line in done.stdout.splitlines())}
    assert found["vLLM"] == ("False", "not installed: nothing can be served; training and eval work")
    assert found["vLLM accepts the pair"] == ("None", "needs vLLM")
    assert found["head fits target"][0] == "True"
