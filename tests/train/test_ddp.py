# SPDX-License-Identifier: Apache-2.0
"""Two processes train one head (torchrun, gloo, CPU)."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from vllm_kvspec.train.checkpoints import missing_parts

FLAGS = "--max_steps 4 --gradient_accumulation_steps 2 --per_device_train_batch_size 2 --save_steps 2"


def torchrun(*words):
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done


@pytest.fixture(scope="module", params=["table", "tied"])
def run(request, toy_flags, tmp_path_factory):
    """(output directory, what each rank saw) of one run with a reduced vocabulary, whose tables are buffers."""
    path = tmp_path_factory.mktemp("ddp")
    flags = (
        f"{toy_flags} {FLAGS} --transition {request.param} --draft_vocab_size 9 --output_dir {path / 'head'}".split()
    )
    torchrun(str(Path(__file__).with_name("ddp_probe.py")), str(path), "train", *flags)
    return path / "head", [torch.load(path / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_ranks_end_with_equal_parameters_that_learned(run):
    output, (first, second) = run
    assert first["parameters"].keys() == second["parameters"].keys()
    for name, parameter in first["parameters"].items():
        assert parameter.equal(second["parameters"][name]), name
    # It starts at zero.
    last = next(name for name in ("transition_out.weight", "transition_hidden.weight") if name in first["parameters"])
    assert first["parameters"][last].any()
    record = json.loads((output / "training.json").read_text())
    losses = [entry["loss"] for entry in record["loss_history"]]
    assert len(losses) == 4 and all(map(math.isfinite, losses))
    # Every step is of other rows, and four are few: the loss falls within them with the table only.
    assert record["settings"]["transition"] == "tied" or losses[-1] < losses[0]


def test_ranks_draw_other_rows_and_other_anchors(run):
    _, (first, second) = run
    # 18 rows, 2 ranks, batches of 2: five batches an epoch, the last of which is an update of its own.
    assert len(first["random_states"]) == len(second["random_states"]) == 5 + 2
    for a, b in zip(first["random_states"], second["random_states"], strict=True):
        assert not a.equal(b)
    rows = [{tuple(row.tolist()) for batch in rank["tokens"][:4] for row in batch} for rank in (first, second)]
    # An epoch of 18 rows is divided: in its first 16 no row comes twice.
    assert not rows[0] & rows[1]


def test_only_the_first_rank_writes_the_head(run):
    output, (first, second) = run
    assert second["written"] == [] and len(first["written"]) == 3
    assert json.loads((output / "training.json").read_text())["settings"]["world_size"] == 2
    assert sorted(path.name for path in output.parent.iterdir() if path.is_dir()) == ["head", "head.checkpoints"]
    assert missing_parts(output.with_name("head.checkpoints") / "checkpoint-4", world_size=2) == []
