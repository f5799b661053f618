# SPDX-License-Identifier: Apache-2.0
"""The speculative config: every door it comes in by, its defaults, and one clear sentence for everything refused."""

import dataclasses
import json
import pickle
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_runner import HEAD, TARGET
from transformers import AutoConfig
from vllm.config import SpeculativeConfig
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.utils.argparse_utils import FlexibleArgumentParser
from vllm.v1.attention.backends.flash_attn import FlashAttentionBackend
from vllm.v1.attention.backends.registry import AttentionBackendEnum

from vllm_kvspec.engine.config.keys import HONOURED, REFUSED, KVSpecConfig, base_defaults
from vllm_kvspec.engine.config.refusals import CPU_WORKER
from vllm_kvspec.engine.config.selection import select_attention_backend
from vllm_kvspec.models.create import write_untrained_head

SYNTHETIC = {"rejection_sample_method": "synthetic"}
SINCE_0_33 = {
    "disable_lookahead_block_hashes",
    "draft_lm_head_quantization",
    "fly_entropy_threshold",
    "fly_entropy_top_k",
    "fly_window_size",
    "xpress_topc",
}
# Values that are no defaults, where the default does not suggest one.
OTHER_VALUES = {
    "attention_backend": "FLASH_ATTN",
    "draft_lm_head_quantization": "fp8",
    "draft_model_config": {},
    "draft_parallel_config": {},
    "draft_sample_method": "probabilistic",
    "enforce_eager": False,
    "index_share_for_mtp_iteration": True,
    "kv_cache_dtype": "fp8",
    "moe_backend": "triton",
    "quantization": "fp8",
}


def configure(spec: dict | None, **arguments):
    return EngineArgs(
        model=TARGET, dtype="float32", max_model_len=256, speculative_config=spec, **arguments
    ).create_engine_config()


def kvspec(**keys) -> dict:
    return {"method": "kvspec", "model": HEAD, **keys}


def refusal(spec: dict, **arguments) -> str:
    with pytest.raises(ValueError) as error:
        configure(spec, **arguments)
    return str(error.value)


def test_defaults():
    config = configure(kvspec()).speculative_config
    assert isinstance(config, KVSpecConfig)
    assert (config.tree, config.draft_noise, config.drafter, config.tree_width) == ("auto", "coupled", "head", 4)
    assert config.graft is True
    assert config.num_speculative_tokens == 2 * config.draft_model_config.hf_config.draft_block_size


@pytest.mark.parametrize("spec", [{"method": "kvspec"}, {"method": "kvspec", "drafter": "recycle", "model": None}])
def test_without_a_head(spec):
    config = configure(spec).speculative_config
    assert (config.drafter, config.head_config, config.num_speculative_tokens) == ("recycle", None, 16)
    assert config.auto_sizes == [0, 2, 4, 8, 16]
    assert pickle.loads(pickle.dumps(config)).drafter == "recycle"


@pytest.mark.parametrize(
    ("keys", "graft"),
    [
        ({"tree": "chain", "num_speculative_tokens": 4}, True),
        ({"tree_width": 8}, True),
        ({"graft": False}, False),
        ({"tree": [2, 1]}, False),
        ({"tree_width": 9}, False),
        ({"drafter": "random"}, False),
        ({"model": None}, False),
    ],
    ids=str,
)
def test_grafts_wherever_they_can_be(keys, graft):
    assert configure(kvspec(**keys)).speculative_config.graft is graft


@pytest.mark.parametrize(
    "command",
    [
        ["--speculative-config", json.dumps(kvspec(num_speculative_tokens=7))],
        ["-sc", json.dumps(kvspec(num_speculative_tokens=7))],
        ["--spec-method", "kvspec", "--spec-model", HEAD, "--spec-tokens", "7"],
        [
            "--speculative-config.method",
            "kvspec",
            "--speculative-config.model",
            HEAD,
            "--speculative-config.num-speculative-tokens",
            "7",
        ],
    ],
    ids=["json", "alias", "short-flags", "dotted"],
)
def test_flags(command):
    parser = EngineArgs.add_cli_args(FlexibleArgumentParser())
    arguments = parser.parse_args(["--model", TARGET, "--dtype", "float32", "--max-model-len", "256", *command])
    config = EngineArgs.from_cli_args(arguments).create_engine_config()
    assert config.speculative_config.method == "kvspec"
    assert config.speculative_config.num_speculative_tokens == 7
    assert config.parallel_config.worker_cls == CPU_WORKER


