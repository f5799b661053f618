# SPDX-License-Identifier: Apache-2.0
"""Trees without a head: the twins do what they say; the kernels and the CPU engine's compiled versions equal them."""

import math
from types import SimpleNamespace

import pytest
import torch

from vllm_kvspec.kernels import recycle as kernel
from vllm_kvspec.kernels import reference_recycle as twin
from vllm_kvspec.kernels.reference import gumbel_noise_at
from vllm_kvspec.kernels.reference_candidates import (
    Candidates,
    empty_candidates,
    place_children,
    plan_levels,
    root_parents,
)

IMPLEMENTATIONS = {"kernel": kernel}
if not torch.cuda.is_available():
    from vllm_kvspec.engine.cpu.kernels import recycle as compiled

    IMPLEMENTATIONS["compiled"] = compiled
EACH = pytest.mark.parametrize("ours", IMPLEMENTATIONS.values(), ids=IMPLEMENTATIONS)
AND_TWIN = pytest.mark.parametrize("ours", [*IMPLEMENTATIONS.values(), twin], ids=[*IMPLEMENTATIONS, "twin"])
REQUESTS, LENGTH, W = 4, 60, twin.WIDTH
OWNERS = [0, 0, 7, -(2**62) - 5]


def random_step(seed: int, vocab: int, nodes: int) -> SimpleNamespace:
    """Rows of three requests, the second without a tree, and their texts."""
    gen = torch.Generator().manual_seed(seed)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=gen)

    counts = torch.tensor([nodes + 1, 1, nodes + 1])
    rows = int(counts.sum())
    parents = [[0, *(int(draw(0, t, 1)) for t in range(1, nodes + 1))] for _ in range(REQUESTS)]
    log_prob = (2 * torch.randn(rows, vocab, generator=gen)).log_softmax(-1).sort(-1, descending=True)
    return SimpleNamespace(
        best=(log_prob.indices[:, :W].contiguous(), log_prob.values[:, :W].contiguous()),
        rows=dict(
            input_ids=draw(0, vocab, rows + 5).int(),
            positions=draw(0, LENGTH, rows + 5),
            logits_indices=torch.arange(rows) + 3,
            idx_mapping=torch.tensor([2, 0, 1]).repeat_interleave(counts).int(),
            local_pos=torch.cat([torch.arange(n) for n in counts.tolist()]).int(),
            parent=torch.tensor(parents).int(),
            owner=torch.tensor(OWNERS),
            text=draw(0, vocab, REQUESTS, LENGTH).int(),
        ),
    )


def on(device, arguments: dict) -> dict:
    return {k: v.to(device) if torch.is_tensor(v) else v for k, v in arguments.items()}


def learned(step: SimpleNamespace, update, device, slots: int = 256) -> twin.RecycleTable:
    table = twin.empty_table(slots, device)
    best = [t.to(device) for t in step.best]
    for shift in range(3):
        # The same rows say something else about other tokens.
        rows = step.rows | {"input_ids": step.rows["input_ids"].roll(shift)}
        update(table, *best, **on(device, rows))
    return table


def tree_arguments(step: SimpleNamespace, nodes: int, **other) -> dict:
    """Four rows: two requests, one with a text of two tokens, and padding."""
    return (
        dict(
            request=torch.tensor([2, 0, 1, REQUESTS]),
            base=torch.tensor([LENGTH - 1, 20, 1, 0]).int(),
            temperature=torch.tensor([0.0, 1.0, 0.7, 0.0]),
            seed=torch.tensor([1, 2, -(2**40) - 3, 4]),
            chain=torch.zeros(4).int(),
            owner=step.rows["owner"],
            text=step.rows["text"],
            size=nodes,
            num_nodes=nodes,
            coupled=True,
        )
        | other
    )


