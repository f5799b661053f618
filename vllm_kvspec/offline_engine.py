# SPDX-License-Identifier: Apache-2.0
"""How the commands start vLLM's engine in their own process. vLLM is imported when it is started."""

import logging
import math
import os
from typing import Any

import torch
from transformers import AutoConfig

from vllm_kvspec.rope import layer_heads

logger = logging.getLogger(__name__)

# Without a GPU: 90,000 tokens of a small target (SmolLM2-135M in float32), 30,000 of Qwen3-8B in bfloat16.
CPU_KV_BYTES = 4 << 30
CPU_KV_BLOCK = 128
CPU_REQUESTS = 256


def start_engine(target_model: str, **engine_args: Any):
    """vLLM's ``LLM`` with its scheduler in this process, so that batches repeat. Raises ValueError without vLLM."""
    os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")
    try:
        from vllm import LLM
    except ImportError as error:
        raise ValueError(f"This needs vLLM, found none ({error}); install it.") from error
    return LLM(target_model, **engine_args)


def cpu_defaults(target_model: str, max_length: int, requests: int) -> dict[str, Any]:
    """Engine arguments without a GPU, where vLLM alone would claim most of the machine's memory and compile for a run.

    KV room for ``requests`` requests of ``max_length`` tokens, within limits; requests for which there is none wait.
    """
    if torch.cuda.is_available():
        return {}
    import psutil

    config = AutoConfig.from_pretrained(target_model).get_text_config()
    floats = 2 * sum(math.prod(layer_heads(config, layer)) for layer in range(config.num_hidden_layers))
    # Rounded up to whole blocks, whatever their size.
    wanted = 4 * floats * (max_length + CPU_KV_BLOCK) * min(requests, CPU_REQUESTS)
    room = min(wanted, CPU_KV_BYTES, psutil.virtual_memory().available // 4)
    return {
        "enforce_eager": True,
        "max_num_seqs": CPU_REQUESTS,
        "kv_cache_memory_bytes": room,
        # The engine takes back the random numbers of an unfinished prompt, which a CPU's generators cannot do.
        "enable_chunked_prefill": False,
    }


def cpu_dtype() -> dict[str, str]:
    """The engine argument ``dtype`` where the CPU has no instructions for bfloat16."""
    if torch.cuda.is_available():
        return {}
    units = torch.cpu.get_capabilities()
    if any(units[key] for key in units if key.endswith("bf16")):
        return {}
    logger.info("This CPU computes bfloat16 without instructions for it, several times slower: using float32.")
    return {"dtype": "float32"}
