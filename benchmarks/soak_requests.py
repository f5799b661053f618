# SPDX-License-Identifier: Apache-2.0
"""The requests of ``soak.py``: drawn from a seed, answered once by plain decoding, compared again and again.

A request is ``{"prompt": [token ids], "params": {SamplingParams, as JSON has them}, "salt": str or None}``; what only
the engine takes and not the server has ``"offline": True``. A sample is ``{"token_ids", "text", "finish_reason",
"logprobs"}``, an answer a list of ``n`` of them.
"""

import hashlib
import json
import random
from collections import Counter
from typing import Any

MAX_MODEL_LEN = 256
# Plain decoding on other kernels: the largest difference of log-probabilities that float32 explains.
LOGPROB_TOLERANCE = 2e-3
# Until then an engine's memory still grows with what it sees for the first time.
WARM_REQUESTS = 300
# Differences of an engine that are kept in detail; all are counted.
MOST_REPORTED = 20
PATTERNS = (
    {"regex": r"(yes|no|maybe)( and (yes|no|maybe)){0,6}"},
    {"regex": r"[0-9]{4}-[0-9]{2}-[0-9]{2}( [a-z]{1,8}){0,4}"},
    {"choice": ["self.assertEqual", "self.assertTrue", "return None", "raise ValueError"]},
    {"json": {"type": "object", "properties": {"name": {"enum": ["a", "b", "list"]}, "size": {"type": "boolean"}},
              "required": ["name", "size"], "additionalProperties": False}},
)  # fmt: skip


def _sampled(rng: random.Random) -> dict[str, Any]:
    """What has a meaning at temperature > 0 alone."""
    params: dict[str, Any] = {"temperature": rng.choice((0.3, 0.7, 1.0, 1.0, 1.5)), "seed": rng.randrange(2**31)}
    for chance, key, values in (
        (0.3, "top_p", (0.5, 0.9, 0.95)),
        (0.3, "top_k", (1, 5, 50, 200)),
        (0.15, "min_p", (0.02, 0.1)),
        (0.1, "n", (2, 3)),
    ):
        if rng.random() < chance:
            params[key] = rng.choice(values)
    return params


# Chance, and what is drawn for a request of either kind; a later one overwrites an earlier one's keys.
FEATURES = (
    (0.08, lambda rng: {"repetition_penalty": rng.choice((0.9, 1.1, 1.3))}),
    (0.06, lambda rng: {"presence_penalty": rng.choice((-0.5, 0.5, 1.0))}),
    (0.06, lambda rng: {"frequency_penalty": rng.choice((0.3, 0.7))}),
    (0.06, lambda rng: {"bad_words": rng.sample(["self", "return", "None", "def", "the", "import"], 2)}),
    (0.10, lambda rng: {"stop": rng.sample(["\n\n", "def ", "return", "):", "\n", "# "], 2), "ignore_eos": False}),
    (0.05, lambda rng: {"include_stop_str_in_output": True}),
    (0.08, lambda rng: {"stop_token_ids": rng.sample(range(8, 60), 4), "ignore_eos": False}),
    (0.10, lambda rng: {"min_tokens": rng.choice((1, 8, 20)), "ignore_eos": False}),
    (0.08, lambda rng: {"logit_bias": {str(rng.randrange(500)): rng.choice((-100.0, -2.0, 2.0, 5.0))}}),
    (0.05, lambda rng: {"allowed_token_ids": sorted(rng.sample(range(500), rng.choice((6, 200))))}),
    (0.08, lambda rng: {"logprobs": rng.choice((0, 1, 5))}),
    (0.05, lambda rng: {"logprobs": 4, "logprob_token_ids": rng.sample(range(500), 4)}),
    (0.04, lambda rng: {"prompt_logprobs": 1}),
    (0.05, lambda rng: {"repetition_detection": {"max_pattern_size": 4, "min_count": 3}}),
    (0.08, lambda rng: {"structured_outputs": rng.choice(PATTERNS), "ignore_eos": False}),
)


def draw_request(rng: random.Random, text: list[int]) -> dict[str, Any]:
    """Prompts of 1 token to the edge of the context. Half begin where others do, and find their prefix cached."""
    length = min(int(2 ** rng.uniform(0, 8)), MAX_MODEL_LEN - 1)
    offset = rng.randrange(len(text) - length)
    if rng.random() < 0.5:
        offset -= offset % 128
    params = {"temperature": 0.0} if rng.random() < 0.5 else _sampled(rng)
    params |= {"max_tokens": rng.choice((1, 3, 8, 16, 32, 32, 64, 64, 128)), "ignore_eos": True}
    for chance, feature in FEATURES:
        if rng.random() < chance:
            params |= feature(rng)
    if "structured_outputs" in params:
        # Grammar and these would leave no token to choose.
        for key in ("allowed_token_ids", "bad_words", "logit_bias", "min_tokens", "stop", "stop_token_ids"):
            params.pop(key, None)
    params["max_tokens"] = min(params["max_tokens"], MAX_MODEL_LEN - length)
    params["min_tokens"] = min(params.get("min_tokens", 0), params["max_tokens"])
    salt = rng.choice(("a", "b")) if rng.random() < 0.1 else None
    request = {"prompt": text[offset : offset + length], "params": params, "salt": salt}
    if rng.random() < 0.03:
        params["skip_reading_prefix_cache"] = request["offline"] = True
    if rng.random() < 0.03:
        # Company without a seed: no two runs of plain decoding agree either, so nothing is compared.
        params.pop("seed", None)
    return request


