# SPDX-License-Identifier: Apache-2.0
"""The cache command: what training reads of the target, computed by vLLM's engine instead of transformers.

``train`` with the same flags then finds its ``cache_dir`` complete and loads the target's embeddings and LM head only:
heads for whatever vLLM can serve, on as many GPUs as that takes.
"""

import logging
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from vllm_kvspec.offline_engine import cpu_defaults, start_engine
from vllm_kvspec.train.arguments import parse
from vllm_kvspec.train.run import compute_dtype, load_rows_for
from vllm_kvspec.train.target_cache import TargetCache, Writer

logger = logging.getLogger(__name__)

EXTENSION = "vllm_kvspec.engine.target_states.RecordsTargetStates"
PLAIN_CPU_WORKER = "vllm_kvspec.engine.cpu.worker.PlainV2CPUWorker"


def cache(argv: Sequence[str], engine_args: dict[str, Any], **parser_options) -> TargetCache:
    """Fill the ``cache_dir`` of the ``train`` command whose flags are ``argv``, or what an interrupted run left of it.

    ``engine_args``: arguments of ``vllm.LLM``, such as ``tensor_parallel_size``. Raises ValueError for what cannot be
    recorded, before anything is computed.
    """
    head_args, data, args = parse(argv, **parser_options)
    if not data.cache_dir:
        raise ValueError("cache must be told where to: --cache_dir DIRECTORY, the same as for train.")
    config, rows, found = load_rows_for(head_args, data, args)
    if config.aux_hidden_state_layer_ids:
        raise ValueError(
            f'The engine records keys, values and last hidden states; a head of context "{config.context}" also reads '
            f"the hidden states after layers {config.aux_hidden_state_layer_ids}. Let train fill this cache."
        )
    if (ranks := engine_args.get("pipeline_parallel_size", 1)) > 1:
        raise ValueError(f"cache must run without pipeline parallelism, found {ranks}; use tensor_parallel_size.")
    if not found.missing:
        logger.info("%s is complete; nothing to do.", found.directory)
        return found
    write = engine_writer(head_args.target_model, compute_dtype(args), found, engine_args)
    found.fill(write)
    return found


def engine_writer(target_model: str, dtype: torch.dtype, found: TargetCache, engine_args: dict[str, Any]) -> Writer:
    """Records by vLLM's engine, every row a prompt."""
    longest = max(found.lengths)
    # One more for the token that a prompt asks for; it is never computed.
    if longest + 1 > AutoConfig.from_pretrained(target_model).get_text_config().max_position_embeddings:
        os.environ["VLLM_ALLOW_LONG_MAX_MODEL_LEN"] = "1"
    defaults = cpu_defaults(target_model, longest, len(found)) | {"max_model_len": longest + 1}
    needed = {
        "dtype": _name(dtype),
        "enforce_eager": True,
        "enable_prefix_caching": False,
        "worker_extension_cls": EXTENSION,
    }
    if not torch.cuda.is_available():
        needed["worker_cls"] = PLAIN_CPU_WORKER
    if clash := {key: engine_args[key] for key in needed if engine_args.get(key, needed[key]) != needed[key]}:
        raise ValueError(f"cache sets {', '.join(clash)} itself, found {clash} in engine_args; leave them out.")
    llm = start_engine(target_model, **defaults | engine_args | needed)
    llm.collective_rpc("start_recording", args=(found.config.target_kv_layer_ids, _name(found.dtype)))
    return recording_writer(llm)


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def recording_writer(llm: Any) -> Writer:
    """Rows through an engine that records (``engine.target_states``)."""
    from vllm import SamplingParams

    params = SamplingParams(max_tokens=1, temperature=0.0, detokenize=False)

    def write(file: Path, rows: list[list[int]], starts: list[int], done: Callable[[int], None]) -> None:
        ids = llm.enqueue([{"prompt_token_ids": row} for row in rows], params, use_tqdm=False)
        llm.collective_rpc("record_rows", args=(str(file.resolve()), dict(zip(ids, starts, strict=True))))
        while llm.llm_engine.has_unfinished_requests():
            for output in filter(lambda output: output.finished, llm.llm_engine.step()):
                done(len(output.prompt_token_ids))
        llm.collective_rpc("close_rows")

    return write
