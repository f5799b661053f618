# SPDX-License-Identifier: Apache-2.0
"""The texts a head is measured on: prompts continued by the target, kept on disk so that many heads share them.

The continuation is greedy or carries the Gumbel noise of a seed, which makes it a function of the seed, as in the
engine. Texts depend on the target and the prompts only, never on a head.
"""

import hashlib
import json
import logging
import os
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import LogitsProcessor, PreTrainedModel, PreTrainedTokenizerBase

from vllm_kvspec.kernels.reference import gumbel_noise
from vllm_kvspec.models.target import weights_sha256
from vllm_kvspec.train.data import continue_prompts

logger = logging.getLogger(__name__)

PROMPTS_PER_BATCH = 64


@dataclass
class Text:
    """One continued prompt: all tokens, where the continuation starts, and the seed of its noise."""

    input_ids: list[int]
    prompt_length: int
    seed: int


class NoiseProcessor(LogitsProcessor):
    """Adds temperature * Gumbel noise of (seed, position, token) to the logits: greedy decoding then samples."""

    def __init__(self, seeds: torch.Tensor, temperature: float, padding: torch.Tensor):
        self.seeds, self.padding = seeds, padding
        self.temperature = torch.full(seeds.shape, temperature, dtype=torch.float32, device=seeds.device)

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        position = (input_ids.shape[1] - 1 - self.padding)[:, None]
        rows = torch.arange(len(self.seeds), device=self.seeds.device)
        return scores.float() + gumbel_noise(self.seeds, self.temperature, position, rows, scores.shape[-1])[:, 0]


def write_texts(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
) -> list[Text]:
    """Continue ``prompts`` with the target; prompt i uses seed i."""
    texts: list[Text] = []
    batches = range(0, len(prompts), PROMPTS_PER_BATCH)
    for first in tqdm(batches, desc=f"target writes, T={temperature:g}", unit="batch", leave=False, disable=None):
        batch = prompts[first : first + PROMPTS_PER_BATCH]
        seeds = torch.arange(first, first + len(batch), device=target.device)
        longest = max(map(len, batch))
        padding = torch.tensor([longest - len(prompt) for prompt in batch], device=target.device)
        rows = continue_prompts(
            target,
            tokenizer,
            batch,
            max_new_tokens=max_new_tokens,
            temperature=0.0,
            logits_processor=[NoiseProcessor(seeds, temperature, padding)] if temperature > 0 else None,
        )
        zipped = zip(rows, batch, seeds.tolist(), strict=True)
        texts.extend(Text(ids, len(prompt), seed) for ids, prompt, seed in zipped)
    return texts


def cached_texts(
    directory: Path | None,
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
) -> list[Text]:
    """``write_texts``, or what an earlier call with the same target, prompts and settings left in ``directory``."""
    settings = {"max_new_tokens": max_new_tokens, "temperature": temperature}
    if directory is None:
        return write_texts(target, tokenizer, prompts, **settings)
    key = digest([weights_sha256(target), str(target.dtype), prompts, settings])[:16]
    path = directory / f"texts-{key}.json"
    if path.is_file():
        logger.info("texts at T=%g read from %s", temperature, path)
        return [Text(**row) for row in json.loads(path.read_text())]
    texts = write_texts(target, tokenizer, prompts, **settings)
    directory.mkdir(parents=True, exist_ok=True)
    # Renamed into place, so that an interrupted or a parallel run never leaves half a file.
    unfinished = path.with_suffix(f".{os.getpid()}.tmp")
    unfinished.write_text(json.dumps([asdict(text) for text in texts]))
    unfinished.replace(path)
    return texts


def digest(value: object) -> str:
    """SHA-256 of a JSON value."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def repeated_share(text: Text, order: int = 8) -> float:
    """Share of a continuation's tokens that end an ``order``-gram seen before in the text: how repetitive it is."""
    ids, seen, repeated = text.input_ids, set(), 0
    for end in range(order, len(ids) + 1):
        gram = tuple(ids[end - order : end])
        repeated += end > text.prompt_length and gram in seen
        seen.add(gram)
    return repeated / max(len(ids) - text.prompt_length, 1)
