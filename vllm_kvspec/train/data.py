# SPDX-License-Identifier: Apache-2.0
"""Texts and training rows: reading given texts, prompts cut from them, the target's continuations, rows as batches.

A head learns what its target says next, so it must be trained on the target's own words. One training row is
``{"input_ids": [...], "loss_mask": [0 or 1, ...], "temperature": t}``; the mask is 1 where the target wrote the token.
"""

import json
import logging
import random
from collections import Counter
from collections.abc import Iterable
from itertools import chain, groupby
from pathlib import Path

import torch
from datasets import Dataset, concatenate_datasets, load_dataset
from datasets.exceptions import DatasetGenerationError, DatasetNotFoundError
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vllm_kvspec.train.conversations import FEATURES, FORMATS, normalize

logger = logging.getLogger(__name__)

# A character budget per token, generous for any tokenizer: only the first tokens of a cut text become the prompt.
CHARACTERS_PER_TOKEN = 16
FILE_BUILDERS = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".txt": "text"}
ROW_KEYS = ("input_ids", "loss_mask", "temperature")


def load_texts(paths: list[str], split: str = "train") -> Dataset:
    """Rows with ``text`` (str) or ``messages`` ([{role, content}]), the other one None.

    ``paths`` are files (jsonl, json, parquet, txt) or names of Hugging Face datasets, of which ``split`` is read; the
    forms are those of ``train.conversations``. Rows that cannot be used are left out and counted in the log. Raises
    ValueError for a missing or empty file, for unknown keys, and when nothing is left.
    """
    parts = []
    for path in paths:
        rows = _load(path, split)
        if not set(FORMATS) & set(rows.column_names):
            raise ValueError(
                f"Texts must have one of the keys {', '.join(FORMATS)}; {path} has {', '.join(rows.column_names)}. "
                "Rename the key, or convert the rows."
            )
        parts.append(rows.map(normalize, remove_columns=rows.column_names, features=FEATURES, desc="reading texts"))
    rows = concatenate_datasets(parts)
    problems = Counter(rows["problem"])
    usable = problems.pop(None, 0)
    counts = ", ".join(f"{count} {problem}" for problem, count in problems.most_common())
    if not usable:
        raise ValueError(f"{paths} must have a text or a chat with a user turn; found none ({counts}). Check the rows.")
    if problems:
        logger.warning("%d of %d texts are left out: %s.", len(rows) - usable, len(rows), counts)
        rows = rows.filter(lambda problem: problem is None, input_columns="problem")
    return rows.remove_columns("problem")


def _load(path: str, split: str) -> Dataset:
    """One file or Hugging Face dataset. Raises ValueError when it cannot be read."""
    file, builder = Path(path), FILE_BUILDERS.get(_suffix(path))
    if file.is_file() and not file.stat().st_size:
        raise ValueError(f"Texts must be in {path}, found an empty file; write them there or name another file.")
    if builder and not file.is_file():
        raise ValueError(f"Texts must be in {path}, found no such file; check the path.")
    if file.is_file() and not builder:
        raise ValueError(
            f"Files of texts must end in {', '.join(FILE_BUILDERS)}, found {path}; rename or convert the file."
        )
    try:
        if builder == "text":
            return load_dataset(builder, data_files=path, split="train", sample_by="document")
        if builder:
            return load_dataset(builder, data_files=path, split="train")
        return load_dataset(path, split=split)
    except (DatasetGenerationError, DatasetNotFoundError, OSError, ValueError) as error:
        raise ValueError(
            f"{path} must be a readable file or the name of a Hugging Face dataset with a split {split!r}; found: "
            f"{error.__cause__ or error}. Check the name and the file's rows."
        ) from error


def _suffix(path: str) -> str:
    """The file's suffix without that of its compression."""
    return Path(path.removesuffix(".gz").removesuffix(".zst")).suffix