@pytest.mark.parametrize(
    ("tree", "parents"),
    [([2, 1], [0, 0, 1, 2]), ([0, 0, 1], [0, 0, 1]), ("chain", None), ("auto", None)],
)
def test_tree_shapes(tree, parents):
    config = configure(kvspec(tree=tree, num_speculative_tokens=len(parents) if parents else 4)).speculative_config
    assert config.parents == parents


def test_synthetic_rates_are_by_depth():
    config = configure(kvspec(**SYNTHETIC, synthetic_acceptance_rates=[0.9, 0.5], num_speculative_tokens=16))
    assert config.speculative_config.synthetic_acceptance_rates == [0.9, 0.5, *[0.0] * 14]


def test_repr_is_one_line():
    text = repr(configure(kvspec(num_speculative_tokens=5)).speculative_config)
    assert "num_speculative_tokens=5" in text
    assert len(text) < 300


@pytest.mark.parametrize(
    ("keys", "parts"),
    [
        ({"num_speculative_tokens": 64}, ["1 to 63", "found 64"]),
        ({"num_speculative_tokens": 0}, ["num_speculative_tokens", "greater than 0"]),
        ({"kvspec_tree": 1}, ["kvspec_tree", "Unexpected keyword"]),
        ({"tree": "bushy"}, ["tree must be", "bushy"]),
        ({"tree": [0, 2]}, ["parent of node 2", "got 2"]),
        ({"tree": [2, 2], "num_speculative_tokens": 5}, ["has 6 nodes", "num_speculative_tokens is 5"]),
        ({"tree": "chain", "num_speculative_tokens": 30}, ["30 deep", "head"]),
        ({"tree_width": 0}, ["tree_width", "found 0"]),
        ({"tree_width": 1, "num_speculative_tokens": 40}, ["more than the", "tree_width"]),
        ({"draft_noise": "loud"}, ["draft_noise", "coupled"]),
        ({"drafter": "oracle"}, ["oracle_file"]),
        ({"rejection_sample_method": "block"}, ["rejection_sample_method", "'block'"]),
        ({"synthetic_acceptance_length": 2.0}, ["rejection_sample_method='synthetic'"]),
        ({**SYNTHETIC, "synthetic_acceptance_length": 9.5}, ["the tree's depth, 8", "at most 9", "found 9.5"]),
        ({**SYNTHETIC, "synthetic_acceptance_rates": [0.5] * 9}, ["must be 0 beyond the tree's depth, 8"]),
        ({"draft_tensor_parallel_size": 3}, ["draft_tensor_parallel_size must be 1", "found 3"]),
        ({"model": "/no/such/head"}, ["draft head", "/no/such/head"]),
        ({"model": None, "drafter": "head"}, ["needs a draft head", "found none"]),
        ({"drafter": "recycle"}, ["uses no head", HEAD]),
        ({"model": None, "tree": [2, 1]}, ["fixed shape, width or depth needs a head", "[2, 1]"]),
        ({"model": None, "tree_width": 2}, ["fixed shape, width or depth needs a head", "tree_width 2"]),
        ({"model": None, "tree_depth": 2}, ["fixed shape, width or depth needs a head", "tree_depth 2"]),
        ({"model": None, "num_speculative_tokens": 64}, ["1 to 63", "found 64"]),
        ({"model": None, "graft": True}, ["graft needs a head", "found none"]),
        ({"graft": True, "tree": [2, 1]}, ["graft needs", "[2, 1]"]),
        ({"graft": True, "tree_width": 9}, ["at most 8", "tree_width 9"]),
        ({"graft": True, "drafter": "random"}, ["graft needs drafter", "'random'"]),
        ({"recycle_scope": "all"}, ["recycle_scope", "salt"]),
        ({"model": TARGET}, ["must be a draft head", "qwen3"]),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else "",
)
def test_refused_keys(keys, parts):
    message = refusal(kvspec(**keys))
    for part in parts:
        assert part in message


def test_as_json_text():
    assert configure(json.dumps(kvspec(num_speculative_tokens=7))).speculative_config.num_speculative_tokens == 7
    for text in ("{", "[8]"):
        assert "must be a dict or a JSON object" in refusal(text)


def test_a_head_needs_no_method(tmp_path):
    """Its config.json says what it is. Anything else stays vLLM's business."""
    config = configure({"model": HEAD, "num_speculative_tokens": 7}).speculative_config
    assert (config.method, config.num_speculative_tokens) == ("kvspec", 7)
    assert EngineArgs(model=TARGET, spec_model=HEAD).create_engine_config().speculative_config.method == "kvspec"
    assert "kvspec" not in refusal({"model": str(tmp_path / "nothing"), "num_speculative_tokens": 2})


def test_a_head_is_served_by_its_name(tmp_path, monkeypatch):
    """``vllm serve HEAD``: the target is the one that lies beside the head."""
    monkeypatch.chdir(tmp_path)
    config = EngineArgs(model=HEAD, dtype="float32", max_model_len=256).create_engine_config()
    assert Path(config.model_config.model) == Path(TARGET)
    assert config.speculative_config.method == "kvspec"
    assert Path(config.speculative_config.model) == Path(HEAD)


def test_a_target_named_by_a_relative_path_is_found(tmp_path, monkeypatch):
    """As ``train --target_model ./models/target --output_dir heads/one`` names it, from there and from elsewhere; and
    by its whole path, which vLLM 0.33 alone would refuse."""
    for source, place in ((TARGET, "run/models/target"), (HEAD, "run/heads/one")):
        shutil.copytree(source, tmp_path / place)
    file, target = tmp_path / "run/heads/one/config.json", tmp_path / "run/models/target"
    written = json.loads(file.read_text())
    for name, place, head in (
        ("./models/target", "run", "heads/one"),
        ("./models/target", "", "run/heads/one"),
        (str(target), "", str(file.parent)),
    ):
        written["speculators_config"]["verifier"]["name_or_path"] = name
        file.write_text(json.dumps(written))
        monkeypatch.chdir(tmp_path / place)
        asked = {"tree": "chain"}
        arguments = EngineArgs(model=head, dtype="float32", max_model_len=256, speculative_config=asked)
        config = arguments.create_engine_config()
        assert Path(config.model_config.model).samefile(target)
        assert Path(config.speculative_config.model).samefile(file.parent)
        assert config.speculative_config.tree == "chain"
    written["speculators_config"]["verifier"]["name_or_path"] = ""
    file.write_text(json.dumps(written))
    with pytest.raises(ValueError, match="must name its target"):
        EngineArgs(model=head).create_engine_config()


def test_an_attention_that_no_head_fits_is_refused_before_anything_is_loaded(tmp_path):
    target = Path(shutil.copytree(TARGET, tmp_path / "target", ignore=shutil.ignore_patterns("*.safetensors")))
    shape = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2, "vocab_size": 4096, "alibi": True}
    AutoConfig.for_model("falcon", **shape, architectures=["FalconForCausalLM"]).save_pretrained(target)
    with pytest.raises(ValueError, match="has ALiBi positions"):
        EngineArgs(model=str(target), dtype="float32", speculative_config=kvspec()).create_engine_config()


