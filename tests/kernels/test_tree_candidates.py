# SPDX-License-Identifier: Apache-2.0
"""tree_candidates: kernel, twin and the CPU engine's compiled version against float64 and a stable sort; ties, masked
tokens, fixed shapes, bad logits."""

from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvspec.kernels import reference, reference_candidates, tree_candidates
from vllm_kvspec.kernels.reference_candidates import (
    Candidates,
    Level,
    Parents,
    RankingScales,
    empty_candidates,
    plan_levels,
)
from vllm_kvspec.tree import fixed_levels, parents_from_widths

TEMPERATURES = (0.0, 1.0, 0.7, 1.6)
IMPLEMENTATIONS = {"kernel": tree_candidates, "twin": reference_candidates}
if not torch.cuda.is_available():
    from vllm_kvspec.engine.cpu.kernels import candidates as compiled

    IMPLEMENTATIONS["compiled"] = compiled
EACH = pytest.mark.parametrize("implementation", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)


def make_case(
    batch=2,
    block=3,
    vocab=300,
    rank=24,
    entries=None,
    dtype=torch.float32,
    coupled=True,
    chains=(),
    gated=False,
    seed=0,
) -> SimpleNamespace:
    """A batch with temperatures 0, 1, 0.7 and 1.6 in turn. ``entries``: size of a reduced draft vocabulary.

    Gates are powers of two: their products are exact in every dtype.
    """
    gen = torch.Generator().manual_seed(seed)
    ids = torch.randperm(vocab, generator=gen)[: entries or vocab].sort().values
    # Rows of a wider, padded buffer: no stride is what it would be by default. All below 0, which a masked load gives.
    wide = torch.randn(batch, block + 1, len(ids) + 5, generator=gen).mul(3).sub(30).to(dtype)
    factors = None, None
    if rank:
        factors = tuple(torch.randn(n, rank, generator=gen).mul(0.4).to(dtype) for n in (vocab, len(ids)))
    gates = torch.tensor([-1.0, 0.0, 0.5, 2.0])[torch.randint(4, (batch, block + 1, rank + 3), generator=gen)].to(dtype)
    state = torch.randperm(batch + 2, generator=gen)[:batch]
    by_state = torch.zeros(batch + 2)
    by_state[state] = torch.tensor([TEMPERATURES[b % 4] for b in range(batch)])
    chain = torch.zeros(batch + 2, dtype=torch.int32)
    chain[state[list(chains)]] = 1
    return SimpleNamespace(
        inputs=(wide[:, :block, : len(ids)], torch.randint(vocab, (batch,), generator=gen), *factors),
        options=dict(
            base=torch.randint(9000, (batch,), generator=gen).int(),
            idx_mapping=state,
            temperature=by_state,
            seeds=torch.randint(-(1 << 62), 1 << 62, (batch + 2,), generator=gen),
            coupled=coupled,
            scales=RankingScales(greedy=0.4, coupled=0.6),
            chain=chain if chains else None,
            draft_ids=ids if entries else None,
            gate=gates[:, :block, :rank] if gated else None,
        ),
        vocab=vocab,
    )


def children(case, b, depth, parent_token, logits=None):
    """Log-probabilities float64 [Vd] of the children of one node."""
    depth_logits, _, factor_in, factor_out = case.inputs
    options = SimpleNamespace(**case.options)
    row = (depth_logits[b, depth] if logits is None else logits).double()
    if factor_in is not None:
        gate = 1.0 if options.gate is None else options.gate[b, depth].double()
        row = row + factor_out.double() @ (factor_in[parent_token].double() * gate)
    temperature = options.temperature[options.idx_mapping[b]].item()
    scale = temperature if temperature > 0 else options.scales.greedy
    if options.coupled and temperature > 0:
        position = (options.base[b : b + 1, None] + depth).long()
        mapping = options.idx_mapping[b : b + 1]
        noise = reference.gumbel_noise(options.seeds, options.temperature, position, mapping, case.vocab)[0, 0].double()
        row, scale = row + (noise if options.draft_ids is None else noise[options.draft_ids]), options.scales.coupled
    return (row / scale).log_softmax(0)


