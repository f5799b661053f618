# SPDX-License-Identifier: Apache-2.0
"""Small Gemma 4 targets of each kind, with random weights and the bundled target's tokenizer, and their assistants."""

import json
import shutil
from pathlib import Path

import torch
from architectures import CASES
from engine_runner import TARGET
from safetensors.torch import load_file, save_file
from torch.nn.functional import cross_entropy
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    Gemma4AssistantConfig,
    Gemma4AssistantForCausalLM,
    Gemma4Config,
    Gemma4ForConditionalGeneration,
)

KINDS = {case.kind: case for case in CASES if case.model_type == "gemma4_text"}
MAX_POSITION = 512
# Drafted tokens of each position of a text, in training.
UNROLLED = 4


def write_target(kind: str, directory: Path, **fields) -> str:
    """A target of six layers: twice two of sliding attention and one of full attention."""
    torch.manual_seed(0)
    vocab_size = AutoConfig.from_pretrained(TARGET).vocab_size
    shape = dict(
        vocab_size=vocab_size, max_position_embeddings=MAX_POSITION, num_hidden_layers=6,
        layer_types=["sliding_attention", "sliding_attention", "full_attention"] * 2,
    )  # fmt: skip
    if kind == "small":
        shape |= dict(vocab_size_per_layer_input=vocab_size, num_kv_shared_layers=3)
    config = AutoConfig.for_model("gemma4_text", **KINDS[kind].config | shape | fields)
    save(AutoModelForCausalLM.from_config(config), directory)
    return _with_tokenizer(directory)


def _with_tokenizer(directory: Path) -> str:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(TARGET) / name, directory)
    return str(directory)


def quantise(target: str, directory: Path) -> str:
    """A target with the linear layers of its blocks in int8, a scale per output, activations scaled by row; the
    embedding and the LM head stay as they are, as in most published checkpoints."""
    shutil.copytree(target, directory)
    tensors = load_file(directory / "model.safetensors")
    for name in [name for name in tensors if name.endswith("_proj.weight")]:
        scale = tensors[name].abs().amax(1, keepdim=True) / 127
        tensors |= {name: (tensors[name] / scale).round().to(torch.int8), f"{name}_scale": scale}
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    kind = {"num_bits": 8, "type": "int", "symmetric": True}
    groups = {
        "group_0": {
            "targets": ["Linear"],
            "weights": kind | {"strategy": "channel", "dynamic": False},
            "input_activations": kind | {"strategy": "token", "dynamic": True},
        }
    }
    how = {"quant_method": "compressed-tensors", "format": "int-quantized", "ignore": ["lm_head"]}
    config = json.loads((directory / "config.json").read_text())
    config["quantization_config"] = how | {"config_groups": groups, "quantization_status": "compressed"}
    (directory / "config.json").write_text(json.dumps(config))
    return str(directory)


def write_with_images(kind: str, target: str, directory: Path) -> str:
    """A target as the text model of one that takes images; those of the larger kinds see each other both ways."""
    text = AutoModelForCausalLM.from_pretrained(target)
    both_ways = {} if kind == "small" else {"use_bidirectional_attention": "vision"}
    vision = dict(
        hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2, num_key_value_heads=2,
        head_dim=16, position_embedding_size=64,
    )  # fmt: skip
    config = Gemma4Config(text_config=text.config.to_dict() | both_ways, vision_config=vision, audio_config=None)
    model = Gemma4ForConditionalGeneration(config)
    model.model.language_model.load_state_dict(text.model.state_dict())
    model.save_pretrained(directory)
    return _with_tokenizer(directory)