def test_pooling_is_refused():
    assert "--runner pooling" in refusal(kvspec(), runner="pooling")


def test_every_key_of_vllm_is_honoured_or_refused():
    """Fails when vLLM adds a key: read what it does with it, and put it into one of the two tables."""
    keys = set(base_defaults())
    assert not HONOURED & set(REFUSED)
    assert keys - HONOURED - set(REFUSED) == set()
    assert (HONOURED | set(REFUSED)) - keys - SINCE_0_33 == set()


@pytest.mark.parametrize("key", REFUSED)
def test_refused_unless_default(key):
    if key not in base_defaults():
        pytest.skip(reason="this vLLM does not have the key")
    default = base_defaults()[key]
    message = refusal(kvspec(**{key: OTHER_VALUES[key] if key in OTHER_VALUES else (default or 0) + 1}))
    assert f"kvspec does not support {key!r}" in message
    assert "Leave the key out" in message
    assert configure(kvspec(**{key: default})).speculative_config.method == "kvspec"


def test_a_key_that_a_later_vllm_adds_is_refused(monkeypatch):
    defaults = base_defaults()
    monkeypatch.setattr("vllm_kvspec.engine.config.keys.base_defaults", lambda: {**defaults, "tree_width": 7})
    assert "does not support 'tree_width'" in refusal(kvspec())


