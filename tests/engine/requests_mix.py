# SPDX-License-Identifier: Apache-2.0
"""The requests every identity test sends: lengths from 1 token to the edge of the context, and every sampling feature
that meets speculation. Prompts are real text, from this repository's own sources and README."""

from functools import cache

from engine_runner import ROOT, TARGET

MAX_MODEL_LEN = 256
BLOCK = 16


@cache
def text_tokens() -> list[int]:
    from transformers import AutoTokenizer

    files = ["kernels/reference.py", "vllm_kvspec/tree.py", "examples/tiny/corpus.py", "setup.py"]
    text = "\n".join((ROOT / name).read_text() for name in files)
    return AutoTokenizer.from_pretrained(TARGET)(text)["input_ids"]


def prompt(length: int, offset: int) -> list[int]:
    return text_tokens()[offset : offset + length]


def request(length: int, offset: int, **params) -> dict:
    return {"prompt": prompt(length, offset), "params": {"max_tokens": 32, "ignore_eos": True, **params}}


def greedy_batch() -> list[dict]:
    lengths = (1, 2, 5, 17, 33, 64, 100, 133)
    return [request(n, 211 * i, temperature=0.0) for i, n in enumerate(lengths)]


def sampled_batch() -> list[dict]:
    shapes = [
        (1, {}),
        (7, {"top_p": 0.95, "top_k": 50}),
        (20, {"top_k": 200}),
        (48, {"top_p": 0.9, "temperature": 0.7}),
        (90, {}),
        (131, {"top_p": 0.95, "top_k": 50}),
    ]
    return [
        request(n, 97 * i + 40, **{"temperature": 1.0, "seed": 100 + i, **extra}) for i, (n, extra) in enumerate(shapes)
    ]


def logprobs_batch() -> list[dict]:
    common = {"max_tokens": 12, "logprobs": 3}
    listed = {"max_tokens": 12, "logprob_token_ids": [100, 300, 500, 44]}
    return [
        request(12, 60, temperature=0.0, **common),
        request(40, 160, temperature=1.0, seed=11, top_p=0.95, top_k=50, **common),
        request(25, 260, temperature=0.0, **listed),
        request(25, 360, temperature=1.0, seed=12, logprobs=4, **listed),
        request(25, 460, temperature=0.0, max_tokens=12),
    ]


def mixed_batch() -> list[dict]:
    """Requests that need a chain beside requests that get trees."""
    requests = [
        request(40, 10, temperature=0.0),
        request(30, 300, temperature=1.0, seed=1, repetition_penalty=1.3, presence_penalty=0.5),
        request(25, 500, temperature=0.0, regex=r"(yes|no|maybe)( and (yes|no|maybe)){4}", ignore_eos=False),
        request(35, 700, temperature=0.0, bad_words=["self", "return"]),
        request(35, 700, temperature=1.0, seed=5, n=2),
        request(20, 900, temperature=0.0, stop=["\n\n", "def "], ignore_eos=False),
        request(60, 1100, temperature=0.8, seed=9, min_tokens=20, ignore_eos=False),
        request(50, 1300, temperature=1.0, seed=3, frequency_penalty=0.7),
        request(10, 1500, temperature=0.0, prompt_logprobs=2),
        # vLLM refuses both with speculation; here every row is sampled as in plain decoding.
        request(36, 1600, temperature=1.3, seed=13, min_p=0.1),
        request(52, 1700, temperature=0.7, seed=14, logit_bias={44: 4.0, 300: -100.0}),
    ]
    for one in requests:
        one["params"]["max_tokens"] = 20
    return requests


def grammar_batch() -> list[dict]:
    """Several grammars in one batch, with a request before, between and after them that has none."""
    regexes = (None, r"(yes|no|maybe)( and (yes|no|maybe)){4}", r"[0-9]{4}-[0-9]{2}-[0-9]{2}", None, r"(ab|cd|ef){8}")
    requests = []
    for i, regex in enumerate((*regexes, None)):
        grammar = {"regex": regex, "ignore_eos": False} if regex else {}
        requests.append(request(9 + 8 * i, 170 * i, temperature=0.8 * (i % 2), seed=i, max_tokens=14, **grammar))
    return requests


def rare_batch() -> list[dict]:
    """Parameters that few send, and prompts of which all but one token is cached when they come."""
    cached = {"max_tokens": 6, "logprobs": 2}
    return [
        request(2 * BLOCK + 1, 900, temperature=0.0, max_tokens=1),
        request(30, 1400, temperature=0.0, allowed_token_ids=[44, 100, 300, 377, 500]),
        request(22, 1500, temperature=1.0, seed=21, allowed_token_ids=list(range(100, 400))),
        request(40, 20, temperature=0.0, repetition_detection={"max_pattern_size": 4, "min_count": 2}),
        request(28, 230, temperature=1.0, seed=22, stop_token_ids=[10, 14, 18], min_tokens=6, ignore_eos=False),
        request(36, 1250, temperature=1.0, seed=23, stop=["\n"], include_stop_str_in_output=True, ignore_eos=False),
        request(2 * BLOCK + 1, 900, temperature=0.0, **cached),
        request(2 * BLOCK + 1, 900, temperature=1.0, seed=24, **cached),
        request(2 * BLOCK + 1, 900, temperature=0.0, skip_reading_prefix_cache=True, **cached),
    ]


def edge_batch() -> list[dict]:
    """Up to the last position of the context, and prompts of exactly k blocks."""
    return [
        request(MAX_MODEL_LEN - 6, 0, temperature=0.0, max_tokens=64),
        request(MAX_MODEL_LEN - 18, 50, temperature=1.0, seed=2, max_tokens=64),
        request(4 * BLOCK, 400, temperature=0.0),
        request(4 * BLOCK + 1, 600, temperature=0.0),
        request(2 * BLOCK + 1, 800, temperature=1.0, seed=4),
    ]


BATCHES = {
    "greedy": greedy_batch,
    "sampled": sampled_batch,
    "mixed": mixed_batch,
    "grammars": grammar_batch,
    "edge": edge_batch,
    "logprobs": logprobs_batch,
    "rare": rare_batch,
}
# The edge batch twice: the second time its prompts are cached whole.
ALL = ("greedy", "sampled", "mixed", "grammars", "edge", "edge", "logprobs", "rare")
# Greedy, sampled, and the edges twice: the least that every drafter must get right.
CORE = ("greedy", "sampled", "edge", "edge")


def staggered(name: str, lengths: list[int]) -> list[dict]:
    """A batch of the mix whose requests end one after the other."""
    requests = BATCHES[name]()
    for request, length in zip(requests, lengths, strict=True):
        request["params"]["max_tokens"] = length
    return requests