def cut_prompts(
    rows: Iterable[dict], tokenizer: PreTrainedTokenizerBase, count: int, prompt_length: int, seed: int
) -> list[list[int]]:
    """``count`` prompts of at most ``prompt_length`` tokens; longer texts are drawn more often, a chat once only.

    A text's prompt starts at a random line; a chat's prompt is everything before its last answer, or before its first
    empty one. Chats whose prompts, with template and system prompt, are longer than ``prompt_length`` are left out and
    counted in the log. Raises ValueError when there are fewer prompts.
    """
    rng = random.Random(seed)
    documents = [row for row in rows if row.get("messages") or (row.get("text") or "").strip()]
    weights = [_length(row) for row in documents]
    prompts: list[list[int]] = []
    chats: dict[int, int] = {}
    drawn = (rng.choices(range(len(documents)), weights)[0] for _ in range(20 * count))
    # At last those that no draw hit, so that all of a file's chats can be asked for.
    for index in chain(drawn, range(len(documents))):
        if index in chats:
            continue
        if documents[index].get("messages"):
            prompt = chat_prompt(documents[index]["messages"], tokenizer)
            chats[index] = len(prompt)
        else:
            prompt = _text_prompt(documents[index]["text"], tokenizer, prompt_length, rng)
        if 0 < len(prompt) <= prompt_length:
            prompts.append(prompt)
        if len(prompts) == count:
            break
    long = [length for length in chats.values() if length > prompt_length]
    problem = ""
    if long:
        problem = (
            f"{len(long)} of {len(chats)} chats have more than {prompt_length} tokens with the chat template (up to "
            f"{max(long)}) and are left out; raise prompt_length to keep them."
        )
    if len(prompts) < count:
        raise ValueError(
            f"The texts must yield {count} prompts of {prompt_length} tokens, found {len(prompts)}; give longer texts "
            f"or ask for fewer or shorter prompts. {problem}".strip()
        )
    if problem:
        logger.warning(problem)
    return prompts


def _length(row: dict) -> int:
    return sum(len(message["content"]) for message in row["messages"]) if row.get("messages") else len(row["text"])


def chat_prompt(messages: list[dict[str, str]], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """The tokens before the last answer of a chat, or before its first empty one."""
    ends = [i for i, message in enumerate(messages) if message["role"] == "assistant" and not message["content"]]
    if not ends and messages[-1]["role"] == "assistant":
        ends = [len(messages) - 1]
    messages = messages[: ends[0]] if ends else messages
    text = tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _text_prompt(text: str, tokenizer: PreTrainedTokenizerBase, prompt_length: int, rng: random.Random) -> list[int]:
    """``prompt_length`` tokens from a random line on; none where fewer follow it."""
    starts = [0] + [i + 1 for i, character in enumerate(text) if character == "\n"]
    start = rng.choice(starts)
    ids = tokenizer(text[start : start + CHARACTERS_PER_TOKEN * prompt_length])["input_ids"]
    return ids[:prompt_length] if len(ids) >= prompt_length else []


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
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id or 0
    rows = [torch.tensor(prompt) for prompt in prompts]
    ids = torch.nn.utils.rnn.pad_sequence(rows, True, pad, padding_side="left").to(target.device)
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=target.device)
    mask = torch.arange(ids.shape[1], device=target.device) >= ids.shape[1] - lengths[:, None]
    # The whole distribution, whatever the target's generation_config.json narrows it to.
    sampling = {"do_sample": False}
    if temperature > 0:
        sampling = {"do_sample": True, "temperature": temperature, "top_k": 0, "top_p": 1.0}
    out = target.generate(
        input_ids=ids,
        attention_mask=mask.long(),
        max_new_tokens=max_new_tokens,
        pad_token_id=pad,
        repetition_penalty=1.0,
        logits_processor=logits_processor,
        **sampling,
    )
    ends = end_tokens(target)
    return [prompt + _until(row[ids.shape[1] :].tolist(), ends) for prompt, row in zip(prompts, out, strict=True)]


def end_tokens(target: PreTrainedModel) -> set[int | None]:
    """Tokens after which the target says nothing more."""
    ends = target.generation_config.eos_token_id
    return set(ends if isinstance(ends, list) else [ends])


def _until(tokens: list[int], ends: set[int | None]) -> list[int]:
    for i, token in enumerate(tokens):
        if token in ends:
            return tokens[: i + 1]
    return tokens


def sidecar_path(path: Path) -> Path:
    """Where the record of how a file of rows was made stands: ``rows.jsonl.json`` beside ``rows.jsonl``."""
    return path.with_name(path.name + ".json")


def longest_stretch(loss_mask: list[int]) -> int:
    """Length of the longest run of ones."""
    return max((len(list(run)) for value, run in groupby(loss_mask) if value), default=0)


