# SPDX-License-Identifier: Apache-2.0
"""Offline acceptance against what can be known by other means: transformers' own generation, oracles, enumeration."""

import itertools
import math

import pytest
import torch
from transformers import Qwen3Config, Qwen3ForCausalLM

from vllm_kvspec.eval import texts as texts_module
from vllm_kvspec.eval.acceptance import (
    COUPLED,
    REJECTION,
    UNCOUPLED,
    accepted_depth,
    by_context,
    evaluate,
    fitting_sizes,
    rejection_survival,
    text_acceptance,
)
from vllm_kvspec.eval.statistics import summarise, summarise_runs
from vllm_kvspec.eval.texts import NoiseProcessor, Text, cached_texts, repeated_share
from vllm_kvspec.kernels.reference import gumbel_noise, tree_build
from vllm_kvspec.models.draft_head import KVSpecDraftModel, head_config_for
from vllm_kvspec.models.drafting import draft_candidates, draft_logits
from vllm_kvspec.models.target import view_target

BLOCK, VOCAB = 3, 40


def make_target(vocab_size: int = VOCAB) -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=vocab_size, tie_word_embeddings=True, max_position_embeddings=128,
        eos_token_id=None, bos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    return Qwen3ForCausalLM(config).eval()


def make_head(target, **fields) -> KVSpecDraftModel:
    """A head whose every parameter is random, so that nothing is zero by luck of the start."""
    fields = {"draft_block_size": BLOCK, "num_hidden_layers": 1, **fields}
    torch.manual_seed(1)
    head = KVSpecDraftModel(head_config_for(target.config, **fields)).eval()
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.normal_(std=0.3)
    return head


def bigram_head(target, ids: list[int], **fields) -> KVSpecDraftModel:
    """Proposes what followed each token last in ``ids``: often right, not always."""
    head = make_head(target, transition_rank=VOCAB, **fields)
    with torch.no_grad():
        head.transition_in.weight.copy_(torch.eye(VOCAB))
        head.transition_out.weight.zero_()
        for token, following in itertools.pairwise(ids):
            head.transition_out.weight[:, token] = 0
            head.transition_out.weight[following, token] = 1000.0
    return head


@pytest.fixture(scope="module")
def pair():
    target = make_target()
    return target, make_head(target)


def test_accepted_depth_follows_paths_not_levels():
    # Node 1 (token 5) has the child 3 (token 7); node 2 (token 6) has the child 4 (token 8).
    parent, depth = torch.tensor([[0, 0, 0, 1, 2]]), torch.tensor([[0, 1, 1, 2, 2]])
    tokens = torch.tensor([[5, 6, 7, 8]])
    by_size = {
        (5, 7, 1): [0, 1, 1, 2, 2], (6, 7, 1): [0, 0, 1, 1, 1], (6, 8, 1): [0, 0, 1, 1, 2],
        (9, 7, 8): [0, 0, 0, 0, 0], (7, 5, 5): [0, 0, 0, 0, 0],
    }  # fmt: skip
    for truth, expected in by_size.items():
        assert accepted_depth(tokens, parent, depth, torch.tensor([truth])).tolist() == [expected], truth


