# SPDX-License-Identifier: Apache-2.0
"""The checkpoint's configuration and the fingerprint that ties a head to its target."""

import json
import subprocess
import sys

import pytest
from transformers import AutoConfig, LlamaConfig, Qwen3Config

from vllm_kvspec.config import (
    EAGLE3_SHAPE,
    SPECULATORS_KEYS,
    KVSpecDraftConfig,
    check_fingerprint,
    target_fingerprint,
    unsupported_attention,
)
from vllm_kvspec.models.draft_head import evenly_spaced, head_config_for, readable_layers


class FakeTokenizer:
    def __init__(self, vocab, added=()):
        self.vocab, self.added = vocab, dict(added)

    def get_vocab(self):
        return self.vocab

    def get_added_vocab(self):
        return self.added


@pytest.fixture
def target_config():
    return Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=100, rope_parameters={"rope_type": "default", "rope_theta": 5000.0},
    )  # fmt: skip


def test_round_trip_keeps_every_field_and_writes_the_speculators_keys(tmp_path, target_config):
    config = head_config_for(target_config, FakeTokenizer({"a": 0}), num_hidden_layers=2, draft_block_size=5)
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert set(SPECULATORS_KEYS) <= set(written)
    assert written["speculators_config"]["proposal_methods"][0]["speculative_tokens"] == 10
    assert written["transformer_layer_config"]["head_dim"] == 16
    AutoConfig.register("kvspec", KVSpecDraftConfig, exist_ok=True)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, KVSpecDraftConfig)
    assert loaded.to_dict() == config.to_dict() | {"_name_or_path": str(tmp_path)}
    assert (loaded.draft_block_size, loaded.target_kv_layer_ids) == (5, [2, 5])
    assert loaded.target == config.target
    assert loaded.architectures == ["KVSpecDraftModel"]


def test_head_takes_its_shapes_from_the_target(target_config):
    config = head_config_for(target_config)
    assert (config.hidden_size, config.head_dim, config.num_key_value_heads) == (32, 16, 2)
    assert config.rope_parameters["rope_theta"] == 5000.0
    assert evenly_spaced(range(36), 3) == [11, 23, 35]
    assert evenly_spaced(range(8), 1) == [7]
    assert evenly_spaced([4, 9], 3) == [4, 4, 9]


EAGLE3 = EAGLE3_SHAPE | {"context": "hidden", "fusion": "eagle3", "aux_hidden_state_layer_ids": [0]}


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"context": "hidden"}, "must name target layers"),
        ({"context": "hidden", "aux_hidden_state_layer_ids": [0], "target_kv_layer_ids": [0]}, "must be empty"),
        ({"context": "kv", "fusion": "gated"}, "fusion with context"),
        ({"fusion": "gated", "aux_hidden_state_layer_ids": [0]}, "must have 1 layer"),
        (EAGLE3 | {"num_hidden_layers": 2}, "must have num_hidden_layers 1, as EAGLE-3; got num_hidden_layers 2"),
        (EAGLE3 | {"drafting": "block", "qk_norm": True}, "must have drafting 'autoregressive', qk_norm False"),
        (EAGLE3 | {"target": {"num_hidden_layers": 2}, "aux_hidden_state_layer_ids": [0, 1]}, "before the last layer"),
        (EAGLE3 | {"rope_parameters": {"rope_type": "dynamic"}}, "must be of a type in .* got 'dynamic'"),
        ({"context": "kv", "fusion": "eagle3"}, "fusion with context 'kv'"),
        ({"drafting": "both"}, "drafting must be one of"),
        ({"transition_rank": -1}, "transition_rank"),
        ({"draft_vocab_size": 257}, "draft_vocab_size"),
        ({"context": "both"}, "must be one of"),
        ({"draft_block_size": 0}, "draft_block_size"),
        ({"num_hidden_layers": 3, "target_kv_layer_ids": [1, 2]}, "one target layer per head layer"),
        ({"target_kv_layer_ids": [1, 8], "target": {"num_hidden_layers": 8}}, "must be layers of the target"),
        ({"attention_bias": True}, "attention_bias"),
        ({"greedy_scale": 0.0}, "greedy_scale"),
        ({"coupled_scale": -1.0}, "coupled_scale"),
    ],
)
def test_impossible_heads_are_refused(fields, words):
    with pytest.raises(ValueError, match=words):
        KVSpecDraftConfig(**fields)


