# SPDX-License-Identifier: Apache-2.0
"""The bundled head drafts well for the bundled target: acceptance lengths on held-out prompts, from vLLM's counters.

The bounds are some tenths below what was measured when the pair was made (examples/tiny/README.md has the numbers over
more prompts); they fail when the head, the tree or the noise stops working, not when a number moves a little.
"""

import json

import pytest
from engine_runner import ROOT, TARGET, generate, spec_counters


@pytest.fixture(scope="module")
def prompts() -> list[list[int]]:
    """Held-out texts and questions, as the demo sends them."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    rows = [json.loads(line) for line in (ROOT / "examples/prompts.jsonl").read_text().splitlines()]
    texts = [
        row["prompt"]
        if row.get("prompt")
        else tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, tokenize=False)
        for row in rows
    ]
    return [tokenizer(text, add_special_tokens=False)["input_ids"][:128] for text in texts]


@pytest.fixture
def tau(make_engine, spec, prompts):
    def measure(temperature: float, **keys) -> float:
        params = {"max_tokens": 64, "temperature": temperature}
        batch = [{"prompt": prompt, "params": {**params, "seed": i}} for i, prompt in enumerate(prompts)]
        with make_engine(spec(**keys, graft=False)) as llm:
            generate(llm, [batch])
            counters = spec_counters(llm)
        return 1 + counters["accepted_tokens"] / counters["drafts"]

    return measure


def test_greedy(tau):
    chain = tau(0.0, tree="chain", num_speculative_tokens=8)
    tree = tau(0.0, num_speculative_tokens=16)
    print(f"chain of 8: {chain:.2f}, tree of 16: {tree:.2f}")
    assert chain > 2.7
    assert tree > 3.5
    assert tree > 1.1 * chain


def test_noise_coupling_at_temperature_1(tau):
    coupled = tau(1.0)
    plain = tau(1.0, draft_noise="none")
    print(f"coupled: {coupled:.2f}, uncoupled: {plain:.2f}")
    assert coupled > 2.2
    assert coupled > 1.3 * plain