@pytest.mark.parametrize("drafting", ["block", "autoregressive"])
def test_transformers_own_generation_is_the_judge(drafting):
    """Greedy ``generate`` from every anchor's prefix decides which of the drafted tokens are right."""
    target = make_target()
    prompt = torch.randint(VOCAB, (1, 6), generator=torch.Generator().manual_seed(3))

    def generate(ids: torch.Tensor, count: int) -> torch.Tensor:
        # Without a mask, generate would take the token 0 for padding.
        mask = torch.ones_like(ids)
        return target.generate(ids, attention_mask=mask, max_new_tokens=count, do_sample=False, pad_token_id=0)

    ids = generate(prompt, 24)
    head = bigram_head(target, ids[0, :20].tolist(), drafting=drafting)
    found = text_acceptance(head, target, Text(ids[0].tolist(), 6, 0), [8])
    view, judged = view_target(target, head.config, ids), {"chain": [], "8": []}
    for base in range(6, ids.shape[1] - BLOCK):
        right = generate(ids[:, : base + 1], BLOCK)[0, base + 1 :].tolist()
        inputs = (head, target, view, ids, torch.tensor([base]), None, torch.tensor([head.config.greedy_scale]))
        for name, options, size in (("chain", {"beam": 1, "width": 1}, BLOCK), ("8", {"beam": 8, "width": 4}, 8)):
            with torch.no_grad():
                tokens, parent, _, _ = tree_build(*draft_candidates(*inputs, **options), size)
            judged[name].append(longest_path(right, tokens[0].tolist(), parent[0].tolist()))
    assert {name: accepted.tolist() for name, accepted in found.items()} == judged
    assert set(judged["chain"]) >= {0, BLOCK}, "a judge that always says the same proves nothing"


def longest_path(right: list[int], tokens: list[int], parent: list[int]) -> int:
    """How far ``right`` can be walked from the root of a tree."""
    node = 0
    for length, token in enumerate(right):
        children = [n for n in range(1, len(parent)) if parent[n] == node and tokens[n - 1] == token]
        if not children:
            return length
        node = children[0]
    return len(right)


def step_by_step(survival: torch.Tensor) -> tuple[float, float]:
    """Expected drafts and tokens of a run from the first anchor, by recursion over what may happen."""
    reached = torch.cat((torch.ones(len(survival), 1), survival, torch.zeros(len(survival), 1)), dim=1).tolist()

    def run(position: int) -> tuple[float, float]:
        if position >= len(reached):
            return 0.0, 0.0
        drafts, tokens = 1.0, 0.0
        for k in range(len(reached[0]) - 1):
            probability = reached[position][k] - reached[position][k + 1]
            later = run(position + k + 1)
            drafts, tokens = drafts + probability * later[0], tokens + probability * (k + 1 + later[1])
        return drafts, tokens

    return run(0)


def test_free_run_is_the_engines_walk():
    # Anchors 0..5 would accept these many tokens; the run visits 0, 3, 4.
    accepted = torch.tensor([2, 3, 3, 0, 1, 3])
    acceptance = summarise([(accepted[:, None] > torch.arange(BLOCK)).double()])
    assert acceptance.drafts == 3 and acceptance.anchors == 6
    assert acceptance.tau == pytest.approx(1 + (2 + 0 + 1) / 3)
    assert acceptance.tau_all == pytest.approx(1 + 12 / 6)
    assert acceptance.conditional_free_run == pytest.approx([2 / 3, 1 / 2, 0])
    assert acceptance.conditional == pytest.approx([5 / 6, 4 / 5, 3 / 4])
    assert acceptance.survival == pytest.approx([5 / 6, 4 / 6, 3 / 6])
    assert acceptance.retention == pytest.approx(0.75 / (5 / 6))


def test_free_run_of_probabilities_is_their_expectation():
    generator = torch.Generator().manual_seed(0)
    survival = [torch.rand(count, BLOCK, generator=generator).cumprod(dim=1) for count in (7, 9, 2)]
    drafts, tokens = (sum(column) for column in zip(*map(step_by_step, survival), strict=True))
    acceptance = summarise(survival)
    assert acceptance.drafts == pytest.approx(drafts, rel=1e-6)
    assert acceptance.tau == pytest.approx(tokens / drafts, rel=1e-6)


def test_runs_are_summarised_over_their_own_drafts():
    """Two texts of two drafts, one of them deeper than what is listed; a text without drafts counts for nothing."""
    found = summarise_runs([[0, 3], [], [1, 0]], block=2)
    assert (found.tau, found.tau_all, found.drafts, found.anchors) == (2.0, 2.0, 4, 4)
    assert found.survival == [0.5, 0.25] and found.conditional == [0.5, 0.5]
    assert all(math.isnan(x) for x in (*found.fresh, *found.gap, found.retention))


