# SPDX-License-Identifier: Apache-2.0
"""Training from the target's states on disk: the same losses, whatever interrupted the writing, and no mix-ups."""

import shutil

import pytest
import torch
from transformers import Qwen3ForCausalLM

from vllm_kvspec.config import KVSpecDraftConfig
from vllm_kvspec.models.draft_head import KVSpecDraftModel, head_config_for
from vllm_kvspec.models.target import checkpoint_sha256, load_ends, weights_sha256
from vllm_kvspec.train import run, target_cache, trainer
from vllm_kvspec.train.data import collate, load_rows
from vllm_kvspec.train.target_cache import TargetCache, record_sizes, torch_writer
from vllm_kvspec.train.trainer import LossSettings, head_loss

HEADS = {
    "kv": {"context": "kv", "num_hidden_layers": 2},
    "hybrid": {"context": "hybrid", "target_kv_layer_ids": [1]},
    "hidden": {"context": "hidden", "drafting": "autoregressive"},
    "gated": {"context": "hybrid", "fusion": "gated"},
}


@pytest.fixture(scope="module")
def target(target_dir):
    return Qwen3ForCausalLM.from_pretrained(target_dir).eval().requires_grad_(False)


@pytest.fixture
def rows(rows_file):
    return load_rows([str(rows_file)], 4)


@pytest.fixture
def small_shards(monkeypatch):
    """Shards of a few rows."""
    monkeypatch.setattr(target_cache, "SHARD_BYTES", 20_000)


def make_cache(directory, rows, config, target) -> TargetCache:
    return TargetCache(directory, rows, config, target.dtype, weights_sha256(target))


def make_head(target, **fields):
    torch.manual_seed(1)
    fields = {"num_hidden_layers": 1, "draft_block_size": 4, "transition_rank": 4, **fields}
    head = KVSpecDraftModel(head_config_for(target.config, **fields))
    for layer in head.layers:
        for parameter in layer.parameters():
            torch.nn.init.normal_(parameter, std=0.3)
    return head


def loss_of(head, target, batch) -> float:
    torch.manual_seed(2)
    return head_loss(head, head.config, target, batch, LossSettings(8, 4.0)).item()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", HEADS)
def test_cached_and_fresh_states_give_the_same_loss(target, rows, tmp_path, name, dtype):
    target = Qwen3ForCausalLM.from_pretrained(target.name_or_path, dtype=dtype).eval()
    head = make_head(target, **HEADS[name]).to(dtype)
    cache = make_cache(tmp_path / "cache", rows, head.config, target)
    cache.fill(torch_writer(target, head.config))
    for chosen in ([0, 7, 3], [12], range(18)):
        fresh = loss_of(head, target, collate([rows[i] for i in chosen]))
        cached = loss_of(head, target, collate([cache[i] for i in chosen]))
        # Float16 holds 11 bits. In bfloat16 sums depend on how rows are batched.
        assert cached == pytest.approx(fresh, rel=3e-4 if dtype == torch.float32 else 3e-3)
    other = loss_of(head, target, collate([cache[i] | {"records": cache[i]["records"].flip(0)} for i in range(18)]))
    assert other != pytest.approx(fresh, rel=4e-3), "the records do not matter"


def test_a_run_with_a_cache_has_the_losses_of_one_without_and_never_runs_the_target(run_train, tmp_path, monkeypatch):
    flags = "--num_layers 2 --draft_vocab_size 9"
    fresh = run_train(tmp_path / "fresh", flags)
    monkeypatch.setattr(trainer, "view_target", lambda *args: pytest.fail("the target ran in a step"))
    cached = run_train(tmp_path / "cached", f"{flags} --cache_dir {tmp_path / 'cache'}")
    assert fresh["target_cache"] is None
    # Two layers of 2 heads of 16, keys and values, and 32 hidden values.
    assert cached["target_cache"]["bytes_per_token"] == 2 * (2 * 2 * 2 * 16 + 32)
    size = sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.bin"))
    assert cached["target_cache"]["bytes"] == size
    losses = [[entry["loss"] for entry in record["loss_history"]] for record in (cached, fresh)]
    assert losses[0] == pytest.approx(losses[1], rel=2e-3) and len(losses[0]) == 6
    # A second head over the same rows finds everything there, and the target's layers are not even loaded.
    monkeypatch.setattr(run, "load_target", lambda *args: pytest.fail("the whole target"))
    again = run_train(tmp_path / "again", f"{flags} --cache_dir {tmp_path / 'cache'}")
    assert [entry["loss"] for entry in again["loss_history"]] == losses[0]
    assert again["memory"] != cached["memory"]


