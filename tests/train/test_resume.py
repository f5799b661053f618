# SPDX-License-Identifier: Apache-2.0
"""An interrupted run ends as if it had not been interrupted, whatever state its last checkpoint was left in."""

import json
import shutil

import pytest
from safetensors.torch import load_file
from torch.testing import assert_close

from vllm_kvspec.train.checkpoints import missing_parts
from vllm_kvspec.train.trainer import KVSpecTrainer

PARTS = ("config.json", "model.safetensors", "optimizer.pt", "rng_state.pth", "scheduler.pt", "trainer_state.json")


@pytest.fixture
def interrupt_at(monkeypatch):
    """``interrupt_at(n)``: the n-th loss of the next run is answered by Ctrl-C; ``interrupt_at(None)`` ends that."""
    compute_loss = KVSpecTrainer.compute_loss

    def arm(count):
        calls = iter(range(1, 10**6))

        def interrupted(self, *args, **kwargs):
            if next(calls) == count:
                raise KeyboardInterrupt
            return compute_loss(self, *args, **kwargs)

        monkeypatch.setattr(KVSpecTrainer, "compute_loss", interrupted)

    return arm


def assert_same_run(head, other):
    """Losses and weights, bit for bit."""
    losses, other_losses = (json.loads((x / "training.json").read_text())["loss_history"] for x in (head, other))
    assert losses == other_losses and losses[-1]["step"] == 6
    weights, other_weights = (load_file(x / "model.safetensors") for x in (head, other))
    assert_close(weights, other_weights, atol=0, rtol=0)


@pytest.mark.parametrize(
    ("at", "flags"),
    [
        (4, ""),
        # Step 5 is the last of an epoch.
        (6, "--save_steps 5"),
        # Two losses a step: in the fourth step.
        (7, "--gradient_accumulation_steps 2"),
        # The checkpoint stands between two logged losses.
        (4, "--logging_steps 3"),
    ],
)
def test_resuming_gives_the_losses_of_not_stopping(run_train, interrupt_at, tmp_path, at, flags):
    whole, stopped = tmp_path / "whole", tmp_path / "stopped"
    run_train(whole, flags)
    interrupt_at(at)
    with pytest.raises(KeyboardInterrupt):
        run_train(stopped, flags)
    assert not stopped.exists() and any(stopped.with_name("stopped.checkpoints").glob("checkpoint-*"))
    interrupt_at(None)
    run_train(stopped, flags)
    assert_same_run(stopped, whole)


def test_a_half_written_checkpoint_is_skipped_with_a_warning(finished_head, run_train, tmp_path, caplog):
    stopped = tmp_path / "stopped"
    checkpoints = tmp_path / "stopped.checkpoints"
    shutil.copytree(f"{finished_head}.checkpoints", checkpoints)
    (checkpoints / "checkpoint-6" / "trainer_state.json").unlink()
    optimizer = checkpoints / "checkpoint-4" / "optimizer.pt"
    optimizer.write_bytes(optimizer.read_bytes()[:-100])
    run_train(stopped)
    skipped = [r.getMessage() for r in caplog.records if "is not complete" in r.getMessage()]
    assert len(skipped) == 2 and "checkpoint-6 is not complete (trainer_state.json)" in skipped[0]
    assert any("Going on from" in r.getMessage() and "checkpoint-2" in r.getMessage() for r in caplog.records)
    assert_same_run(stopped, finished_head)


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("how", ["absent", "cut off"])
def test_every_part_of_a_checkpoint_is_needed(finished_head, part, how):
    checkpoint = finished_head.with_name("head.checkpoints") / "checkpoint-6"
    assert missing_parts(checkpoint, world_size=1) == []
    whole = (checkpoint / part).read_bytes()
    (checkpoint / part).unlink()
    if how == "cut off":
        (checkpoint / part).write_bytes(whole[: len(whole) // 2])
    assert missing_parts(checkpoint, world_size=1) == [part]


def test_every_rank_needs_its_random_state(finished_head):
    checkpoint = finished_head.with_name("head.checkpoints") / "checkpoint-6"
    (checkpoint / "rng_state.pth").rename(checkpoint / "rng_state_0.pth")
    assert missing_parts(checkpoint, world_size=2) == ["rng_state_1.pth"]


def test_other_settings_do_not_go_on_from_these_checkpoints(finished_head, run_train, tmp_path):
    shutil.rmtree(finished_head)
    with pytest.raises(ValueError, match=r"has checkpoints of a run with learning_rate 0.01 \(now 0.02\)"):
        run_train(finished_head, "--learning_rate 2e-2")
    with pytest.raises(ValueError, match="--no_resume must have no checkpoints"):
        run_train(finished_head, "--no_resume")
    assert not finished_head.exists()
    # Where to save and log may change; what is learned stays the same, so the run is only finished.
    run_train(finished_head, "--save_steps 1")
