# SPDX-License-Identifier: Apache-2.0
"""What a head sees of its target, in torch: KV and hidden states of whole sequences, embedding and LM head."""

import copy
import hashlib
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import snapshot_download
from transformers import AutoConfig, AutoModelForCausalLM, DynamicCache, PreTrainedModel
from transformers.utils import logging as transformers_logging

from vllm_kvspec.config import KVSpecDraftConfig
from vllm_kvspec.rope import layer_window


@dataclass
class TargetView:
    """One forward of the target over sequences ``[B, S]``.

    ``kv``: keys (normed, rotated: as in the KV cache) and values ``[B, Hkv, S, D]`` of each of the config's
    ``target_kv_layer_ids``; ``windows``: those layers' sliding windows, 0 for none. ``hidden`` [B, S, H]: last hidden
    states after the final norm. ``embeds`` [B, S, H]: the tokens' embeddings. ``fused`` [B, S, F*H]: hidden states
    after the F ``aux_hidden_state_layer_ids`` side by side, or None.
    """

    kv: list[tuple[torch.Tensor, torch.Tensor]]
    windows: list[int]
    hidden: torch.Tensor
    embeds: torch.Tensor
    fused: torch.Tensor | None = None


@torch.no_grad()
def view_target(target: PreTrainedModel, config: KVSpecDraftConfig, input_ids: torch.Tensor) -> TargetView:
    """Run the target (a causal LM of transformers) over ``input_ids`` [B, S], padded on the right if at all.

    Memory: the KV of all target layers, 2 * layers * Hkv * D values per token, and with auxiliary layers the hidden
    states of all layers.
    """
    aux = config.aux_hidden_state_layer_ids
    # A cache made by the model would keep only what its sliding windows still need at the end of the text.
    out = target.base_model(
        input_ids=input_ids, use_cache=True, past_key_values=DynamicCache(), output_hidden_states=bool(aux)
    )
    layers = out.past_key_values.layers
    # hidden_states[i] enters layer i, and the last one has been through the final norm.
    fused = torch.cat([out.hidden_states[i + 1] for i in aux], dim=-1) if aux else None
    return TargetView(
        kv=[(layers[i].keys, layers[i].values) for i in config.target_kv_layer_ids],
        windows=kv_windows(target, config),
        hidden=out.last_hidden_state,
        embeds=target.get_input_embeddings()(input_ids),
        fused=fused,
    )


def kv_windows(target: PreTrainedModel, config: KVSpecDraftConfig) -> list[int]:
    """``TargetView.windows`` of the layers that a head reads."""
    text_config = target.config.get_text_config()
    return [layer_window(text_config, i) for i in config.target_kv_layer_ids]


def at_positions(states: torch.Tensor, positions: torch.Tensor) -> torch.Tensor:
    """Rows of ``states`` [B, S, H] at ``positions`` [B, A] -> [B, A, H]; zeros where the position is -1."""
    rows = torch.arange(positions.shape[0], device=positions.device)[:, None]
    return states[rows, positions.clamp(min=0)] * (positions >= 0).unsqueeze(-1)


def head_logits(target: PreTrainedModel, hidden: torch.Tensor, token_ids: torch.Tensor | None = None) -> torch.Tensor:
    """The target's logits, in its LM head's dtype: ``hidden`` [..., H] -> [..., V], or those of ``token_ids`` [Vd].

    Scaled and capped as the target's own code does after its LM head.
    """
    logits = uncapped_logits(target, hidden, token_ids)
    # Gemma's.
    cap = getattr(target.config.get_text_config(), "final_logit_softcapping", None)
    return logits if not cap else cap * torch.tanh(logits / cap)


def uncapped_logits(
    target: PreTrainedModel, hidden: torch.Tensor, token_ids: torch.Tensor | None = None, with_bias: bool = True
) -> torch.Tensor:
    """``head_logits`` before the cap; without a bias of the LM head it is linear in ``hidden``."""
    lm_head, config = target.get_output_embeddings(), target.config.get_text_config()
    weight, bias = lm_head.weight, getattr(lm_head, "bias", None) if with_bias else None
    if token_ids is not None:
        weight, bias = weight[token_ids], None if bias is None else bias[token_ids]
    logits = torch.nn.functional.linear(hidden.to(weight.dtype), weight, bias)
    scale = logit_scale(config)
    return logits if scale == 1.0 else logits * scale