@EACH
@pytest.mark.parametrize("vocab", [9, 40])
def test_updates_equal_the_twin(device, ours, vocab):
    """9 tokens: many rows share a context, and the last one counts."""
    for seed in range(3):
        step = random_step(seed, vocab, 9)
        expected = learned(step, twin.recycle_update, "cpu")
        for found, want in zip(learned(step, ours.recycle_update, device), expected, strict=True):
            assert torch.equal(found.cpu(), want)


@EACH
@pytest.mark.parametrize("vocab", [2, 9, 400])
def test_matches_equal_the_twin(device, ours, vocab):
    gen = torch.Generator().manual_seed(vocab)
    text = torch.randint(vocab, (REQUESTS, 300), generator=gen).int()
    request, base = torch.tensor([3, 0, 1, REQUESTS, 2, 2]), torch.tensor([299, 0, 1, 0, 150, 63]).int()
    found = ours.own_matches(text.to(device), request.to(device), base.to(device))
    assert torch.equal(found.cpu(), twin.own_matches(text, request, base))


@EACH
def test_matches_across_blocks(device, ours):
    """Matches of several blocks of a long text, merged."""
    text = torch.arange(5000).int()[None] + 10
    for k, end in enumerate((100, 2047, 2052, 2060, 4094, 4099, 4500, 4600, 4700, 4800)):
        text[0, end - k % 5 : end + 1] = torch.arange(5)[4 - k % 5 :].int()
    text[0, 4995:] = torch.arange(5).int()
    request, base = torch.tensor([0]), torch.tensor([4999]).int()
    found = ours.own_matches(text.to(device), request.to(device), base.to(device))
    assert torch.equal(found.cpu(), twin.own_matches(text, request, base))
    lengths = (found[0].cpu() >> twin.POSITION_BITS).tolist()
    assert lengths == [5, 5, 4, 4, 3, 3, 2, 2]


def head_of(vocab: int, width: int = 3) -> dict:
    """Candidates of a head for four requests: four levels of the best four nodes' ``width`` children."""
    gen = torch.Generator().manual_seed(vocab)
    levels = plan_levels(4, 4, width)
    head = empty_candidates(4, levels, torch.device("cpu"))
    parents, offset = root_parents(torch.zeros(4, dtype=torch.int64)), 0
    for level in levels:
        log_prob = torch.randn(4, level.num_parents, vocab, generator=gen).log_softmax(-1).topk(width)
        options = dict(level=level, chain=None, draft_ids=None, candidates=head, offset=offset)
        parents = place_children(*log_prob, parents, **options)
        offset += level.num_parents * width
    return {"head": head, "head_width": width}


def moved_head(device, arguments: dict) -> dict:
    if (head := arguments.get("head")) is None:
        return arguments
    return arguments | {"head": Candidates(*(column.to(device) for column in head))}


@EACH
@pytest.mark.parametrize("nodes", [1, 8, 40])
@pytest.mark.parametrize(
    "other",
    [{}, {"coupled": False}, {"chain": torch.ones(4).int()}, head_of(9)],
    ids=["tree", "uncoupled", "chain", "head"],
)
def test_trees_equal_the_twin(device, ours, nodes, other):
    for seed, vocab in ((0, 9), (1, 40)):
        step = random_step(seed, vocab, 9)
        table = learned(step, twin.recycle_update, "cpu")
        arguments = tree_arguments(step, nodes, **other)
        matches = twin.own_matches(*(arguments[key] for key in ("text", "request", "base")))
        expected = twin.recycle_tree(table, matches, **arguments)
        moved = twin.RecycleTable(*(t.to(device) for t in table))
        found = ours.recycle_tree(moved, matches.to(device), **moved_head(device, on(device, arguments)))
        assert_same_trees([t.cpu() for t in found], expected)


def assert_same_trees(found, expected) -> None:
    """Where two children are equally good by arithmetic (of one context, each after the other), rounding may put either
    first, and so one of them may be the first that is left out."""
    for b in range(len(expected[0])):
        if not all(torch.equal(one[b], want[b]) for one, want in zip(found, expected, strict=True)):
            assert len(paths(found, b) ^ paths(expected, b)) <= 2