def test_gap_compares_the_same_anchors():
    """Against a plain loop: among anchors right up to k, the next depth against a new draft k positions ahead."""
    accepted = [torch.tensor([2, 0, 3, 1, 1, 0, 2]), torch.tensor([3, 0, 0])]
    acceptance = summarise([(one[:, None] > torch.arange(BLOCK)).double() for one in accepted])
    for k in range(BLOCK):
        same = [(one, p) for one in accepted for p in range(len(one) - k) if one[p] >= k]
        fresh = sum(bool(one[p + k] >= 1) for one, p in same) / len(same)
        free = sum(bool(one[p] >= k + 1) for one, p in same) / len(same)
        assert acceptance.fresh[k] == pytest.approx(fresh)
        assert acceptance.gap[k] == pytest.approx(fresh - free)
    assert acceptance.gap[0] == 0 and acceptance.gap[1] != 0


def test_standard_errors():
    """Of texts of one anchor, tau is a mean: its error is the standard deviation over the square root of the count."""
    accepted = torch.arange(50) * 4 // 50
    survival = [(one[None, None] > torch.arange(3)).double() for one in accepted]
    acceptance = summarise(survival)
    assert acceptance.tau_se == pytest.approx(accepted.double().std().item() / 50**0.5, rel=0.1)
    assert acceptance.tau_se == summarise(survival).tau_se
    assert summarise(survival[:1] * 5).tau_se == pytest.approx(0, abs=1e-12)


def test_what_was_never_reached_is_unknown_not_zero():
    acceptance = summarise([torch.tensor([[1.0, 0, 0], [0, 0, 0]])])
    assert acceptance.conditional[:2] == [0.5, 0]
    assert math.isnan(acceptance.conditional[2]) and math.isnan(acceptance.retention)


def test_repeated_share():
    looping = Text([1, 2, 3] * 6, 3, 0)
    assert repeated_share(looping, order=3) == pytest.approx(13 / 15)
    assert repeated_share(Text(list(range(20)), 3, 0), order=3) == 0


def test_a_head_that_knows_the_text_is_accepted_everywhere(pair):
    target, _ = pair
    ids = [i % 7 for i in range(30)]
    found, half, extra = evaluate(bigram_head(target, ids), target, [Text(ids, 2, 0)], [1, BLOCK, 8], temperature=0.0)
    (row,) = extra["by_context"]
    assert (row["context"], row["anchors"], row["tau"], row["first"]) == (256, 28 - BLOCK, BLOCK + 1, 1.0)
    assert repr(found) == repr(half)
    assert found["chain"].tau == found["3"].tau == found["8"].tau == BLOCK + 1
    assert found["1"].tau == 2
    assert found["chain"].conditional == [1.0] * BLOCK


def test_acceptance_by_context():
    """The classes end at 256, 512, ...; the error is over texts."""
    texts = [Text([0] * 600, 250, 0), Text([0] * 300, 255, 0)]
    early, late = torch.ones(10, 2), torch.tensor([[1.0, 0.0]] * 4)
    first, second = by_context(texts, [early, late])
    assert (first["context"], first["anchors"], second["context"], second["anchors"]) == (256, 9, 512, 5)
    assert first["tau"] == pytest.approx(1 + (7 * 2 + 2 * 1) / 9) and second["tau"] == pytest.approx(
        1 + (3 * 2 + 2) / 5
    )
    # Seven anchors above the mean by 2/9 each, two below it by 7/9 each.
    assert first["tau_se"] == pytest.approx(2**0.5 * 14 / 9 / 9)


