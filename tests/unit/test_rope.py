# SPDX-License-Identifier: Apache-2.0
"""Rotary positions as configurations give them, against what the models of transformers do with their keys."""

import copy

import pytest
import torch
from architectures import CASES
from transformers import AutoConfig, AutoModelForCausalLM

from vllm_kvspec.config import KVSpecDraftConfig, check_fingerprint, target_fingerprint
from vllm_kvspec.models.draft_head import KVSpecDraftModel, head_config_for
from vllm_kvspec.models.rotary import rotate
from vllm_kvspec.models.target import head_logits, view_target
from vllm_kvspec.rope import layer_heads, owns_kv, rope_parameters

LENGTH = 40
PER_TYPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
}


def gemma3(**fields):
    shape = dict(
        num_hidden_layers=4, hidden_size=64, head_dim=32, num_attention_heads=2, num_key_value_heads=1,
        layer_types=["sliding_attention", "full_attention"] * 2, rope_parameters=copy.deepcopy(PER_TYPE),
    )  # fmt: skip
    return AutoConfig.for_model("gemma3_text", **shape | fields)


@pytest.mark.parametrize("case", [case for case in CASES if case.is_served], ids=lambda case: case.name)
@torch.no_grad()
def test_a_head_turns_as_each_layer_of_the_target(case):
    """A text of one token repeated: but for their rotation, a layer's keys are all the same. And the logits agree."""
    torch.manual_seed(0)
    target = AutoModelForCausalLM.from_config(AutoConfig.for_model(case.model_type, **case.config)).eval()
    for name, parameter in target.named_parameters():
        # A sink takes more where a row sees less, which would tell the keys of the next layer apart.
        if name.endswith(".sinks"):
            parameter.fill_(-1e4)
    ids = torch.full((1, LENGTH), 7)
    owners = [i for i in range(target.config.num_hidden_layers) if owns_kv(target.config, i)]
    # A head each for the layers with heads of one shape.
    for shape in {layer_heads(target.config, i) for i in owners}:
        layers = [i for i in owners if layer_heads(target.config, i) == shape]
        fields = dict(context="kv", num_hidden_layers=len(layers), target_kv_layer_ids=layers)
        head = KVSpecDraftModel(head_config_for(target.config, **fields))
        view = view_target(target, head.config, ids)
        assert len(view.kv) == len(view.windows) == len(layers)
        for (keys, _), rotary in zip(view.kv, head.rotary_emb(view.hidden, torch.arange(LENGTH)[None]), strict=True):
            first = keys[:, :, :1].expand_as(keys)
            # The scale of YaRN, which the first key has already.
            scale = 1.0 if rotary is None else rotary[0][0, 0, 0]
            turned = rotate(first, rotary, head.config.rope_interleaved) / scale
            torch.testing.assert_close(turned, keys, atol=1e-3 * keys.abs().max().item(), rtol=0)
    torch.testing.assert_close(head_logits(target, view.hidden), target(ids).logits, atol=1e-4, rtol=1e-4)


def test_rope_parameters_have_one_form():
    class Old:
        num_hidden_layers, rope_theta, rope_scaling = 4, 100.0, {"type": "linear", "factor": 2.0, "unused": None}

    class PerType:
        layer_types = ["sliding_attention", "full_attention"]
        # A type without layers, a type without rotary positions, and a key beside the types.
        rope_parameters = {
            "chunked_attention": {"rope_theta": 1.0}, "full_attention": None, "rope_type": "default",
            "sliding_attention": {"rope_theta": 5.0},
        }  # fmt: skip

    assert rope_parameters(Old) == {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}
    assert rope_parameters(PerType) == {"sliding_attention": {"rope_type": "default", "rope_theta": 5.0}}