def paths(trees, b: int) -> set[tuple[int, ...]]:
    tokens, parent = trees[0][b].tolist(), trees[1][b].tolist()
    found = [()]
    for t in range(1, len(parent)):
        found.append((*found[parent[t]], tokens[t - 1]))
    return set(found)


@AND_TWIN
def test_fewer_nodes_are_the_first_of_more(device, ours):
    step = random_step(5, 12, 9)
    table = learned(step, twin.recycle_update, device)
    arguments = on(device, tree_arguments(step, 24))
    matches = twin.own_matches(*(arguments[key] for key in ("text", "request", "base")))
    whole = ours.recycle_tree(table, matches, **arguments)
    part = ours.recycle_tree(table, matches, **arguments | {"num_nodes": 7})
    for few, all_ in zip(part, whole, strict=True):
        first = 7 + (few.shape[1] == 25)
        assert torch.equal(few[:, :first], all_[:, :first])
    # What was not asked for continues as a chain.
    assert part[0][:, 7:].abs().sum() == 0
    assert (part[1][:, 8:] == torch.arange(7, 24, device=device)).all()


@AND_TWIN
def test_a_tree_is_sound(device, ours):
    """Parents first, depths and masks from them, children of one node all different, padding empty."""
    step = random_step(6, 12, 9)
    table = learned(step, twin.recycle_update, device)
    arguments = on(device, tree_arguments(step, 63))
    matches = twin.own_matches(*(arguments[key] for key in ("text", "request", "base")))
    tokens, parent, depth, mask = (t.tolist() for t in ours.recycle_tree(table, matches, **arguments))
    for b in range(3):
        children = set()
        for t in range(1, 64):
            above = parent[b][t]
            assert 0 <= above < t
            assert depth[b][t] == depth[b][above] + 1
            assert mask[b][t] == mask[b][above] | (1 << t if t < 63 else -(2**63))
            assert (above, tokens[b][t - 1]) not in children
            children.add((above, tokens[b][t - 1]))
        assert len({above for above, _ in children}) > 3
    assert tokens[3] == [0] * 63 and parent[3] == [0, *range(63)]


def one_text(device, *tokens: int, **other) -> dict:
    text = torch.tensor([tokens]).int()
    arguments = dict(
        request=torch.tensor([0]), base=torch.tensor([len(tokens) - 1]).int(), temperature=torch.zeros(1),
        seed=torch.tensor([1]), chain=torch.zeros(1).int(), owner=torch.tensor([3]), text=text, size=4, num_nodes=4,
        coupled=True,
    )  # fmt: skip
    return on(device, arguments | other)


def teach(table: twin.RecycleTable, owner: int, before: int, token: int, successors: dict[int, float]) -> None:
    """An entry of the table, by hand."""
    key = torch.tensor([owner]), torch.tensor([before]), torch.tensor([token])
    slot = int(twin.slot_of(*key, len(table.owner)))
    table.owner[slot], table.context[slot] = owner, int(twin.context_of(*key[1:]))
    for k, (child, p) in enumerate(successors.items()):
        table.token[slot, k], table.log_prob[slot, k] = child, math.log(p)


def grown(ours, table, arguments) -> list[tuple[int, int]]:
    """(parent, token) of the nodes."""
    matches = ours.own_matches(arguments["text"], arguments["request"], arguments["base"])
    tokens, parent, *_ = ours.recycle_tree(table, matches, **arguments)
    return list(zip(parent[0, 1:].tolist(), tokens[0].tolist(), strict=True))