def logit_scale(text_config) -> float:
    """What a target multiplies its logits by: Cohere's factor, Granite's divisor."""
    factor, divisor = (getattr(text_config, key, None) or 1.0 for key in ("logit_scale", "logits_scaling"))
    return factor / divisor


def row_logits(
    target: PreTrainedModel,
    hidden: torch.Tensor,
    transition: torch.Tensor | None,
    config: KVSpecDraftConfig,
    token_ids: torch.Tensor | None = None,
) -> torch.Tensor:
    """Logits [..., Vd] of a head's rows ``hidden`` [..., H] with what ``KVSpecDraftModel.transition`` says of them."""
    if transition is None:
        return head_logits(target, hidden, token_ids)
    if config.transition == "table":
        return head_logits(target, hidden, token_ids) + transition
    if not getattr(target.config.get_text_config(), "final_logit_softcapping", None):
        return head_logits(target, hidden + transition, token_ids)
    # A bias is added to the capped logits.
    return head_logits(target, hidden, token_ids) + uncapped_logits(target, transition, token_ids, with_bias=False)


def weights_sha256(model: torch.nn.Module, per_parameter: int = 64) -> str:
    """SHA-256 over name, shape and ``per_parameter`` evenly spaced values of every parameter.

    Training moves every parameter, so this tells two models apart at a fraction of the cost of reading them whole.
    """
    found = hashlib.sha256()
    for name, parameter in model.named_parameters():
        flat = parameter.detach().flatten()
        sample = flat[:: max(1, flat.numel() // per_parameter)].float().cpu()
        found.update(f"{name} {tuple(parameter.shape)}".encode())
        found.update(sample.numpy().tobytes())
    return found.hexdigest()


# Of a weight file: evenly spaced pieces that are read, and their size.
PIECES, PIECE_BYTES = 4096, 64


def checkpoint_sha256(name: str) -> str:
    """SHA-256 over size and ``PIECES`` evenly spaced pieces of each weight file of ``name`` (directory or repository).

    As ``weights_sha256``, but without a model in memory, whatever its size.
    """
    patterns = ["*.safetensors", "*.bin"]
    directory = Path(name if Path(name).is_dir() else snapshot_download(name, allow_patterns=patterns))
    files = next(filter(None, (sorted(directory.glob(pattern)) for pattern in patterns)), [])
    if not files:
        raise ValueError(f"{directory} must hold the target's weights as {' or '.join(patterns)}, found none.")
    found = hashlib.sha256()
    for path in files:
        size = path.stat().st_size
        found.update(f"{size} ".encode())
        with path.open("rb") as file:
            for offset in range(0, size, max(PIECE_BYTES, size // PIECES)):
                file.seek(offset)
                found.update(file.read(PIECE_BYTES))
    return found.hexdigest()


def load_ends(name: str, dtype: torch.dtype, device: torch.device | str) -> PreTrainedModel:
    """The target without its layers: embeddings, final norm and LM head, all that training reads beside a cache.

    Its ``config`` is that of the whole target; its forward is not to be called.
    """
    config = AutoConfig.from_pretrained(name)
    layerless = copy.deepcopy(config)
    text_config = layerless.get_text_config()
    text_config.num_hidden_layers = 0
    if getattr(text_config, "layer_types", None):
        text_config.layer_types = []
    verbosity = transformers_logging.get_verbosity()
    # Of the layers' weights that are not loaded.
    transformers_logging.set_verbosity_error()
    try:
        ends = AutoModelForCausalLM.from_pretrained(name, config=layerless, dtype=dtype)
    finally:
        transformers_logging.set_verbosity(verbosity)
    ends.config = config
    return ends.to(device).eval()
