# SPDX-License-Identifier: Apache-2.0
"""Verification rules: exact over a vocabulary that can be enumerated, and what they accept as computed along texts."""

import importlib.util
import itertools
import json
import sys
from pathlib import Path

import pytest
import torch
import verification_rules as rules
from transformers import AutoModelForCausalLM

from vllm_kvspec.eval import verification
from vllm_kvspec.eval.acceptance import rejection_survival
from vllm_kvspec.eval.texts import Text
from vllm_kvspec.models.draft_head import KVSpecDraftModel

EXAMPLES = Path(__file__).parents[2] / "examples"
TINY = EXAMPLES / "tiny"
VOCAB, DEPTH = 3, 2
CASES = {
    "token": (rules.token_rule, 1),
    "block": (rules.block_rule, 1),
    "k-seq 2": (rules.k_seq_rule, 2),
    "k-seq 3": (rules.k_seq_rule, 3),
    "multi-path block 2": (rules.multipath_block_rule, 2),
    "multi-path block 3": (rules.multipath_block_rule, 3),
}


def models(seed: int, zeros: bool = False):
    """Target and head; with ``zeros``, the head never drafts the last token."""
    return rules.random_model(seed, VOCAB), rules.random_model(seed + 100, VOCAB, zeros)


def error(name: str, seed: int, zeros: bool = False) -> float:
    """Largest difference between what a rule writes and the target's distribution of the same tokens."""
    rule, drafts = CASES[name]
    p, q = models(seed, zeros)
    found = rules.written(rule, p, q, drafts, DEPTH, DEPTH + 1)
    texts = itertools.product(range(VOCAB), repeat=DEPTH + 1)
    return max(abs(found.get(text, 0.0) - rules.probability(p, (), text)) for text in texts)


@pytest.mark.parametrize("name", CASES)
def test_what_a_rule_writes_is_distributed_as_the_target(name):
    assert max(error(name, 0), error(name, 1, zeros=True)) < 1e-9


DEFECTS = {
    "token": (verification, "k_seq_factor", lambda odds, drafts: torch.full_like(odds.log_p, 0.7)),
    "block": (rules, "passes_at", lambda kept, residual: kept),
    "k-seq 2": (verification, "k_seq_factor", lambda odds, drafts: torch.ones_like(odds.log_p)),
    "k-seq 3": (verification, "accepted_share", lambda odds, factor: 0.9 * torch.ones_like(odds.log_p)),
    "multi-path block 2": (rules, "select", lambda p, q, prefix, paths: paths[0]),
    "multi-path block 3": (rules, "places", lambda p, q, prefix, path: tuple(map(float, path))),
}


@pytest.mark.parametrize("name", CASES)
def test_a_broken_rule_writes_something_else(name, monkeypatch):
    monkeypatch.setattr(*DEFECTS[name])
    assert error(name, 0) > 1e-3


def odds_of_all_texts(p, q) -> tuple[verification.PathOdds, torch.Tensor]:
    """Along every text of DEPTH tokens, and the texts' probabilities under p."""
    texts = list(itertools.product(range(VOCAB), repeat=DEPTH))
    along = [torch.stack([torch.stack([m(text[:i]) for i in range(DEPTH)]) for text in texts]).log() for m in (p, q)]
    weights = torch.tensor([rules.probability(p, (), text) for text in texts], dtype=torch.float64)
    return verification.path_odds(*along, torch.tensor(texts)), weights