@AND_TWIN
def test_sources_stand_in_for_each_other(device, ours):
    """Two tokens, else one, else what else could have stood in the token's place."""
    table = twin.empty_table(1024, device)
    teach(table, 3, 1, 2, {10: 0.9})
    teach(table, 3, -1, 2, {11: 0.9})
    teach(table, 3, 0, 1, {2: 0.5, 12: 0.4})
    assert grown(ours, table, one_text(device, 0, 1, 2, num_nodes=1))[0] == (0, 10)
    assert grown(ours, table, one_text(device, 0, 5, 2, num_nodes=1))[0] == (0, 11)
    table = twin.empty_table(1024, device)
    teach(table, 3, 0, 1, {2: 0.5, 12: 0.4})
    # Not 2 once more: that is what came.
    assert grown(ours, table, one_text(device, 0, 1, 2, num_nodes=2))[0] == (0, 12)


@AND_TWIN
def test_a_head_and_the_table_grow_one_tree(device, ours):
    """The likelier of each one's children first; below the head's own nodes the table goes on."""
    table = twin.empty_table(1024, device)
    teach(table, 3, 1, 2, {10: 0.9})
    teach(table, 3, -1, 10, {13: 0.9})
    teach(table, 3, -1, 21, {14: 0.9})
    columns = ([-1.0, -2.0, -1.4, -3.0], [20, 10, 21, 22], [-1, -1, 0, 0])
    dtypes = (torch.float32, torch.int64, torch.int32)
    head = Candidates(*(torch.tensor([c], dtype=d, device=device) for c, d in zip(columns, dtypes, strict=True)))
    arguments = one_text(device, 0, 1, 2, size=9, num_nodes=9)
    matches = ours.own_matches(arguments["text"], arguments["request"], arguments["base"])
    tokens, parent, *_ = ours.recycle_tree(table, matches, **arguments, head=head, head_width=2)
    nodes = list(zip(parent[0, 1:].tolist(), tokens[0].tolist(), strict=True))
    assert nodes[0] == (0, 10) and nodes.count((0, 10)) == 1
    of_head, of_both = nodes.index((0, 20)) + 1, 1
    assert (of_both, 13) in nodes and (of_head, 21) in nodes
    assert (nodes.index((of_head, 21)) + 1, 14) in nodes


@AND_TWIN
def test_a_long_match_leaves_a_head_little_room(device, ours):
    """A head that is sure of another token comes before a short match, and after a long one."""
    columns = torch.tensor([[-0.03]]), torch.tensor([[99]]), torch.tensor([[-1]]).int()
    head = Candidates(*(column.to(device) for column in columns))
    for length, first in ((1, 99), (twin.LONGEST, 30)):
        again = range(30 - length, 30)
        arguments = one_text(device, *again, 30, 5, *again, size=1, num_nodes=1)
        matches = ours.own_matches(arguments["text"], arguments["request"], arguments["base"])
        assert int(matches[0, 0]) >> twin.POSITION_BITS == length
        tokens, *_ = ours.recycle_tree(twin.empty_table(64, device), matches, **arguments, head=head, head_width=1)
        assert tokens.tolist() == [[first]]


@AND_TWIN
@pytest.mark.parametrize("slots", [1024, 2])
def test_another_owner_is_told_nothing(device, ours, slots):
    """Not even where both look into the same slot, as all do in the smallest table."""
    table = twin.empty_table(slots, device)
    teach(table, 3, 1, 2, {10: 0.9})
    teach(table, 3, -1, 10, {13: 0.9})
    mine = one_text(device, 0, 1, 2)
    assert grown(ours, table, mine)[:2] == [(0, 10), (1, 13)]
    if slots == 2:
        teach(table, 3, -1, 2, {11: 0.9})
    for other in (0, 4, 3 + 2**32, -3):
        assert grown(ours, table, mine | {"owner": torch.tensor([other], device=device)})[0] == (0, 0)