def test_load_config_of_the_head(monkeypatch):
    """The head is loaded as ``draft_load_config`` says; without one get_model takes the target's."""
    from vllm_kvspec.engine.draft import speculator

    seen = []

    def get_model(load_config, **_):
        seen.append(load_config)
        raise InterruptedError

    monkeypatch.setattr(speculator, "get_model", get_model)
    for keys in ({}, {"draft_load_config": {"load_format": "dummy"}}):
        loading = object.__new__(speculator.KVSpecSpeculator)
        loading.vllm_config = configure(kvspec(**keys))
        loading.draft_model_config = loading.vllm_config.speculative_config.draft_model_config
        with pytest.raises(InterruptedError):
            loading.load_draft_model(torch.nn.Module(), set())
    assert seen[0] is None
    assert seen[1].load_format == "dummy"


def test_the_head_does_not_shorten_the_target(tmp_path):
    """0.33 lowers the target's length to the draft's own, unless the draft says that it works at all positions."""
    rope = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 2.0, "original_max_position_embeddings": 256}
    target = Path(shutil.copytree(TARGET, tmp_path / "target"))
    for directory, length in ((target, 512), (copy_head(tmp_path), 64)):
        config = json.loads((directory / "config.json").read_text())
        config |= {"rope_parameters": rope, "max_position_embeddings": length}
        if directory != target:
            config["target"]["rope_parameters"] = rope
        (directory / "config.json").write_text(json.dumps(config))
    arguments = EngineArgs(
        model=str(target), dtype="float32", max_model_len=256, speculative_config=kvspec(model=str(tmp_path / "head"))
    )
    assert arguments.create_engine_config().model_config.max_model_len == 256


def test_scheduling_is_asynchronous(monkeypatch):
    """What vLLM settles before the CPU platform turns it off."""
    platform = type(current_platform)
    original = platform.check_and_update_config.__func__
    settled = []

    def check_and_update_config(cls, vllm_config):
        settled.append(vllm_config.scheduler_config.async_scheduling)
        original(cls, vllm_config)

    monkeypatch.setattr(platform, "check_and_update_config", classmethod(check_and_update_config))
    configure(kvspec())
    assert settled[0] is True


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        ({"pipeline_parallel_size": 2}, "--pipeline-parallel-size; found 2"),
        ({"decode_context_parallel_size": 2, "tensor_parallel_size": 2}, "--decode-context-parallel-size; found 2"),
        ({"kv_cache_dtype": "int8_per_token_head"}, "--kv-cache-dtype; found int8_per_token_head"),
        ({"kv_cache_dtype": "fp8"}, "--kv-cache-dtype; found fp8"),
        ({"kv_offloading_size": 0.25}, "--kv-offloading-size; found 0.25"),
        ({"worker_cls": "some.other.Worker"}, "--worker-cls; found some.other.Worker"),
    ],
)
def test_refused_engine_options(arguments, part):
    assert part in refusal(kvspec(), **arguments)


def test_exclusive_flags():
    with pytest.raises(ValueError, match="mutually exclusive"):
        configure(kvspec(num_speculative_tokens=3), spec_tokens=4)


def test_head_of_another_target(tmp_path):
    """Same architecture, another geometry: both sides are named."""
    other = tmp_path / "other"
    shutil.copytree(TARGET, other)
    config = json.loads((other / "config.json").read_text())
    config["num_key_value_heads"] = 1
    (other / "config.json").write_text(json.dumps(config))
    head = write_untrained_head(str(other), str(tmp_path / "head"))
    message = refusal(kvspec(model=str(head)))
    assert "num_key_value_heads 1" in message
    assert "num_key_value_heads 2" in message
    assert TARGET in message


def copy_head(tmp_path: Path) -> Path:
    return Path(shutil.copytree(HEAD, tmp_path / "head"))


