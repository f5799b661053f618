# SPDX-License-Identifier: Apache-2.0
"""Text that the target wrote itself: prompts cut from given texts, continued by the target, kept as jsonl.

A head learns what its target says next, so it must be trained on the target's own words. One row of the written file is
``{"input_ids": [...], "prompt_length": n, "temperature": t}``. The texts come as jsonl rows with ``text``, or with
``messages`` (chats, whose last answer is what the target writes again).
"""

import json
import random
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import PreTrainedModel, PreTrainedTokenizerBase

# A character budget per token, generous for any tokenizer: only the first tokens of a cut text become the prompt.
CHARACTERS_PER_TOKEN = 16


def load_texts(paths: list[str]) -> Dataset:
    """Rows with ``text`` or ``messages`` from jsonl files. Raises ValueError when neither is there."""
    rows = load_dataset("json", data_files=paths, split="train")
    if not {"text", "messages"} & set(rows.column_names):
        raise ValueError(
            f'Text files must be jsonl with a "text" or a "messages" key, found {rows.column_names} in {paths}; '
            "rewrite them so."
        )
    return rows


def cut_prompts(
    rows: Iterable[dict], tokenizer: PreTrainedTokenizerBase, count: int, prompt_length: int, seed: int
) -> list[list[int]]:
    """``count`` prompts of at most ``prompt_length`` tokens; longer texts are drawn more often.

    A text's prompt starts at a random line; a chat's prompt is everything before its last answer (chats longer than
    ``prompt_length`` are left out).
    """
    rng = random.Random(seed)
    documents = [row for row in rows if row.get("messages") or (row.get("text") or "").strip()]
    weights = [_length(row) for row in documents]
    prompts: list[list[int]] = []
    for _ in range(20 * count):
        prompt = _prompt(rng.choices(documents, weights)[0], tokenizer, prompt_length, rng)
        if prompt:
            prompts.append(prompt)
        if len(prompts) == count:
            return prompts
    raise ValueError(
        f"The texts must yield {count} prompts of {prompt_length} tokens, found {len(prompts)}; give longer texts or "
        "ask for fewer or shorter prompts."
    )


def _length(row: dict) -> int:
    return sum(len(message["content"]) for message in row["messages"]) if row.get("messages") else len(row["text"])


def _prompt(row: dict, tokenizer: PreTrainedTokenizerBase, prompt_length: int, rng: random.Random) -> list[int] | None:
    if row.get("messages"):
        messages = row["messages"][:-1] if row["messages"][-1]["role"] == "assistant" else row["messages"]
        text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids if len(ids) <= prompt_length else None
    starts = [0] + [i + 1 for i, character in enumerate(row["text"]) if character == "\n"]
    start = rng.choice(starts)
    ids = tokenizer(row["text"][start : start + CHARACTERS_PER_TOKEN * prompt_length])["input_ids"]
    return ids[:prompt_length] if len(ids) >= prompt_length else None


@torch.no_grad()
def continue_prompts(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperature: float,
    logits_processor=None,
) -> list[list[int]]:
    """Prompt and continuation of each prompt; ends after the end-of-text token if the target writes one.

    ``temperature`` 0 is greedy. ``logits_processor`` (transformers) may add noise of its own to greedy decoding.
    """
    # Padding on the left keeps every prompt's last token in the last column.
    batch = tokenizer.pad({"input_ids": prompts}, padding_side="left", return_tensors="pt").to(target.device)
    sampling = {"do_sample": True, "temperature": temperature, "top_k": 0} if temperature > 0 else {"do_sample": False}
    out = target.generate(
        input_ids=batch["input_ids"],
        attention_mask=batch["attention_mask"],
        max_new_tokens=max_new_tokens,
        pad_token_id=tokenizer.pad_token_id,
        logits_processor=logits_processor,
        **sampling,
    )
    ends = target.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends])
    width = batch["input_ids"].shape[1]
    return [prompt + _until(row[width:].tolist(), ends) for prompt, row in zip(prompts, out, strict=True)]


def _until(tokens: list[int], ends: set[int | None]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens


def generate_rows(
    target: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: list[list[int]],
    *,
    max_new_tokens: int,
    temperatures: list[float],
    batch_size: int,
) -> Iterator[dict]:
    """Training rows, batch by batch; batches take the ``temperatures`` in turn."""
    for index, first in enumerate(range(0, len(prompts), batch_size)):
        chunk, temperature = prompts[first : first + batch_size], temperatures[index % len(temperatures)]
        rows = continue_prompts(target, tokenizer, chunk, max_new_tokens=max_new_tokens, temperature=temperature)
        for prompt, ids in zip(chunk, rows, strict=True):
            yield {"input_ids": ids, "prompt_length": len(prompt), "temperature": temperature}


def write_rows(rows: Iterable[dict], path: Path) -> int:
    """Write rows as jsonl and return how many."""
    path.parent.mkdir(parents=True, exist_ok=True)
    count = 0
    with path.open("w") as file:
        for row in rows:
            file.write(json.dumps(row) + "\n")
            file.flush()
            count += 1
    return count


def load_rows(paths: list[str], block_size: int) -> Dataset:
    """Rows written by ``write_rows``, without those too short for one block."""
    rows = load_dataset("json", data_files=paths, split="train")
    return rows.filter(lambda row: len(row["input_ids"]) - row["prompt_length"] >= block_size)


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pad rows on the right: ``input_ids`` [B, S] int64; ``lengths``, ``prompt_lengths``, ``temperatures`` [B]."""
    input_ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row["input_ids"]) for row in rows], batch_first=True)
    return {
        "input_ids": input_ids,
        "lengths": torch.tensor([len(row["input_ids"]) for row in rows]),
        "prompt_lengths": torch.tensor([row["prompt_length"] for row in rows]),
        "temperatures": torch.tensor([float(row["temperature"]) for row in rows]),
    }
