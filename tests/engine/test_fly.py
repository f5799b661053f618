# SPDX-License-Identifier: Apache-2.0
"""FLy (lossy, opt-in): never unsure enough, the text is the target's; else it differs where the rule allows, and only
there. The judge knows no tree: it reads the target's log-probabilities along the text, as a prompt.

That holds the KV cache too: were the rows kept not those of the token that was emitted, later tokens would not be the
target's after it.
"""

import math
import re

import pytest
from engine_runner import generate, sampling_params, spec_counters
from requests_mix import CORE, request

from vllm_kvspec.engine import ops

WINDOW, THRESHOLD = 2, 0.3
FLY = {"rejection_sample_method": "fly", "fly_window_size": WINDOW, "fly_entropy_threshold": THRESHOLD}


def greedy(count: int = 8) -> list[dict]:
    return [request(30 + 7 * i, 190 * i, temperature=0.0, max_tokens=60, logprobs=0) for i in range(count)]


def judged(llm, batch: list[dict], samples: list) -> list[str]:
    """Of every token that is not the target's own after what stands before it: "allowed", or what forbids it."""
    params = sampling_params({"max_tokens": 1, "prompt_logprobs": 3})
    texts = [one["prompt"] + found[0]["token_ids"] for one, found in zip(batch, samples, strict=True)]
    outputs = llm.generate([{"prompt_token_ids": text} for text in texts], params, use_tqdm=False)
    verdicts = []
    for one, found, output in zip(batch, samples, outputs, strict=True):
        steps = output.prompt_logprobs[len(one["prompt"]) :]
        said = found[0]["token_ids"]
        own = [step[token].rank == 1 for step, token in zip(steps, said, strict=True)]
        for i, step in enumerate(steps):
            told = found[0]["logprobs"][i][str(said[i])]
            assert told == pytest.approx(step[said[i]].logprob, abs=2e-3), f"token {i} is told another log-probability"
            if own[i]:
                continue
            best = sorted((entry.logprob for entry in step.values()), reverse=True)[:3]
            entropy = -sum(math.exp(p) * p for p in best)
            # An answer may end within a window, at max_tokens.
            is_followed = all(own[i + 1 : i + 1 + WINDOW])
            sure = entropy < THRESHOLD - 1e-3
            verdicts.append("the target was sure" if sure else "allowed" if is_followed else "its window is broken")
    return verdicts


def test_a_threshold_that_is_never_reached(make_engine, spec, check):
    # Three tokens have an entropy of ln 3 = 1.0986 at most.
    with make_engine(spec(12, **FLY | {"fly_entropy_threshold": 1.1})) as llm:
        check(llm, CORE)
        check(llm, ("mixed", "logprobs"))


def broken_window(walk):
    return lambda *args: walk(*args[:-1], 0)


def broken_gate(scores):
    return lambda *args: scores(*args[:-1], 0.0)


@pytest.mark.once
def test_texts_differ_where_the_rule_allows_it(make_engine, spec, monkeypatch):
    """At temperature 0, and that the judge finds what breaks the rule."""
    batch = greedy()
    with make_engine(spec(16, graft=True, **FLY)) as llm:
        (samples,) = generate(llm, [batch])
        counters = spec_counters(llm)
        assert set(judged(llm, batch, samples)) == {"allowed"}
        for name, broken, verdict in (
            ("tree_walk", broken_window, "its window is broken"),
            ("loose_scores", broken_gate, "the target was sure"),
        ):
            with monkeypatch.context() as patch:
                patch.setattr(ops, name, broken(getattr(ops, name)))
                (samples,) = generate(llm, [batch])
            assert verdict in judged(llm, batch, samples)
    assert counters["accepted_tokens"] / counters["drafts"] > 1.5


def test_what_a_request_asks_for_still_holds(make_engine, spec):
    """Grammars, allowed tokens, bad words, min_tokens: what the target may not say is not followed either. And the same
    requests with the same drafts are told the same again, at temperature 1 too."""
    regexes = (r"(yes|no|maybe)( and (yes|no|maybe)){4}", r"[0-9]{4}-[0-9]{2}-[0-9]{2}", r"(ab|cd|ef){8}")
    grammar = {"temperature": 0.0, "ignore_eos": False, "max_tokens": 64}
    batch = [request(9 + 8 * i, 170 * i, regex=regex, **grammar) for i, regex in enumerate(regexes)]
    allowed = list(range(100, 400))
    batch += [
        request(30, 500, temperature=1.0, seed=1, allowed_token_ids=allowed),
        request(40, 700, temperature=0.0, bad_words=["self"]),
        request(20, 60, temperature=1.0, seed=2, min_tokens=20, ignore_eos=False, repetition_penalty=1.2),
    ]
    with make_engine(spec(16, graft=False, **FLY | {"fly_window_size": 1, "fly_entropy_threshold": 0.0})) as llm:
        samples, again = generate(llm, [batch, batch])
    for regex, found in zip(regexes, samples, strict=False):
        assert re.fullmatch(regex, found[0]["text"]), found[0]["text"]
    assert set(samples[3][0]["token_ids"]) <= set(allowed)
    assert "self" not in samples[4][0]["text"]
    assert len(samples[5][0]["token_ids"]) >= 20
    assert [found[0]["token_ids"] for found in samples] == [found[0]["token_ids"] for found in again]
