# SPDX-License-Identifier: Apache-2.0
"""``vllm-kvspec cache`` with the real engine: what it writes is what training would have computed."""

import json

import pytest
import torch
from engine_runner import TARGET, close, quick_engines
from transformers import AutoModelForCausalLM

from vllm_kvspec.cli import main
from vllm_kvspec.train import run
from vllm_kvspec.train.target_cache import TargetCache, torch_writer

LENGTHS = (300, 17, 64, 5, 129, 40)


@pytest.fixture(scope="module")
def rows(tmp_path_factory):
    """Rows of random tokens, one longer than a step of the engine."""
    path, generator = tmp_path_factory.mktemp("rows") / "rows.jsonl", torch.Generator().manual_seed(0)
    texts = [torch.randint(3, 1000, (length,), generator=generator).tolist() for length in LENGTHS]
    path.write_text(
        "".join(json.dumps({"input_ids": ids, "loss_mask": [0] + [1] * (len(ids) - 1)}) + "\n" for ids in texts)
    )
    return path


def flags(rows, directory) -> list[str]:
    return (
        f"--target_model {TARGET} --data_path {rows} --output_dir {directory / 'head'} --num_layers 2 "
        f"--draft_block_size 4 --transition_rank 4 --max_steps 2 --per_device_train_batch_size 4 --logging_steps 1 "
        f"--use_cpu --disable_tqdm true --cache_dir {directory / 'cache'}"
    ).split()


@pytest.fixture
def cache(rows, tmp_path, monkeypatch):
    """The command; engines are shut down at the end."""
    from vllm import LLM

    engines = []

    class RecordedLLM(LLM):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            engines.append(self)

    monkeypatch.setattr("vllm.LLM", RecordedLLM)

    def fill(directory, **engine_args):
        main(["cache", *flags(rows, directory), "--engine_args", json.dumps(engine_args)])

    with quick_engines():
        yield fill
        for engine in engines:
            close(engine)


def open_cache(directory, rows, write=None) -> TargetCache:
    from vllm_kvspec.train.arguments import parse

    config, _, found = run.load_rows_for(*parse(flags(rows, directory)))
    if write:
        target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
        found.fill(torch_writer(target, config))
    return found


STEPS = {"whole": {}, "chunks": {"enable_chunked_prefill": True, "max_num_batched_tokens": 64, "max_num_seqs": 4}}


@pytest.mark.parametrize("engine_args", STEPS.values(), ids=STEPS)
def test_the_engine_writes_what_transformers_does(cache, rows, tmp_path, engine_args):
    cache(tmp_path / "engine", **engine_args)
    found, expected = open_cache(tmp_path / "engine", rows), open_cache(tmp_path / "torch", rows, write=True)
    assert found.contents == expected.contents and not found.missing
    for i, length in enumerate(LENGTHS):
        ours, theirs = found[i]["records"].float(), expected[i]["records"].float()
        assert len(ours) == length and theirs.abs().amax() > 0.5
        torch.testing.assert_close(ours, theirs, atol=4e-3, rtol=4e-3)


@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_and_training_from_it(cache, rows, tmp_path, monkeypatch):
    cache(tmp_path / "two", tensor_parallel_size=2)
    found, expected = open_cache(tmp_path / "two", rows), open_cache(tmp_path / "torch", rows, write=True)
    for i in range(len(LENGTHS)):
        torch.testing.assert_close(found[i]["records"], expected[i]["records"], atol=4e-3, rtol=4e-3)
    main(["train", *flags(rows, tmp_path / "torch")])
    # The same losses, and the target is not loaded.
    monkeypatch.setattr(run, "load_target", lambda *args: pytest.fail("the whole target"))
    main(["train", *flags(rows, tmp_path / "two")])
    losses = [
        [
            entry["loss"]
            for entry in json.loads((tmp_path / name / "head" / "training.json").read_text())["loss_history"]
        ]
        for name in ("torch", "two")
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-3) and len(losses[0]) == 2


def test_what_cannot_be_recorded(rows, tmp_path):
    for more, engine_args, message in (
        (["--context", "hidden", "--drafting", "autoregressive"], {}, "hidden states after layers"),
        ([], {"pipeline_parallel_size": 2}, "without pipeline parallelism"),
        ([], {"enable_prefix_caching": True}, "sets enable_prefix_caching itself"),
    ):
        with pytest.raises(ValueError, match=message):
            main(["cache", *flags(rows, tmp_path), *more, "--engine_args", json.dumps(engine_args)])
    with pytest.raises(ValueError, match="--cache_dir DIRECTORY"):
        main(["cache", *flags(rows, tmp_path)[:-2]])