@pytest.mark.parametrize("coupled", [False, True])
def test_trees_contain_the_chain_and_grow(pair, coupled):
    target, head = pair
    text = Text(torch.randint(VOCAB, (40,), generator=torch.Generator().manual_seed(1)).tolist(), 4, 3)
    found = text_acceptance(head, target, text, [4, 16, 63], temperature=0.9, coupled=coupled, beam=8, width=6)
    assert found["chain"].shape == (40 - BLOCK - 4,)
    assert (found["4"] <= found["16"]).all() and (found["16"] <= found["63"]).all()
    alone = text_acceptance(head, target, text, [4], temperature=0.9, coupled=coupled, beam=8, width=6)
    assert torch.equal(alone["4"], found["4"])


def test_only_trees_that_the_block_can_fill():
    assert fitting_sizes([8, 16, 63, 64], block=8, beam=8, width=4) == [8, 16, 63]
    assert fitting_sizes([4, 8, 63], block=1, beam=8, width=4) == [4]


def test_noise_processor_uses_true_positions():
    """Left padding must not move the noise: position = column - padding."""
    seeds, scores = torch.tensor([7, 8]), torch.zeros(2, VOCAB)
    out = NoiseProcessor(seeds, 0.5, torch.tensor([0, 2]))(torch.zeros(2, 6, dtype=torch.int64), scores)
    for row, (seed, position) in enumerate(((7, 5), (8, 3))):
        expected = gumbel_noise(
            torch.tensor([seed]), torch.tensor([0.5]), torch.tensor([[position]]), torch.tensor([0]), VOCAB
        )
        torch.testing.assert_close(out[row], expected[0, 0])


@pytest.mark.parametrize("draft_vocab_size", [None, 30])
def test_coupling_makes_a_perfect_head_perfect_under_sampling(pair, draft_vocab_size):
    """When the head's logits are the target's, coupled candidates are exactly the sampled tokens."""
    target, _ = pair
    # A target that ignores its context: the next token's logits depend on nothing, so zero hidden states suit both.
    flat = Qwen3ForCausalLM(target.config).eval()
    with torch.no_grad():
        flat.lm_head.weight.zero_()
    temperature, positions = 1.0, torch.arange(60)[None]
    noise = gumbel_noise(torch.tensor([5]), torch.tensor([temperature]), positions, torch.tensor([0]), VOCAB)
    ids = [0, *noise[0].argmax(-1).tolist()]
    head = KVSpecDraftModel(head_config_for(flat.config, draft_block_size=BLOCK, num_hidden_layers=1)).eval()
    if draft_vocab_size:
        config = head_config_for(
            flat.config, draft_block_size=BLOCK, num_hidden_layers=1, draft_vocab_size=draft_vocab_size
        )
        head = KVSpecDraftModel(config).eval()
        head.set_draft_vocabulary(torch.arange(draft_vocab_size) + 5)
    found = {
        mode: evaluate(head, flat, [Text(ids, 1, 5)], [8], mode=mode, temperature=temperature)[0]["chain"]
        for mode in (COUPLED, UNCOUPLED, REJECTION)
    }
    assert found[UNCOUPLED].tau < 2
    if draft_vocab_size is None:
        assert found[COUPLED].tau == BLOCK + 1
        assert found[REJECTION].tau == pytest.approx(BLOCK + 1)
        return
    # q is uniform over 30 of 40 tokens: 0 or above p for every token of the text.
    known = torch.tensor([5 <= token < 5 + draft_vocab_size for token in ids[2:]])
    inside = known.unfold(0, BLOCK, 1).long().cumprod(dim=1).double()
    assert torch.equal(rejection_survival(head, flat, Text(ids, 1, 5), temperature=1.0), inside[: 60 - BLOCK])
    assert 0.5 < inside[:, 0].mean() < 1
    assert found[COUPLED].conditional[0] == pytest.approx(inside[: 60 - BLOCK, 0].mean().item())


