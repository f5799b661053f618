# SPDX-License-Identifier: Apache-2.0
"""Training rows from texts and chats: which prompts the target is given, and what becomes of its answers.

Prompt ids and answer ids give the row and its loss mask, so no chat template has to say where an answer starts. Every
answer of a chat is written anew, each with the target's own earlier answers before it, as when it is served. Where the
next prompt begins with all tokens so far, as most templates have it, the chat stays one row with several stretches to
learn from; where it does not (thinking that the template removes), a new row starts. An answer cut at
``max_new_tokens`` ends its chat.
"""

import functools
import random
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from vllm_kvspec.train.conversations import turns
from vllm_kvspec.train.data import CHARACTERS_PER_TOKEN, continue_prompts, end_tokens
from vllm_kvspec.train.rows_file import RowsFile

TOO_LONG = "longer than max_length"
TOO_SHORT = "shorter than prompt_length"


@dataclass(frozen=True)
class Settings:
    """What decides the rows beside target and texts. Raises ValueError for values that nothing can be made with.

    ``num_prompts``: prompts to draw, longer texts more often and a chat once only; None takes every text and chat once.
    ``prompt_length``: tokens of a text that become its prompt. ``max_length``: tokens of a row at most.
    ``temperatures`` are taken in turn. ``batch_size``: prompts between two writes of the file.
    """

    regenerate: str = "engine"
    num_prompts: int | None = None
    prompt_length: int = 64
    max_new_tokens: int = 512
    max_length: int = 4096
    temperatures: tuple[float, ...] = (0.0, 1.0)
    batch_size: int = 256
    seed: int = 0
    chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    engine_args: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        for name in ("num_prompts", "prompt_length", "max_new_tokens", "max_length", "batch_size"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"{name} must be at least 1, found {value}; give a positive number.")
        if not self.temperatures or min(self.temperatures) < 0:
            raise ValueError(f"temperatures must be 0 or more, found {self.temperatures}; give for example 0 1.")


@dataclass(frozen=True)
class Request:
    """A prompt (token ids) for the target, and how to sample its answer."""

    prompt: list[int]
    max_new_tokens: int
    temperature: float
    seed: int


@dataclass(frozen=True)
class Answer:
    """Token ids, the end-of-text token included; ``finished`` is False when the length limit cut it."""

    tokens: list[int]
    finished: bool


Writer = Callable[[list[Request]], list[Answer]]


class Dialogue:
    """One text or chat, number ``index`` of the plan, that the target writes answer by answer.

    ``rows`` are the training rows so far, ``problem`` why there will be none.
    """

    def __init__(self, text: dict, index: int, tokenizer: PreTrainedTokenizerBase, settings: Settings):
        self.tokenizer, self.settings = tokenizer, settings
        self.text, self.index = text["text"], index
        self.turns = turns(text["messages"]) if text["messages"] else [[]]
        self.history: list[dict[str, str]] = []
        self.answered = 0
        self.rows: list[dict] = []
        self.problem: str | None = None

    def next_request(self) -> Request | None:
        """What to ask the target next; None when all is said or no room is left."""
        if self.answered == len(self.turns):
            return None
        rng = random.Random(f"{self.settings.seed} {self.index} {self.answered}")
        prompt = self._chat_prompt() if self.text is None else self._text_prompt(rng)
        if prompt is None:
            self.problem = TOO_SHORT
            return None
        room = self.settings.max_length - len(prompt)
        if room < 1:
            self.problem = TOO_LONG
            return None
        return Request(
            prompt,
            max_new_tokens=min(self.settings.max_new_tokens, room),
            temperature=float(self.settings.temperatures[self.index % len(self.settings.temperatures)]),
            seed=rng.getrandbits(31),
        )

    def _chat_prompt(self) -> list[int]:
        self.history += self.turns[self.answered]
        text = self.tokenizer.apply_chat_template(
            self.history, add_generation_prompt=True, tokenize=False, **self.settings.chat_template_kwargs
        )
        return self.tokenizer(text, add_special_tokens=False)["input_ids"]

    def _text_prompt(self, rng: random.Random) -> list[int] | None:
        """The first tokens from a random line on, or from the text's start when too little follows that line."""
        length = self.settings.prompt_length
        starts = [0] + [i + 1 for i, character in enumerate(self.text) if character == "\n"]
        for start in (rng.choice(starts), 0):
            ids = self.tokenizer(self.text[start : start + CHARACTERS_PER_TOKEN * length])["input_ids"]
            if len(ids) >= length:
                return ids[:length]
        return None

    def take(self, request: Request, answer: Answer) -> None:
        """Note the target's answer to ``request``."""
        row = self.rows[-1] if self.rows else None
        known = row["input_ids"] if row else []
        if row is None or request.prompt[: len(known)] != known:
            row = {"input_ids": [], "loss_mask": [], "temperature": request.temperature}
            self.rows.append(row)
        row["loss_mask"] += [0] * (len(request.prompt) - len(row["input_ids"])) + [1] * len(answer.tokens)
        row["input_ids"] = request.prompt + answer.tokens
        self.answered += 1
        if answer.finished:
            said = self.tokenizer.decode(answer.tokens, skip_special_tokens=True)
            self.history.append({"role": "assistant", "content": said})
        else:
            self.answered = len(self.turns)