def test_fingerprint_of_a_config_without_optional_fields():
    class Minimal:
        num_hidden_layers, num_attention_heads, hidden_size, vocab_size, rope_theta = 2, 4, 64, 10, 10000.0

    found = target_fingerprint(Minimal(), None)
    assert (found["head_dim"], found["num_key_value_heads"]) == (16, 4)
    assert found["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    llama = LlamaConfig(hidden_size=64, num_attention_heads=4, num_hidden_layers=2, vocab_size=10)
    assert target_fingerprint(llama, None)["rope_parameters"]["rope_theta"] == 10000.0


@pytest.mark.parametrize(
    ("model_type", "reason"),
    [
        ("bloom", "ALiBi positions"),
        ("opt", "no rotary positions in its configuration"),
    ],
)
def test_targets_that_no_head_fits(model_type, reason):
    config = AutoConfig.for_model(model_type)
    assert unsupported_attention(config) == reason
    with pytest.raises(ValueError, match=f"{model_type} has {reason}"):
        head_config_for(config)


@pytest.mark.parametrize(
    "model_type",
    [
        "llama",
        "qwen3",
        "phi3",
        "gpt_neox",
        "smollm3",
        "cohere2",
        "olmo2",
        "glm4_moe",
        "gemma2",
        "gpt_oss",
        "gemma3_text",
        "olmo3",
        "gemma4_text",
    ],  # fmt: skip
)
def test_targets_that_heads_fit(model_type):
    assert unsupported_attention(AutoConfig.for_model(model_type)) is None


def test_targets_whose_layers_have_heads_of_two_shapes():
    fields = dict(num_hidden_layers=12, num_key_value_heads=4, head_dim=16, global_head_dim=32)
    dense = AutoConfig.for_model("gemma4_text", **fields, attention_k_eq_v=True, num_global_key_value_heads=2)
    # Every sixth layer has full attention.
    assert readable_layers(dense) == [5, 11]
    head = head_config_for(dense, num_hidden_layers=3)
    assert (head.target_kv_layer_ids, head.head_dim, head.num_key_value_heads) == ([5, 5, 11], 32, 2)
    sliding = head_config_for(dense, num_hidden_layers=2, target_kv_layer_ids=[0, 10])
    assert (sliding.head_dim, sliding.num_key_value_heads) == (16, 4)
    assert head.target["head_dim"] == [16] * 5 + [32] + [16] * 5 + [32]
    with pytest.raises(ValueError, match=r"heads of one size; found \[4, 5\]. Choose among \[5, 11\]"):
        head_config_for(dense, num_hidden_layers=2, target_kv_layer_ids=[4, 5])


def test_layers_that_share_a_cache_are_not_read():
    small = AutoConfig.for_model("gemma4_text", num_hidden_layers=12, num_kv_shared_layers=5)
    assert readable_layers(small) == [5]
    with pytest.raises(ValueError, match=r"keys of their own.*found \[11\]"):
        head_config_for(small, num_hidden_layers=1, target_kv_layer_ids=[11])
    other = target_fingerprint(AutoConfig.for_model("gemma4_text", num_hidden_layers=12), None)
    with pytest.raises(ValueError, match="num_kv_shared_layers"):
        check_fingerprint(head_config_for(small), other)


def test_rotary_bases_that_differ_by_layer():
    config = AutoConfig.for_model("granite_swa", num_hidden_layers=2)
    assert unsupported_attention(config) is None
    config.layer_rope_theta = [10000.0, 0]
    assert unsupported_attention(config) == "rotary positions listed layer by layer"


def test_check_accepts_the_same_target_elsewhere(target_config):
    tokenizer = FakeTokenizer({"a": 0, "b": 1}, {"b": 1})
    config = head_config_for(target_config, tokenizer)
    found = target_fingerprint(target_config, FakeTokenizer({"b": 1, "a": 0}, {"b": 1}))
    check_fingerprint(config, found | {"name_or_path": "/elsewhere", "architectures": ["Other"]})
    check_fingerprint(config, found | {"tokenizer_sha256": None})


@pytest.mark.parametrize("key", ["num_hidden_layers", "head_dim", "vocab_size", "rope_parameters", "tokenizer_sha256"])
def test_check_refuses_another_target_naming_both_sides(target_config, key):
    config = head_config_for(target_config, FakeTokenizer({"a": 0}))
    found = dict(config.target, name_or_path="other-model")
    found[key] = {"rope_parameters": {"rope_type": "default", "rope_theta": 1.0}}.get(key, 7)
    with pytest.raises(ValueError, match="use a head trained for this target") as error:
        check_fingerprint(config, found)
    assert f"{key} {config.target[key]}" in str(error.value)
    assert f"{key} {found[key]}" in str(error.value)
    assert "other-model" in str(error.value)


def test_the_package_itself_is_light():
    code = "import sys, vllm_kvspec; assert not {'torch', 'vllm', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True)