@AND_TWIN
def test_own_text_is_followed_where_it_agrees(device, ours):
    """Two earlier places, then the one of them that the path agrees with."""
    table = twin.empty_table(1024, device)
    text = one_text(device, 1, 2, 3, 4, 5, 9, 1, 2, 3, 6, 7, 9, 1, 2, 3, size=12, num_nodes=12)
    nodes = grown(ours, table, text)
    # The later place first; each goes its own way.
    assert nodes[0] == (0, 6) and (0, 4) in nodes
    by_token = {token: t for t, (_, token) in enumerate(nodes, start=1)}
    assert all((parent, token) != (by_token[6], 5) for parent, token in nodes)
    assert (by_token[6], 7) in nodes


@AND_TWIN
def test_nothing_is_read_beyond_the_texts_end(device, ours):
    """There lie tokens of the request that had the row before."""
    table = twin.empty_table(1024, device)
    text = one_text(device, 1, 2, 1, 2, 9, 9, base=torch.tensor([3]).int(), size=3, num_nodes=3)
    assert grown(ours, table, text) == [(0, 1), (1, 2), (2, 0)]


@AND_TWIN
def test_sources_that_agree_are_one_child(device, ours):
    table = twin.empty_table(1024, device)
    teach(table, 3, 2, 3, {8: 0.5, 4: 0.4})
    text = one_text(device, 2, 3, 4, 9, 2, 3, size=12, num_nodes=12)
    nodes = grown(ours, table, text)
    # 8 is likelier in the table, 4 by both.
    assert nodes[0] == (0, 4) and (0, 8) in nodes
    assert nodes.count((0, 4)) == 1


def test_where_a_path_comes_from():
    """Of several sources the one that gives a token most; a head where its score is the higher."""
    table = twin.empty_table(1024)
    teach(table, 3, 1, 2, {10: 0.9})
    teach(table, 3, -1, 10, {13: 0.9, 12: 0.05})
    text = one_text("cpu", 10, 13, 7, 1, 2)
    known = {key: text[key] for key in ("request", "base", "temperature", "seed", "owner", "text", "coupled")}
    none = torch.zeros(1, twin.MATCHES, dtype=torch.int32)
    # 12 after 13: what else could have stood there. 5 is named by nobody.
    assert twin.path_sources(table, none, [10, 13, 12, 5], **known) == ["two tokens", "one token", "guess"]
    again = one_text("cpu", 4, 2, 10, 12, 7, 1, 2)
    matches = twin.own_matches(again["text"], again["request"], again["base"])
    known |= {"text": again["text"], "base": again["base"]}
    assert twin.path_sources(table, matches, [10, 12, 7], **known) == ["two tokens", "own text", "own text"]
    head = Candidates(torch.tensor([[-0.01, -3.0]]), torch.tensor([[20, 10]]), torch.tensor([[-1, -1]]).int())
    assert twin.path_sources(table, none, [20], **known, head=head) == ["head"]
    assert twin.path_sources(table, none, [10, 13], **known, head=head) == ["two tokens", "one token"]


@AND_TWIN
def test_candidates_are_ranked_under_the_targets_noise(device, ours):
    """Of two equally likely successors the one that the noise of this seed and position favours."""
    table = twin.empty_table(1024, device)
    teach(table, 3, -1, 2, {10: 0.45, 11: 0.45})
    chosen = set()
    for seed in range(12):
        seeds = torch.tensor([seed], device=device)
        text = one_text(device, 2, seed=seeds, temperature=torch.ones(1, device=device))
        noise = gumbel_noise_at(
            torch.tensor([seed]), torch.ones(1), torch.tensor([[0]]), torch.tensor([0]), torch.tensor([10, 11])
        )
        favoured = 10 + int(noise[0, 0].argmax())
        assert grown(ours, table, text)[0] == (0, favoured)
        chosen.add(favoured)
    assert chosen == {10, 11}


def test_a_table_has_a_power_of_two_of_slots():
    with pytest.raises(ValueError, match="power of two"):
        twin.empty_table(100)