@pytest.mark.parametrize("drafting", ["block", "autoregressive"])
def test_rejection_survival_is_that_of_the_classic_algorithm(drafting):
    """Enumeration: draft x1 x2 from q, accept each with min(1, p / q); against the mean over texts drawn from p."""
    vocab, temperature, prompt = 5, 0.8, [1, 4, 2]
    target = make_target(vocab)
    head = make_head(target, draft_block_size=2, drafting=drafting, transition_rank=3)
    anchor = len(prompt) - 1
    expected, mean = torch.zeros(2).double(), torch.zeros(2).double()
    for path in itertools.product(range(vocab), repeat=2):
        ids = torch.tensor([[*prompt, *path]])
        base = torch.tensor([anchor])
        with torch.no_grad():
            p = (target(ids).logits[0, anchor:-1].double() / temperature).softmax(-1)
            view = view_target(target, head.config, ids)
            logits = draft_logits(head, target, view, ids, base, ids[:, anchor:-1])[0]
            q = (logits.double() / temperature).softmax(-1)
        p1, p2 = p[0, path[0]], p[1, path[1]]
        q1, q2 = q[0, path[0]], q[1, path[1]]
        first = q1 * min(1, p1 / q1)
        expected += torch.stack([first / vocab, first * q2 * min(1, p2 / q2)])
        survival = rejection_survival(head, target, Text(ids[0].tolist(), anchor, 0), temperature=temperature)
        mean += p1 * p2 * survival[0]
    assert 0.05 < expected[1] < expected[0] < 0.95
    torch.testing.assert_close(mean, expected, rtol=1e-5, atol=1e-6)


class PaddingTokenizer:
    """Pads as transformers' tokenizers do, all that writing from token ids asks of one."""

    pad_token_id = 0

    def pad(self, batch, padding_side, return_tensors):
        longest = max(map(len, batch["input_ids"]))
        assert padding_side == "left"
        rows = [[0] * (longest - len(ids)) + ids for ids in batch["input_ids"]]
        mask = [[0] * (longest - len(ids)) + [1] * len(ids) for ids in batch["input_ids"]]
        return PaddedBatch(input_ids=torch.tensor(rows), attention_mask=torch.tensor(mask))


class PaddedBatch(dict):
    def to(self, device):
        return self


def test_texts_are_written_once_per_target_and_settings(pair, tmp_path, monkeypatch):
    target, _ = pair
    prompts = [[3, 1, 2, 5], [4, 4]]
    arguments = (target, PaddingTokenizer(), prompts)
    greedy = cached_texts(tmp_path, *arguments, max_new_tokens=6, temperature=0.0)
    assert [len(text.input_ids) for text in greedy] == [10, 8]
    alone = target.generate(torch.tensor([prompts[1]]), max_new_tokens=6, do_sample=False, pad_token_id=0)
    assert greedy[1].input_ids == alone[0].tolist()

    def must_not_write(*args, **kwargs):
        raise AssertionError("the target was asked to write again")

    with monkeypatch.context() as patch:
        patch.setattr(texts_module, "write_texts", must_not_write)
        assert cached_texts(tmp_path, *arguments, max_new_tokens=6, temperature=0.0) == greedy
        for change in ({"max_new_tokens": 7}, {"temperature": 1.0}):
            with pytest.raises(AssertionError, match="write again"):
                cached_texts(tmp_path, *arguments, **{"max_new_tokens": 6, "temperature": 0.0, **change})
        other = make_target()
        with torch.no_grad():
            other.model.layers[2].mlp.up_proj.weight.add_(0.01)
        with pytest.raises(AssertionError, match="write again"):
            cached_texts(tmp_path, other, *arguments[1:], max_new_tokens=6, temperature=0.0)
    sampled = cached_texts(tmp_path, *arguments, max_new_tokens=6, temperature=1.0)
    assert sampled != greedy and len(list(tmp_path.iterdir())) == 2