def load_rows(
    paths: list[str], block_size: int, *, tokenizer_sha256: str | None = None, max_length: int | None = None
) -> Dataset:
    """Training rows of ``paths`` with ``input_ids``, ``loss_mask`` and ``temperature`` (1.0 where it is not given).

    Rows without ``block_size`` consecutive tokens to learn from, and rows longer than ``max_length`` tokens, are
    dropped and counted in the log. ``tokenizer_sha256`` (``config.tokenizer_sha256``) is compared with the record
    beside each file, where there is one. Raises ValueError for files that are not whole, not of this form, of another
    tokenizer, or of which nothing is left.
    """
    for path in map(Path, paths):
        _check_whole(path)
        _check_record(path, tokenizer_sha256)
    try:
        rows = load_dataset("json", data_files=paths, split="train")
    except DatasetGenerationError as error:
        raise ValueError(
            f"Training rows must be jsonl, one object a line; {paths} could not be read ({error.__cause__ or error}). "
            "Write them with `vllm-kvspec prepare`."
        ) from error
    if missing := {"input_ids", "loss_mask"} - set(rows.column_names):
        raise ValueError(
            f"Training rows must have input_ids and loss_mask; {paths} has no {', '.join(sorted(missing))} but "
            f"{rows.column_names}. Write them with `vllm-kvspec prepare`."
        )
    dropped = {"short": 0, "long": 0}
    kept = [i for i, row in enumerate(rows) if _usable(row, i, block_size, max_length, dropped)]
    problem = f"{dropped['short']} have no {block_size} consecutive tokens to learn from"
    if max_length is not None:
        problem += f", {dropped['long']} are longer than the {max_length} tokens of the context"
    if not kept:
        raise ValueError(
            f"Training needs at least one usable row; of the {len(rows)} in {paths} {problem}. "
            "Prepare longer answers (--max_new_tokens) within the context."
        )
    if len(kept) < len(rows):
        logger.warning("%d of %d training rows are left out: %s.", len(rows) - len(kept), len(rows), problem)
    return rows.select(kept).select_columns([c for c in ROW_KEYS if c in rows.column_names])


def _usable(row: dict, index: int, block_size: int, max_length: int | None, dropped: dict[str, int]) -> bool:
    """Whether a row can be trained on; if not, it is counted in ``dropped``."""
    if len(row["input_ids"]) != len(row["loss_mask"]):
        raise ValueError(
            f"A row's input_ids and loss_mask must be equally long; row {index} has {len(row['input_ids'])} and "
            f"{len(row['loss_mask'])}. Write the rows with `vllm-kvspec prepare`."
        )
    if max_length is not None and len(row["input_ids"]) > max_length:
        dropped["long"] += 1
    elif longest_stretch(row["loss_mask"]) < block_size:
        dropped["short"] += 1
    else:
        return True
    return False


def _check_whole(path: Path) -> None:
    """Raise ValueError when ``path`` is missing, empty, or ends in the middle of a row."""
    if not path.is_file() or not path.stat().st_size:
        found = "an empty file" if path.is_file() else "no file"
        raise ValueError(f"Training rows must be in {path}, found {found}; write them with `vllm-kvspec prepare`.")
    with path.open("rb") as file:
        *_, last = file
    try:
        json.loads(last)
    except ValueError as error:
        raise ValueError(
            f"The last line of {path} must be a whole row, found {len(last)} bytes that are not; run the same "
            "`vllm-kvspec prepare` again to finish the file."
        ) from error


def _check_record(path: Path, tokenizer_sha256: str | None) -> None:
    """Raise ValueError when the record beside ``path`` names another tokenizer; warn when the rows are unfinished."""
    sidecar = sidecar_path(path)
    if not sidecar.is_file():
        return
    record = json.loads(sidecar.read_text())
    target, done = record["target"], record["progress"]["prompts"]
    if tokenizer_sha256 not in (None, target["tokenizer_sha256"]):
        raise ValueError(
            f"Rows must be prepared with the tokenizer of the target they train for; {path} was made with "
            f"{target['name_or_path']}, whose tokenizer is another. Prepare the rows with this target."
        )
    if done < record["prompts"]:
        logger.warning("%s is unfinished: %d of %d prompts are done.", path, done, record["prompts"])


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pad rows on the right.

    ``input_ids`` [B, S] int64, ``loss_mask`` [B, S] bool (False in the padding), ``lengths`` [B] int64 and
    ``temperatures`` [B] float32 (1 where a row has none); ``records`` [B, S, W] of rows out of a ``TargetCache``.
    """

    def padded(key: str, dtype: torch.dtype) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence([torch.tensor(row[key], dtype=dtype) for row in rows], batch_first=True)

    temperatures = [row.get("temperature") for row in rows]
    records = [row["records"] for row in rows if "records" in row]
    return {
        **({"records": torch.nn.utils.rnn.pad_sequence(records, batch_first=True)} if records else {}),
        "input_ids": padded("input_ids", torch.int64),
        "loss_mask": padded("loss_mask", torch.bool),
        "lengths": torch.tensor([len(row["input_ids"]) for row in rows]),
        "temperatures": torch.tensor([1.0 if t is None else float(t) for t in temperatures]),
    }