@pytest.mark.parametrize("name", CASES)
def test_accepted_tokens_along_texts_equal_those_of_the_rule(name):
    rule, drafts = CASES[name]
    kind = name.rstrip(" 23")
    for seed, zeros in ((0, False), (1, True), (2, False)):
        p, q = models(seed, zeros)
        odds, weights = odds_of_all_texts(p, q)
        single, multi = verification.SINGLE.get(kind), verification.MULTI.get(kind)
        survival = weights @ (single(odds) if single else multi(odds, drafts))
        found = rules.outcomes(rule, p, q, (), drafts, DEPTH)
        for depth in range(DEPTH):
            reached = sum(chance for (_, accepted), chance in found.items() if accepted > depth)
            assert survival[depth].item() == pytest.approx(reached, abs=1e-9), (seed, depth)
        bound = weights @ verification.bound_survival(odds, drafts)
        optimum = (weights @ verification.optimal_first(odds, drafts)).item()
        assert (survival <= bound + 1e-9).all()
        assert survival[0] - 1e-9 <= optimum <= bound[0] + 1e-9


def test_a_head_that_drafts_a_part_of_the_vocabulary_needs_only_that_part():
    torch.manual_seed(0)
    log_p, log_q = (torch.randn(200, 3, 9).log_softmax(-1) for _ in range(2))
    draft_ids = torch.tensor([1, 2, 5, 7])
    outside = torch.ones(9, dtype=torch.bool).index_fill(0, draft_ids, False)
    log_q = log_q.masked_fill(outside, float("-inf")).log_softmax(-1)
    truth = torch.randint(9, (200, 3))
    whole, part = (verification.path_odds(log_p, log_q, truth, ids) for ids in (None, draft_ids))
    assert part.log_ratio.shape == (200, 3, 4)
    torch.testing.assert_close(part.below, whole.below)
    rules = {name: rule(whole) - rule(part) for name, rule in verification.SINGLE.items()}
    rules |= {name: rule(whole, 3) - rule(part, 3) for name, rule in verification.MULTI.items()}
    rules["optimum"] = verification.optimal_first(whole, 3) - verification.optimal_first(part, 3)
    assert max(difference.abs().max() for difference in rules.values()) < 1e-9, rules


def test_the_optimum_for_first_tokens_is_that_of_the_transport():
    """The dual's minimum over all sets of tokens, of which the package looks at V + 1."""
    p, q = models(3)
    odds, _ = odds_of_all_texts(p, q)
    for drafts in (1, 2, 3):
        sets = (list(s) for size in range(VOCAB + 1) for s in itertools.combinations(range(VOCAB), size))
        least = min(float(p(())[s].sum() - q(())[s].sum() ** drafts) for s in sets)
        assert verification.optimal_first(odds, drafts)[0].item() == pytest.approx(1 + least, abs=1e-12)


def test_first_tokens():
    torch.manual_seed(0)
    log_p, log_q = (torch.randn(200, 6).log_softmax(-1) for _ in range(2))
    noise = -torch.empty(200, 6).exponential_().log()
    truth = (log_p + noise).argmax(-1)
    found = verification.first_tokens(log_p, log_q, noise, truth, 1)
    overlap = torch.minimum(log_p.exp(), log_q.exp()).sum(-1, keepdim=True)
    torch.testing.assert_close(found["best, one sampled"].float(), overlap)
    torch.testing.assert_close(found["best"].float(), log_p.exp().gather(-1, log_q.argmax(-1, keepdim=True)))
    assert verification.first_tokens(log_p, log_p, noise, truth, 1)["coupled"].all()
    everything = verification.first_tokens(log_p, log_q, noise, truth, 6)
    assert all((accepted > 1 - 1e-5).all() for accepted in everything.values())


def test_noise_that_head_and_target_share_spoils_ratios_but_not_the_walk():
    """Drafts under the target's noise are distributed as q, yet what is drawn after a rejection is no longer free."""
    draws = 200_000
    p, q = torch.tensor([0.6, 0.3, 0.1]), torch.tensor([0.2, 0.2, 0.6])
    generator = torch.Generator().manual_seed(0)
    noise, fresh = (-torch.empty(draws, 3).exponential_(generator=generator).log() for _ in range(2))
    draft = (q.log() + noise).argmax(-1)
    passes = torch.rand(draws, generator=generator) < (p / q)[draft]

    def written(correction_noise):
        correction = ((p - q).clamp(min=0).log() + correction_noise).argmax(-1)
        return torch.where(passes, draft, correction)

    def shares(tokens):
        return torch.bincount(tokens, minlength=3) / draws

    independent, walk = shares(written(fresh)), shares((p.log() + noise).argmax(-1))
    assert (independent - p).abs().max() < 0.005
    assert (walk - p).abs().max() < 0.005
    assert (shares(written(noise)) - p).abs().max() > 0.03