def truth(case, levels) -> list[list[tuple[float, int, int]]]:
    """Per request the candidates (score, token, parent), by the definition: stable sorts in float64."""
    depth_logits, anchor = case.inputs[:2]
    options = SimpleNamespace(**case.options)
    result = []
    for b in range(depth_logits.shape[0]):
        parents, found = [(0.0, anchor[b].item(), -1)], []
        for depth, level in enumerate(levels):
            here = []
            for above, parent_token, index in parents:
                log_probs = children(case, b, depth, parent_token)
                order = log_probs.sort(descending=True, stable=True).indices[: level.width]
                tokens = order if options.draft_ids is None else options.draft_ids[order]
                here += [(above + log_probs[i].item(), t.item(), index) for i, t in zip(order, tokens, strict=True)]
            if options.chain is not None and options.chain[options.idx_mapping[b]]:
                here = here[:1] + [(float("-inf"), t, p) for _, t, p in here[1:]]
            places = sorted(range(len(here)), key=lambda i: -here[i][0])[: level.num_next]
            if level.slots is not None:
                places = sorted((s, i) for i, s in enumerate(level.slots.tolist()) if s >= 0)
                places = [i for _, i in places]
            parents = [(*here[i][:2], len(found) + i) for i in places]
            found += here
        result.append(found)
    return result


def check(case, levels, ours: Candidates, atol=2e-5) -> None:
    assert (ours.score.dtype, ours.token.dtype, ours.parent.dtype) == (torch.float32, torch.int64, torch.int32)
    for b, found in enumerate(truth(case, levels)):
        score, token, parent = (torch.tensor(column) for column in zip(*found, strict=True))
        torch.testing.assert_close(ours.score[b].double().cpu(), score.double(), atol=atol, rtol=1e-5)
        used = score.isfinite()
        assert torch.equal(ours.token[b].cpu()[used], token[used])
        assert torch.equal(ours.parent[b].cpu().long()[used], parent[used])
        assert ((ours.token[b] >= 0) & (ours.token[b] < case.vocab)).all()
        assert (ours.parent[b].cpu() < torch.arange(len(found))).all()


def run(implementation, case, levels, device) -> Candidates:
    def move(x):
        return x.to(device) if torch.is_tensor(x) else x

    levels = [level._replace(slots=move(level.slots)) for level in levels]
    options = {key: move(value) for key, value in case.options.items()}
    # A copy would lose the strides.
    inputs = case.inputs if device.type == "cpu" else [move(x) for x in case.inputs]
    return implementation.tree_candidates(*inputs, levels=levels, **options)


@EACH
@pytest.mark.parametrize(
    ("options", "plan"),
    [
        pytest.param(dict(batch=4, chains=(1, 2)), (3, 8, 4), id="temperatures-and-chains"),
        pytest.param(dict(coupled=False, batch=3), (3, 8, 4), id="uncoupled"),
        pytest.param(dict(rank=96, vocab=700), (2, 5, 3), id="rank96-beam5-width3"),
        pytest.param(dict(rank=96, vocab=700, gated=True), (3, 5, 3), id="rank96-gated"),
        pytest.param(dict(batch=9, block=2, gated=True, entries=200), (2, 8, 8), id="two-row-tiles-gated"),
        pytest.param(dict(rank=0, vocab=513), (3, 8, 4), id="no-bias"),
        pytest.param(dict(entries=333, vocab=1000), (3, 8, 4), id="draft-vocabulary"),
        pytest.param(dict(entries=260, vocab=900, rank=0, coupled=False), (2, 4, 8), id="draft-vocabulary-no-bias"),
        pytest.param(dict(batch=9, block=2, vocab=256), (2, 8, 8), id="two-row-tiles-one-split"),
        pytest.param(dict(batch=1, block=2, vocab=257), (2, 8, 4), id="one-entry-in-the-last-split"),
        pytest.param(dict(block=4, vocab=300, chains=(0, 1)), (4, 1, 1), id="chain-mode"),
        pytest.param(dict(batch=1, block=1, vocab=131500, rank=16), (1, 8, 4), id="wider-splits"),
    ],
)
def test_matches_float64(device, implementation, options, plan):
    case, levels = make_case(**options), plan_levels(*plan)
    check(case, levels, run(implementation, case, levels, device))