def test_a_target_without_its_layers(target):
    ends = load_ends(target.name_or_path, torch.float32, "cpu")
    assert not ends.base_model.layers and ends.config.to_dict() == target.config.to_dict()
    names = [name for name, _ in target.named_parameters() if "layers" not in name]
    assert [name for name, _ in ends.named_parameters()] == names and len(names) == 2
    assert all(ends.get_parameter(name).equal(target.get_parameter(name)) for name in names)


def test_weights_are_told_apart_without_loading_them(target, tmp_path):
    for name, change in (("same", 0.0), ("other", 1e-3)):
        moved = Qwen3ForCausalLM.from_pretrained(target.name_or_path)
        moved.base_model.layers[1].mlp.up_proj.weight.data += change
        moved.save_pretrained(tmp_path / name)
    digests = [checkpoint_sha256(str(path)) for path in (target.name_or_path, tmp_path / "same", tmp_path / "other")]
    assert digests[0] == digests[1] != digests[2]
    with pytest.raises(ValueError, match="must hold the target's weights"):
        checkpoint_sha256(str(tmp_path))


def test_an_interrupted_cache_goes_on_with_the_next_shard(target, rows, tmp_path, small_shards, monkeypatch):
    config = make_head(target).config
    whole, stopped = (make_cache(tmp_path / name, rows, config, target) for name in ("whole", "stopped"))
    write = torch_writer(target, config)
    whole.fill(write)
    assert len(whole.shards) > 3 and whole.shards[0][0] == 0 and whole.shards[-1][1] == len(rows)
    view_target, calls = target_cache.view_target, []

    def interrupted(*args):
        calls.append(args)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return view_target(*args)

    monkeypatch.setattr(target_cache, "view_target", interrupted)
    with pytest.raises(KeyboardInterrupt):
        stopped.fill(write)
    done = {path.name: path.stat().st_mtime_ns for path in stopped.directory.glob("*.bin")}
    assert 0 < len(done) < len(stopped.shards)
    make_cache(stopped.directory, rows, config, target).fill(torch_writer(target, config))
    assert done.items() <= {path.name: path.stat().st_mtime_ns for path in stopped.directory.glob("*.bin")}.items()
    assert not list(stopped.directory.glob("*.partial"))
    for i in range(len(rows)):
        assert whole[i]["records"].equal(stopped[i]["records"])
        assert len(whole[i]["records"]) == len(rows[i]["input_ids"])


def test_processes_share_the_work(target, rows, tmp_path, small_shards):
    config = make_head(target).config
    cache, write = make_cache(tmp_path / "cache", rows, config, target), torch_writer(target, config)
    cache.fill(write, 1, 2)
    assert [path.name for path in sorted(cache.directory.iterdir())][:2] == ["shard-00001.bin", "shard-00003.bin"]
    cache.fill(write, 0, 2)
    assert len(list(cache.directory.glob("*.bin"))) == len(cache.shards)
    assert cache[0]["records"].any()


def test_states_of_something_else_are_refused(target, rows, tmp_path):
    config = make_head(target).config
    directory = tmp_path / "cache"
    make_cache(directory, rows, config, target).fill(torch_writer(target, config))
    with pytest.raises(ValueError, match=r"made with target_kv_layer_ids \[2\] \(now \[0\]\). Name another"):
        make_cache(directory, rows, make_head(target, target_kv_layer_ids=[0]).config, target)
    with pytest.raises(ValueError, match="made with rows_sha256"):
        make_cache(directory, rows.select(range(9)), config, target)
    other = Qwen3ForCausalLM(target.config)
    with pytest.raises(ValueError, match="made with target_weights_sha256"):
        make_cache(directory, rows, config, other)
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="found other files"):
        make_cache(tmp_path, rows, config, target)


def test_a_full_disk_is_seen_before_the_first_shard(target, rows, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda path: shutil._ntuple_diskusage(10, 9, 1))
    cache = make_cache(tmp_path / "cache", rows, make_head(target).config, target)
    with pytest.raises(ValueError, match=r"needs [0-9,]+ bytes more \(192 a token\), found 1 free"):
        cache.fill(None)


@pytest.mark.parametrize(
    ("shape", "layers", "size"),
    [({"num_key_value_heads": 3, "head_dim": 64, "hidden_size": 576}, 2, 2688),
     ({"num_key_value_heads": 8, "head_dim": 128, "hidden_size": 4096}, 3, 20480)],
    ids=["SmolLM2-135M", "Qwen3-8B"],
)  # fmt: skip
def test_the_stated_bytes_per_token(shape, layers, size):
    assert 2 * sum(record_sizes(KVSpecDraftConfig(num_hidden_layers=layers, **shape))) == size
    assert f"{size:,}" in target_cache.__doc__