@pytest.mark.slow
def test_along_a_text_of_the_tiny_pair():
    target = AutoModelForCausalLM.from_pretrained(TINY / "target", dtype=torch.float32).eval()
    head = KVSpecDraftModel.from_pretrained(TINY / "draft", dtype=torch.float32).eval()
    torch.manual_seed(0)
    text = Text(target.generate(torch.tensor([[5, 6, 7]]), max_new_tokens=24, do_sample=True)[0].tolist(), 3, seed=0)
    found = verification.rule_survival(head, target, text, [2, 4], temperature=0.7)
    torch.testing.assert_close(found["token"], rejection_survival(head, target, text, temperature=0.7))
    for kind in ("k-seq", "multi-path block"):
        assert (found[f"{kind} 4"] <= found["bound 4"] + 1e-9).all(), kind
    assert found["multi-path block 4"].sum() > found["multi-path block 2"].sum() > found["block"].sum()
    assert found["block"].sum() >= found["token"].sum()


@pytest.mark.slow
def test_the_study_runs_on_the_tiny_pair(tmp_path, monkeypatch):
    spec = importlib.util.spec_from_file_location("kvspec_methods", EXAMPLES / "study" / "methods.py")
    methods = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(methods)
    words = f"""--target_model {TINY}/target --draft_model {TINY}/draft --data_path {EXAMPLES}/prompts.jsonl
        --num_prompts 2 --max_new_tokens 16 --temperatures 0.7 --num_drafts 2 --num_nodes 8 --seed 0
        --work_dir {tmp_path}/work --output {tmp_path}/methods"""
    monkeypatch.setattr(sys, "argv", ["methods.py", *words.split()])
    methods.main()
    tables = (tmp_path / "methods.md").read_text().partition("## ")[2]
    # The same command again takes every text from where it was kept.
    monkeypatch.setattr(methods, "measure", lambda *_: pytest.fail("measured again"))
    methods.main()
    assert (tmp_path / "methods.md").read_text().partition("## ")[2] == tables
    assert all(label in tables for label, _, _ in methods.METHODS.values())
    report = json.loads((tmp_path / "methods.json").read_text())
    rules = {row["rule"]: row for row in report["rules"][0]["equal_rows"]}
    assert set(rules) == {*verification.SINGLE, *verification.MULTI, *verification.WALKS}
    assert (rules["k-seq"]["drafts"], rules["k-seq"]["depth"], rules["token"]["depth"]) == (2, 4, 8)
    walk = rules["walk, coupled"]["accepted"]
    assert all(row["coupled_more"] == pytest.approx(walk - row["accepted"], abs=2e-4) for row in rules.values())
    again = {row["what"]: row for row in report["redraft"][0]["rows"]}
    fresh, instead = again["fresh"], again["instead, 1 rows or more"]
    assert fresh["tau"] == fresh["per_pass"] > 1
    assert fresh["tau_more_se"] == fresh["time_more_se, CPU"] == 0
    assert instead["per_pass"] > fresh["per_pass"]
    assert instead["tau_more"] == pytest.approx(instead["tau"] - fresh["tau"], abs=2e-4)
    cost = methods.PASS_COSTS["CPU"]
    times = [1 / run["tau"] + cost / run["per_pass"] for run in (instead, fresh)]
    assert instead["time_more, CPU"] == pytest.approx(times[0] / times[1] - 1, abs=1e-3)