@pytest.mark.parametrize("gated", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_kernel_sums_low_precision_in_fp32(device, dtype, gated):
    """Inputs are exact in float64, so nothing but fp32 rounding may differ; a product kept in bf16 would show."""
    case = make_case(batch=2, block=2, vocab=500, rank=48, dtype=dtype, gated=gated, seed=3)
    levels = plan_levels(2, 8, 4)
    check(case, levels, run(tree_candidates, case, levels, device))


@settings(max_examples=25, deadline=None)
@given(
    batch=st.integers(1, 3),
    vocab=st.integers(8, 600),
    rank=st.sampled_from([0, 1, 17, 64]),
    beam=st.integers(1, 8),
    width=st.integers(1, 8),
    coupled=st.booleans(),
    reduced=st.booleans(),
    gated=st.booleans(),
    seed=st.integers(0, 999),
)
def test_kernel_matches_float64_anywhere(batch, vocab, rank, beam, width, coupled, reduced, gated, seed):
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    entries = max(8, vocab // 2) if reduced else None
    case = make_case(batch, 2, vocab, rank, entries, coupled=coupled, gated=gated, seed=seed)
    levels = plan_levels(2, beam, width)
    check(case, levels, run(tree_candidates, case, levels, device))


@EACH
@pytest.mark.parametrize(
    "parents",
    [
        pytest.param([0, 0, 0, 1, 1, 3, 5, 4], id="irregular"),
        pytest.param(parents_from_widths([20, 1, 1]), id="20-parents-in-two-programs"),
    ],
)
def test_fixed_shapes(device, implementation, parents):
    case, (levels, _) = make_case(block=4), fixed_levels(parents)
    check(case, levels, run(implementation, case, levels, device))


@EACH
def test_masked_tokens(device, implementation):
    """-inf logits: never a candidate with a finite score, and out of the softmax."""
    case, levels = make_case(batch=3, block=2, vocab=600), plan_levels(2, 8, 4)
    logits = case.inputs[0]
    logits[0, :, torch.randperm(600)[:400]] = float("-inf")
    logits[1, :, :513] = float("-inf")
    # Fewer tokens than children, in two splits.
    logits[2, 0], logits[2, 0, 5], logits[2, 0, 400] = float("-inf"), 1.0, 2.0
    check(case, levels, run(implementation, case, levels, device))


@EACH
@pytest.mark.parametrize("value", [float("nan"), float("-inf"), float("inf")])
def test_bad_logits_still_give_valid_tokens_and_parents(device, implementation, value):
    case, levels = make_case(batch=2, block=3, vocab=300), plan_levels(3, 4, 2)
    case.inputs[0][0] = value
    ours = run(implementation, case, levels, device)
    assert ((ours.token >= 0) & (ours.token < 300)).all()
    assert (ours.parent < torch.arange(ours.parent.shape[1], device=device)).all()
    assert not ours.score[0].isfinite().any()
    # The neighbour in the same tile is untouched.
    assert ours.score[1].isfinite().all()


@pytest.mark.parametrize("name", sorted({"kernel", "compiled"} & IMPLEMENTATIONS.keys()))
def test_equal_scores_lowest_entry_then_lowest_candidate(device, name):
    """Ties everywhere, across splits: whole-number logits, no bias, no noise."""
    case, levels = make_case(batch=1, block=3, vocab=900, rank=0, coupled=False), plan_levels(3, 8, 4)
    case.inputs[0].copy_(torch.randint(0, 3, case.inputs[0].shape))
    check(case, levels, run(IMPLEMENTATIONS[name], case, levels, device))


@EACH
def test_logits_per_parent(device, implementation):
    """What autoregressive heads need: one level with other logits for every parent, scores and indices carried on."""
    batch, num_parents, width, depth, before = 2, 3, 4, 5, 7
    case = make_case(batch, vocab=500)
    gen = torch.Generator().manual_seed(9)
    logits = torch.randn(num_parents, batch, 500, generator=gen).mul(3).transpose(0, 1)
    parents = Parents(
        torch.randint(500, (batch, num_parents), generator=gen),
        -torch.rand(batch, num_parents, generator=gen),
        torch.randint(before, (batch, num_parents), generator=gen).int(),
    )
    level, total = Level(num_parents, width, 5), Level(1, before + num_parents * width + 1, 0)
    found = empty_candidates(batch, [total], device)
    for tensor in found:
        tensor.fill_(-77)
    options = {key: x.to(device) if torch.is_tensor(x) else x for key, x in case.options.items()}
    following = implementation.tree_level(
        logits.to(device), Parents(*(x.to(device) for x in parents)), *(f.to(device) for f in case.inputs[2:]),
        level=level, depth=depth, candidates=found, offset=before, **options,
    )  # fmt: skip
    for b in range(batch):
        expected = []
        for p in range(num_parents):
            log_probs = children(case, b, depth, parents.token[b, p], logits[b, p]) + parents.score[b, p]
            values, tokens = log_probs.topk(width)
            expected += [(v, t, parents.index[b, p]) for v, t in zip(values, tokens, strict=True)]
        for tensor, column in zip(found, zip(*expected, strict=True), strict=True):
            written = tensor[b, before : before + len(expected)].cpu().double()
            torch.testing.assert_close(written, torch.stack(column).double(), atol=2e-5, rtol=1e-5)
            assert (tensor[b, :before] == -77).all() and tensor[b, -1] == -77
        best = sorted(range(len(expected)), key=lambda i: -expected[i][0])[:5]
        assert following.index[b].tolist() == [i + before for i in best]
        assert following.token[b].tolist() == [expected[i][1].item() for i in best]
        torch.testing.assert_close(following.score[b].cpu(), torch.stack([expected[i][0] for i in best]).float())


def test_nothing_of_the_vocabularys_size_is_written(device, monkeypatch):
    sizes = []
    for name in ("empty", "zeros", "full"):
        original = getattr(torch, name)

        def spy(*args, _original=original, **kwargs):
            tensor = _original(*args, **kwargs)
            sizes.append(tensor.numel())
            return tensor

        monkeypatch.setattr(torch, name, spy)
    case, levels = make_case(batch=1, block=2, vocab=5000, rank=16), plan_levels(2, 8, 4)
    sizes.clear()
    run(tree_candidates, case, levels, device)
    assert sizes and sum(sizes) < 5000


def test_impossible_levels_are_refused(device):
    case = make_case(batch=1, block=2)
    with pytest.raises(ValueError, match="At most 8 parents"):
        run(tree_candidates, case, [Level(1, 20, 20), Level(20, 1, 20)], device)
    for implementation in IMPLEMENTATIONS.values():
        with pytest.raises(ValueError, match="deeper than the head's block"):
            run(implementation, case, plan_levels(3, 2, 2), device)


@EACH
@pytest.mark.parametrize("coupled", [True, False])
@pytest.mark.parametrize(("batch", "parents"), [(4, 1), (1, 3), (4, 8)])
def test_parents_with_tokens_of_their_own(implementation, coupled, batch, parents, device):
    """As if every parent scored the whole vocabulary and all but its own tokens had no probability."""
    vocab, own = 700, 300
    case = make_case(batch=batch, vocab=vocab, rank=0, coupled=coupled, chains=(batch - 1,))
    gen = torch.Generator().manual_seed(3)
    ids = torch.stack([torch.randperm(vocab, generator=gen)[:own] for _ in range(batch * parents)])
    ids = ids.view(batch, parents, own)
    logits = torch.randn(batch, parents, own, generator=gen) * 3
    whole = torch.full((batch, parents, vocab), float("-inf")).scatter_(2, ids, logits)
    above = Parents(
        torch.randint(vocab, (batch, parents), generator=gen),
        -torch.rand(batch, parents, generator=gen),
        torch.arange(parents, dtype=torch.int32).expand(batch, -1).contiguous(),
    )
    level = Level(parents, 3, min(8, 3 * parents))
    found = []
    for draft_ids, scores in ((ids, logits), (None, whole)):
        options = case.options | {"draft_ids": draft_ids}
        options = {key: x.to(device) if torch.is_tensor(x) else x for key, x in options.items()}
        candidates = empty_candidates(batch, [level], device)
        following = implementation.tree_level(
            scores.to(device), Parents(*(column.to(device) for column in above)), None, None,
            level=level, depth=2, candidates=candidates, offset=0, **options,
        )  # fmt: skip
        found.append((*candidates, *following))
    for ours, wanted in zip(*found, strict=True):
        torch.testing.assert_close(ours, wanted, atol=2e-5, rtol=1e-5)