def test_truncated_weights(tmp_path):
    head = copy_head(tmp_path)
    weights = head / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[: weights.stat().st_size // 2])
    message = refusal(kvspec(model=str(head)))
    assert "damaged or cut short" in message
    assert str(weights) in message


def test_missing_weights(tmp_path):
    head = copy_head(tmp_path)
    (head / "model.safetensors").unlink()
    assert "no *.safetensors file" in refusal(kvspec(model=str(head)))


def test_plain_vllm_is_untouched():
    """Another method gets vLLM's own config class, worker and errors, with our plugin loaded."""
    plain = configure(None)
    assert plain.speculative_config is None
    assert "kvspec" not in plain.parallel_config.worker_cls
    ngram = configure({"method": "ngram", "num_speculative_tokens": 3, "prompt_lookup_max": 2})
    assert type(ngram.speculative_config) is SpeculativeConfig
    assert "kvspec" not in ngram.parallel_config.worker_cls
    assert "Input should be 'ngram'" in refusal({"method": "no-such-method", "num_speculative_tokens": 3})


def test_config_survives_pickling():
    """It travels to the engine core and the workers."""
    import pickle

    config = configure(kvspec(tree=[2, 1])).speculative_config
    copy = pickle.loads(pickle.dumps(config))
    assert type(copy) is KVSpecConfig
    assert copy.parents == [0, 0, 1, 2]
    assert {f.name for f in dataclasses.fields(copy)} >= {"tree", "drafter", "num_speculative_tokens"}


class FakeGPU:
    """What `select_attention_backend` asks a CUDA platform."""

    def __init__(self, major: int):
        self.major = major

    def is_cpu(self) -> bool:
        return False

    def get_device_capability(self):
        return self


@pytest.mark.parametrize(
    ("major", "dtype", "asked", "model_type", "stock"),
    [
        (9, torch.bfloat16, None, "gemma4_text", "TRITON_ATTN"),
        (9, torch.bfloat16, None, "qwen3", "FLASH_ATTN"),
        (8, torch.float16, "AUTO", "qwen3", "FLASH_ATTN"),
        (9, torch.float32, None, "qwen3", "TRITON_ATTN"),
        (10, torch.bfloat16, None, "qwen3", "TRITON_ATTN"),
        (9, torch.bfloat16, AttentionBackendEnum.TRITON_ATTN, "qwen3", "TRITON_ATTN"),
        (10, torch.bfloat16, AttentionBackendEnum.FLASH_ATTN, "qwen3", "FLASH_ATTN"),
        (9, torch.bfloat16, None, "gpt_oss", "FLASH_ATTN"),
        (8, torch.bfloat16, None, "gpt_oss", "TRITON_ATTN"),
    ],
)
def test_stock_attention(monkeypatch, major, dtype, asked, model_type, stock):
    """FlashAttention where vLLM would take it, Triton elsewhere; the one asked for; the same when repeated."""
    monkeypatch.setattr("vllm_kvspec.engine.config.selection.current_platform", FakeGPU(major))
    registered = []
    monkeypatch.setattr("vllm_kvspec.engine.config.selection.register_cuda_backend", registered.append)
    arguments = EngineArgs(model=TARGET, attention_backend=asked)
    # vLLM's answer: sinks need FlashAttention 3.
    monkeypatch.setattr(FlashAttentionBackend, "supports_sink", lambda: major >= 9)
    text_config = SimpleNamespace(model_type=model_type)
    head_size = 512 if model_type == "gemma4_text" else 64
    target = SimpleNamespace(dtype=dtype, get_head_size=lambda: head_size, hf_config=None, hf_text_config=text_config)
    monkeypatch.setattr(FlashAttentionBackend, "supports_head_size", lambda size: True)
    for _ in range(2):
        config = SimpleNamespace(target_model_config=target)
        select_attention_backend(arguments, config)
        assert config.stock_attention == stock
        assert arguments.attention_backend is None
        assert arguments.attention_config.backend is AttentionBackendEnum.CUSTOM
    assert registered == [stock, stock]


def test_other_attention_backends_are_refused(monkeypatch):
    monkeypatch.setattr("vllm_kvspec.engine.config.selection.current_platform", FakeGPU(9))
    arguments = EngineArgs(model=TARGET, attention_backend="FLASHINFER")
    with pytest.raises(ValueError, match="FLASH_ATTN or TRITON_ATTN; found --attention-backend FLASHINFER"):
        select_attention_backend(arguments, None)