def draw_requests(seed: int, count: int, text: list[int]) -> list[dict[str, Any]]:
    """``count`` first turns; ``text``: the token ids that prompts are cut from."""
    rng = random.Random(f"requests {seed}")
    return [draw_request(rng, text) for _ in range(count)]


def second_turns(
    seed: int, requests: list[dict], answers: list[list[dict]], text: list[int]
) -> list[tuple[int, dict[str, Any]]]:
    """For most of every third request one that goes on where its answer ends, and finds blocks that decoding wrote:
    (number of the first, the second)."""
    rng, turns = random.Random(f"second turns {seed}"), []
    for number in range(0, len(requests), 3):
        request, answer, turn = requests[number], answers[number], draw_request(rng, text)
        prompt = request["prompt"] + answer[0]["token_ids"] + turn["prompt"][:8]
        if len(prompt) < MAX_MODEL_LEN:
            room = MAX_MODEL_LEN - len(prompt)
            turn["params"]["max_tokens"] = min(turn["params"]["max_tokens"], room)
            turn["params"]["min_tokens"] = min(turn["params"]["min_tokens"], turn["params"]["max_tokens"])
            turns.append((number, {**turn, "prompt": prompt, "salt": request["salt"]}))
    return turns


def key_of(request: dict[str, Any]) -> str:
    """A name for a request that another one with the same content has too."""
    return hashlib.sha256(json.dumps(request, sort_keys=True).encode()).hexdigest()[:16]


def is_repeatable(request: dict[str, Any]) -> bool:
    """Whether plain decoding must give the same answer twice."""
    return request["params"]["temperature"] == 0.0 or "seed" in request["params"]


def sample_of(output) -> dict[str, Any]:
    """vLLM's CompletionOutput as plain data."""
    logprobs = None
    if output.logprobs is not None:
        logprobs = [{str(token): entry.logprob for token, entry in step.items()} for step in output.logprobs]
    return {
        "token_ids": list(output.token_ids),
        "text": output.text,
        "finish_reason": output.finish_reason,
        "logprobs": logprobs,
    }


def first_difference(found: dict[str, Any], expected: dict[str, Any], whole: bool) -> dict[str, Any] | None:
    """Where a sample parts from plain decoding's, or None. An aborted one (not ``whole``) has to be its beginning.

    Returns ``{"what", "position", "found", "expected"}``, position in generated tokens.
    """
    have, want = found["token_ids"], expected["token_ids"]
    position = next((i for i, (a, b) in enumerate(zip(have, want, strict=False)) if a != b), min(len(have), len(want)))

    def differs(what: str, one: Any, other: Any) -> dict[str, Any]:
        return {"what": what, "position": position, "found": one, "expected": other}

    if position < min(len(have), len(want)):
        return differs("token", have[position], want[position])
    if len(have) > len(want) or (whole and len(have) < len(want)):
        return differs("length", len(have), len(want))
    if found["text"] != expected["text"] if whole else not expected["text"].startswith(found["text"]):
        return differs("text", found["text"], expected["text"])
    if whole and found["finish_reason"] != expected["finish_reason"]:
        return differs("finish_reason", found["finish_reason"], expected["finish_reason"])
    # None over HTTP, where they have another form.
    for step, (a, b) in enumerate(zip(found["logprobs"] or (), expected["logprobs"] or (), strict=False)):
        # The last of the top k may tie.
        shared = a.keys() & b.keys()
        if len(shared) < len(b) - 1 or any(abs(a[token] - b[token]) > LOGPROB_TOLERANCE for token in shared):
            return {**differs("logprobs", a, b), "position": step}
    return None


def join(samples: dict[int, dict[str, Any]], index: int, piece: dict[str, Any]) -> None:
    """Add a piece of a stream, or a whole answer, to sample ``index``."""
    if (sample := samples.get(index)) is None:
        samples[index] = piece
        return
    sample["token_ids"] += piece["token_ids"]
    sample["text"] += piece["text"]
    sample["finish_reason"] = piece["finish_reason"]
    if piece["logprobs"]:
        sample["logprobs"] += piece["logprobs"]


class Tally:
    """Counts what came of the requests of a pool, and compares it.

    pool: ``{"request", "answer", "repeats", "first", "next"}``: plain decoding's answer, whether it gives it twice,
    whether the request is a first turn, and the number of its second one or None.
    """

    def __init__(self, pool: list[dict[str, Any]]):
        self.pool = pool
        self.counts: Counter[str] = Counter()
        self.differences: list[dict[str, Any]] = []

    def compare(self, number: int, samples: dict[int, dict], whole: bool) -> None:
        """What came of request ``number``: all of it (``whole``) or as much as came before it ended otherwise."""
        one, tokens = self.pool[number], sum(len(sample["token_ids"]) for sample in samples.values())
        if not one["repeats"]:
            self.counts["not_compared"] += tokens
            return
        self.counts["tokens"] += tokens
        found = []
        if whole and len(samples) != len(one["answer"]):
            found.append({"what": "samples", "found": len(samples), "expected": len(one["answer"])})
        for index, sample in samples.items():
            if difference := first_difference(sample, one["answer"][index], whole):
                found.append({"sample": index, **difference})
        self.counts["differing"] += len(found)
        for difference in found[: MOST_REPORTED - len(self.differences)]:
            self.differences.append({**difference, "number": number, "request": one["request"], "whole": whole})