def regenerate(dialogues: list[Dialogue], write: Writer) -> None:
    """Let the target write all answers of ``dialogues``, one turn of every dialogue at a time."""
    while waiting := [(dialogue, request) for dialogue in dialogues if (request := dialogue.next_request())]:
        answers = write([request for _, request in waiting])
        for (dialogue, request), answer in zip(waiting, answers, strict=True):
            dialogue.take(request, answer)
        dialogues = [dialogue for dialogue, _ in waiting]


def transformers_writer(
    target: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, answered: Callable[[], None] = lambda: None
) -> Writer:
    """Answers by transformers' own generation, for where vLLM is not installed; ``answered`` is called for each."""

    def write(requests: list[Request]) -> list[Answer]:
        answers: dict[int, Answer] = {}
        ends = end_tokens(target)
        for temperature in sorted({request.temperature for request in requests}):
            group = [i for i, request in enumerate(requests) if request.temperature == temperature]
            prompts = [requests[i].prompt for i in group]
            torch.manual_seed(requests[group[0]].seed)
            limit = max(requests[i].max_new_tokens for i in group)
            texts = continue_prompts(target, tokenizer, prompts, max_new_tokens=limit, temperature=temperature)
            for i, ids in zip(group, texts, strict=True):
                tokens = ids[len(requests[i].prompt) :][: requests[i].max_new_tokens]
                answers[i] = Answer(tokens, finished=tokens[-1] in ends)
                answered()
        return [answers[i] for i in range(len(requests))]

    return write


def given_rows(text: dict, tokenizer: PreTrainedTokenizerBase, settings: Settings) -> tuple[list[dict], str | None]:
    """Rows of a text or chat as it is given, and why there are none; a long text gives several rows.

    A chat's mask is that of the template's ``{% generation %}`` blocks.
    """
    if text["text"] is not None:
        ids = tokenizer(text["text"])["input_ids"]
        parts = [ids[first : first + settings.max_length] for first in range(0, len(ids), settings.max_length)]
        # Nothing stands before the first token: it cannot be learned.
        rows = [(part, [0] + [1] * (len(part) - 1)) for part in parts]
    else:
        encoded = tokenizer.apply_chat_template(
            text["messages"], return_dict=True, return_assistant_tokens_mask=True, **settings.chat_template_kwargs
        )
        if not any(encoded["assistant_masks"]):
            return [], "without an assistant turn"
        if len(encoded["input_ids"]) > settings.max_length:
            return [], TOO_LONG
        rows = [(list(encoded["input_ids"]), list(encoded["assistant_masks"]))]
    return [{"input_ids": ids, "loss_mask": mask, "temperature": 1.0} for ids, mask in rows], None