def test_a_head_and_its_fingerprint_survive_a_round_trip(tmp_path):
    target = gemma3()
    config = head_config_for(target, context="kv", num_hidden_layers=3, target_kv_layer_ids=[0, 1, 3])
    assert [rope["rope_theta"] for rope in config.layer_rope_parameters] == [100.0, 1e6, 1e6]
    config.save_pretrained(tmp_path)
    loaded = KVSpecDraftConfig.from_pretrained(tmp_path)
    assert loaded.layer_rope_parameters == config.layer_rope_parameters
    check_fingerprint(loaded, target_fingerprint(target, None))
    for other in (gemma3(layer_types=["full_attention", "sliding_attention"] * 2), gemma3(sliding_window=4096)):
        other.rope_parameters["full_attention"]["rope_theta"] = 7.0
        with pytest.raises(ValueError, match="rope_parameters"):
            check_fingerprint(loaded, target_fingerprint(other, None))
    with pytest.raises(ValueError, match="layer_types"):
        check_fingerprint(loaded, target_fingerprint(gemma3(layer_types=["full_attention"] * 4), None))


def test_targets_without_layer_types_keep_their_fingerprint():
    config = AutoConfig.for_model("llama", num_hidden_layers=2)
    found = target_fingerprint(config, None)
    assert "layer_types" not in found
    assert found["rope_parameters"] == {"rope_type": "default", "rope_theta": 10000.0}
    assert head_config_for(config, num_hidden_layers=1).layer_rope_parameters is None


@pytest.mark.parametrize("fusion", ["concat", "projection", "projection_rope"])
def test_a_mix_of_layers_reads_one_kind_of_them(fusion):
    fields = dict(context="kv", fusion=fusion, num_hidden_layers=2)
    with pytest.raises(ValueError, match="same rotary positions and window; found .*Name layers of one type"):
        head_config_for(gemma3(), target_kv_layer_ids=[0, 1], **fields)
    config = head_config_for(gemma3(), target_kv_layer_ids=[0, 2], **fields)
    assert [config.layer_rope(i)["rope_theta"] for i in range(2)] == [100.0, 100.0]


def test_a_head_with_a_context_of_its_own_turns_as_full_attention():
    config = head_config_for(gemma3(), context="hidden")
    assert config.layer_rope(0)["rope_theta"] == 1e6


def test_one_entry_per_layer():
    with pytest.raises(ValueError, match="layer_rope_parameters must have one entry per head layer"):
        KVSpecDraftConfig(num_hidden_layers=2, layer_rope_parameters=[None])


@pytest.mark.parametrize("fields", [dict(context="kv"), dict(context="hybrid", drafting="autoregressive")])
@torch.no_grad()
def test_a_row_sees_the_window_of_the_layer_it_reads(fields):
    """A row at position p sees keys within the window of p; the layer's window hides nothing of a block."""
    torch.manual_seed(0)
    window, base, block = 6, 20, 4
    target = AutoModelForCausalLM.from_config(gemma3(sliding_window=window, vocab_size=60)).eval()
    fields = dict(num_hidden_layers=1, target_kv_layer_ids=[0], draft_block_size=block, **fields)
    head = KVSpecDraftModel(head_config_for(target.config, **fields)).eval()
    # It starts at zero, and one row would tell another what it saw.
    torch.nn.init.normal_(head.layers[0].self_attn.o_proj.weight)
    ids = torch.randint(60, (1, 30))
    view = view_target(target, head.config, ids)
    assert view.kv[0][0].shape[2] == 30
    rows = view.embeds[:, None, base : base + (block if "drafting" in fields else 1)]
    out = head(view, torch.tensor([[base]]), rows)
    first_changed = []
    for position in range(base - window - 1, base + 1):
        keys, values = (part.clone() for part in view.kv[0])
        values[:, :, position] += 1
        view.kv[0], kept = (keys, values), view.kv[0]
        changed = (head(view, torch.tensor([[base]]), rows) - out).abs().amax(-1)[0, 0] > 1e-6
        view.kv[0] = kept
        first_changed.append(changed.sum().item())
    if "drafting" in fields:
        # The state fed back carries what the first row saw to the later ones.
        assert [bool(count) for count in first_changed] == [False, False] + [True] * (window - 1) + [False]
    else:
        # One layer: a row passes nothing on. The anchor sees base - 5 .. base - 1, the last row base - 2 and on.
        assert first_changed == [0, 0, 1, 2, 3, 4, 4, 0]