def write_assistant(target: str, directory: Path, *, ordered: bool = False, **fields) -> str:
    """An assistant of four layers, half as wide as its target. ``ordered``: it scores clusters of the vocabulary."""
    torch.manual_seed(1)
    config = AutoConfig.from_pretrained(target)
    full = config.per_layer_config[config.num_hidden_layers - 1]
    text = dict(
        vocab_size=config.vocab_size, hidden_size=32, intermediate_size=48, num_hidden_layers=4,
        layer_types=["sliding_attention"] * 3 + ["full_attention"], sliding_window=config.sliding_window,
        num_attention_heads=4, num_key_value_heads=config.per_layer_config[0].num_key_value_heads,
        num_global_key_value_heads=full.num_key_value_heads, attention_k_eq_v=config.attention_k_eq_v,
        head_dim=config.per_layer_config[0].head_dim, global_head_dim=full.head_dim,
        max_position_embeddings=MAX_POSITION, initializer_range=0.1,
        hidden_size_per_layer_input=0, vocab_size_per_layer_input=0, num_kv_shared_layers=4,
    )  # fmt: skip
    config = Gemma4AssistantConfig(
        text_config=text | fields, backbone_hidden_size=config.hidden_size, use_ordered_embeddings=ordered,
        num_centroids=64, centroid_intermediate_top_k=4,
    )  # fmt: skip
    save(Gemma4AssistantForCausalLM(config), directory)
    return str(directory)


def teach(target_dir: str, assistant_dir: str, texts: list[list[int]], steps: int) -> None:
    """Train an assistant, in place, on what its target says about ``texts`` (token ids).

    As it is served: at every position a row that sees the keys before, then more from its own state, at the same place.
    """
    torch.manual_seed(2)
    target = AutoModelForCausalLM.from_pretrained(target_dir, dtype=torch.float32).eval()
    assistant = Gemma4AssistantForCausalLM.from_pretrained(assistant_dir, dtype=torch.float32)
    optimizer = torch.optim.AdamW(assistant.parameters(), lr=5e-3)
    length = min(map(len, texts))
    for step in range(steps):
        loss = _loss(target, assistant, torch.tensor([texts[step % len(texts)][-length:]]))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assistant.save_pretrained(assistant_dir)


def _loss(target, assistant, ids: torch.Tensor) -> torch.Tensor:
    """Cross entropy of the assistant's first ``UNROLLED`` tokens against the target's choices."""
    with torch.no_grad():
        seen = target.model(ids, use_cache=False, return_shared_kv_states=True)
        logits = target(ids).logits
        embeds = target.get_input_embeddings()(ids)
    # Row i drafts for the anchor at position i + 1: it stands at i, and sees the keys up to there.
    rows = ids.shape[1] - UNROLLED
    place, key = torch.arange(rows)[:, None], torch.arange(ids.shape[1])
    window = target.config.sliding_window
    masks = {"full_attention": key <= place, "sliding_attention": (key <= place) & (place - key < window)}
    state, loss = seen.last_hidden_state[:, :rows], 0.0
    for step in range(UNROLLED):
        inputs = torch.cat((embeds[:, 1 + step : 1 + step + rows], state), dim=-1)
        hidden = assistant.model(
            inputs_embeds=assistant.pre_projection(inputs),
            attention_mask={kind: mask[None, None] for kind, mask in masks.items()},
            position_ids=torch.arange(rows)[None],
            shared_kv_states=seen.shared_kv_states,
            use_cache=False,
        ).last_hidden_state
        state = assistant.post_projection(hidden)
        wanted = logits[:, 1 + step : 1 + step + rows].argmax(-1)
        loss = loss + cross_entropy(assistant.lm_head(hidden).flatten(0, 1), wanted.flatten()) / UNROLLED
    return loss


@torch.no_grad()
def save(model, directory: Path) -> None:
    """With norms and factors that are not what they begin as, and the vocabulary's clusters in some order.

    Attention is softer than it begins: sharp, it would make much of the last digits.
    """
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter.add_(0.2 * torch.randn_like(parameter))
        if "q_norm" in name:
            parameter.mul_(0.2)
    for name, buffer in model.named_buffers():
        if "layer_scalar" in name:
            buffer.fill_(0.7)
        if "token_ordering" in name:
            buffer.copy_(torch.randperm(len(buffer)))
    model.save_pretrained(directory)
