# SPDX-License-Identifier: Apache-2.0
"""The prepare command: training rows that the target itself writes, by vLLM's engine where it can.

This module stands above ``train``, which never imports vLLM; vLLM is imported when the first prompt is there.
"""

import hashlib
import importlib.metadata
import logging
from collections.abc import Callable, Sequence
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

from transformers import AutoConfig, AutoTokenizer

from vllm_kvspec.config import target_fingerprint
from vllm_kvspec.offline_engine import cpu_defaults, cpu_dtype, start_engine
from vllm_kvspec.train.data import load_texts
from vllm_kvspec.train.record import versions
from vllm_kvspec.train.regeneration import (
    Answer,
    Request,
    Settings,
    Writer,
    check_template,
    plan_prompts,
    transformers_writer,
    write_rows,
)
from vllm_kvspec.train.rows_file import Progress, RowsFile
from vllm_kvspec.train.server_writer import server_writer

logger = logging.getLogger(__name__)


def prepare(
    target_model: str,
    data_path: list[str],
    output: Path,
    *,
    split: str,
    command: str,
    base_url: Sequence[str] = (),
    concurrency: int = 64,
    **settings: Any,
) -> Progress:
    """Write the training rows of ``data_path`` to ``output``, or go on where an interrupted run ended.

    ``settings``: fields of ``train.regeneration.Settings``; ``max_length`` is lowered to the target's context, and
    ``regenerate`` is "server" with a ``base_url``; an interrupted run may go on with other servers. ``command`` is
    recorded. Returns how much was written. Raises ValueError, before anything is written, for unusable texts, settings
    or output.
    """
    if base_url:
        settings["regenerate"] = "server"
    elif settings["regenerate"] == "server":
        raise ValueError('regenerate "server" needs a base_url, found none; give --base_url http://HOST:PORT/v1.')
    if concurrency < 1:
        raise ValueError(f"concurrency must be at least 1, found {concurrency}; give a positive number.")
    config, tokenizer = AutoConfig.from_pretrained(target_model), AutoTokenizer.from_pretrained(target_model)
    chosen = Settings(**settings | {"max_length": _context(config, settings)})
    texts = load_texts(data_path, split)
    if any(messages is not None for messages in texts["messages"]):
        check_template(tokenizer, chosen.regenerate)
    plan = plan_prompts(texts, chosen.num_prompts, chosen.seed)
    record = {
        "command": command,
        "versions": versions() | {"vllm": _vllm_version()},
        "settings": asdict(chosen),
        "target": target_fingerprint(config.get_text_config(), tokenizer),
        "weights": _weights(target_model, config),
        "data": [_described(path, split) for path in data_path],
        "prompts": len(plan),
    }
    record["target"]["name_or_path"] = target_model
    file = RowsFile(output, record)
    if file.finished:
        logger.info("%s is finished; nothing to do.", output)
        return file.progress
    make_writer = partial(_make_writer, target_model, tokenizer, chosen, base_url, concurrency)
    write_rows(file, texts, plan, tokenizer, chosen, make_writer)
    if file.progress.left_out:
        counts = ", ".join(f"{count} {reason}" for reason, count in file.progress.left_out.items())
        logger.warning("Of %d prompts left out: %s.", len(plan), counts)
    return file.progress


def _context(config: Any, settings: dict[str, Any]) -> int:
    """Tokens that a row can have: asked for, held by the target, and by the engine when it is given a length."""
    limits = [settings["max_length"], config.get_text_config().max_position_embeddings]
    return min([*limits, *filter(None, [settings["engine_args"].get("max_model_len")])])


def _make_writer(
    target_model: str,
    tokenizer: Any,
    settings: Settings,
    base_urls: Sequence[str],
    concurrency: int,
    answered: Callable[[], None],
) -> Writer:
    if settings.regenerate == "engine":
        return engine_writer(target_model, settings, answered)
    if settings.regenerate == "server":
        return server_writer(base_urls, concurrency, settings.max_length, answered)
    from vllm_kvspec.train.run import load_target

    return transformers_writer(load_target(target_model)[0], tokenizer, answered)


def engine_writer(target_model: str, settings: Settings, answered: Callable[[], None] = lambda: None) -> Writer:
    """Answers by vLLM's engine, decoding as it serves: all of softmax(logits / temperature), no top-k or top-p.

    The same requests give the same answers, whatever came before: each has a seed, batches are scheduled in this
    process, and the prefix cache is emptied between them. ``answered`` is called for each. Raises ValueError when vLLM
    is not installed.
    """
    arguments = {"max_model_len": settings.max_length, "seed": settings.seed}
    arguments |= cpu_dtype() | cpu_defaults(target_model, settings.max_length, settings.batch_size)
    llm = start_engine(target_model, **arguments | settings.engine_args)
    from vllm import SamplingParams

    def write(requests: list[Request]) -> list[Answer]:
        llm.reset_prefix_cache()
        params = [
            SamplingParams(temperature=r.temperature, seed=r.seed, max_tokens=r.max_new_tokens, detokenize=False)
            for r in requests
        ]
        llm.enqueue([{"prompt_token_ids": request.prompt} for request in requests], params, use_tqdm=False)
        # What llm.generate does, but for its bar, which counts one call.
        answers: dict[int, Answer] = {}
        while llm.llm_engine.has_unfinished_requests():
            for output in filter(lambda output: output.finished, llm.llm_engine.step()):
                (said,) = output.outputs
                answers[int(output.request_id)] = Answer(list(said.token_ids), finished=said.finish_reason == "stop")
                answered()
        return [answers[request_id] for request_id in sorted(answers)]

    return write


def _vllm_version() -> str | None:
    try:
        return importlib.metadata.version("vllm")
    except importlib.metadata.PackageNotFoundError:
        return None


def _weights(target_model: str, config: Any) -> str | list:
    """What tells these weights from others: files with sizes and times, or the commit of a repository."""
    if not Path(target_model).is_dir():
        return getattr(config, "_commit_hash", None) or target_model
    files = sorted(Path(target_model).glob("*.safetensors")) or sorted(Path(target_model).glob("*.bin"))
    return [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]


def _described(path: str, split: str) -> dict[str, Any]:
    """A data file by its contents, a Hugging Face dataset by its name."""
    file = Path(path)
    if not file.is_file():
        return {"name": path, "split": split}
    with file.open("rb") as opened:
        digest = hashlib.file_digest(opened, "sha256").hexdigest()
    return {"name": file.name, "bytes": file.stat().st_size, "sha256": digest}