def plan_prompts(texts: Dataset, num_prompts: int | None, seed: int) -> list[int]:
    """Which texts are taken, in order; see ``Settings.num_prompts``. Fewer when there are not that many chats."""
    if num_prompts is None:
        return list(range(len(texts)))
    is_chat, weights = [], []
    for text in texts:
        is_chat.append(text["text"] is None)
        weights.append(1 + len(text["text"] or "") + sum(len(m["content"]) for m in text["messages"] or []))
    rng = random.Random(seed)
    plan: list[int] = []
    drawn: set[int] = set()
    for index in rng.choices(range(len(texts)), weights, k=20 * num_prompts):
        if index in drawn and is_chat[index]:
            continue
        drawn.add(index)
        plan.append(index)
        if len(plan) == num_prompts:
            break
    return plan


def check_template(tokenizer: PreTrainedTokenizerBase, regenerate: str) -> None:
    """Raise ValueError when chats cannot be prepared with this tokenizer's template."""
    try:
        template = tokenizer.get_chat_template()
    except ValueError as error:
        raise ValueError(
            f"Chats need a chat template; the tokenizer of {tokenizer.name_or_path} has none. Add a "
            'chat_template.jinja beside it, or give rows with "text".'
        ) from error
    if regenerate == "none" and not re.search(r"\{%-?\s*generation\s*-?%\}", template):
        raise ValueError(
            f"Given answers can only be marked by a template with {{% generation %}}; that of {tokenizer.name_or_path} "
            "has none. Let the target write the answers: --regenerate engine (or transformers)."
        )


class PromptBar(tqdm):
    """Counts prompts, and moves with every answer; a batch of prompts may take minutes."""

    def __init__(self, *args, **kwargs):
        # Parts of prompts are shown as whole ones.
        shape = "{desc}: {percentage:3.0f}%|{bar}| {n:.0f}/{total} [{elapsed}<{remaining}{postfix}]"
        super().__init__(*args, bar_format=shape, **kwargs)
        self.share = self.batch_end = 0.0

    def start_batch(self, dialogues: list[Dialogue]) -> None:
        self.batch_end = round(self.n) + len(dialogues)
        self.share = len(dialogues) / max(1, sum(len(dialogue.turns) for dialogue in dialogues))

    def answered(self) -> None:
        self.update(min(self.share, self.batch_end - self.n))

    def finish(self, prompts: int) -> None:
        """All of the first ``prompts`` are done; a chat that ended early had fewer answers than turns."""
        self.update(prompts - self.n)


def write_rows(
    file: RowsFile,
    texts: Dataset,
    plan: list[int],
    tokenizer: PreTrainedTokenizerBase,
    settings: Settings,
    make_writer: Callable[[Callable[[], None]], Writer],
) -> None:
    """Write the rows of ``plan`` (indices of ``texts``), going on where ``file`` ends.

    ``make_writer`` is called when the first usable prompt is found: an engine takes a minute to start. Its argument is
    to be called for every answer. Raises ValueError when no text gives a row.
    """
    first, step = file.progress.prompts, settings.batch_size
    with PromptBar(total=len(plan), initial=first, desc="prepare") as bar:
        writer = functools.cache(lambda: make_writer(bar.answered))
        for start in range(first, len(plan), step):
            chosen = list(enumerate(plan[start : start + step], start))
            if settings.regenerate == "none":
                found = [given_rows(texts[i], tokenizer, settings) for _, i in chosen]
            else:
                dialogues = [Dialogue(texts[i], number, tokenizer, settings) for number, i in chosen]
                bar.start_batch(dialogues)
                regenerate(dialogues, lambda requests: writer()(requests))
                found = [(dialogue.rows, dialogue.problem) for dialogue in dialogues]
            rows = [row for part, _ in found for row in part]
            left_out = Counter(problem for part, problem in found if not part)
            file.append(rows, start + len(chosen), left_out)
            bar.finish(start + len(chosen))
            bar.set_postfix(rows=file.progress.rows, tokens=file.progress.learned_tokens)
    if not file.progress.rows:
        counts = ", ".join(f"{count} {reason}" for reason, count in file.progress.left_out.items())
        raise ValueError(
            f"At least one text must give a training row, found none in {len(plan)} ({counts}); give other texts, or "
            "change --prompt_length or --max_length."
        )
