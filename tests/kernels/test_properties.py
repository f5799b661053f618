# SPDX-License-Identifier: Apache-2.0
"""Kernels against their twins over random trees, lengths, block tables and layouts, with poison around the inputs.

Whatever a kernel may not read is poison: NaN in cache slots past a request's length, in padding between rows and in
unused blocks; absurd numbers in mask columns past a tree and rows past the batch. Block tables are permuted, and
requests may share the full blocks of a prefix.
"""

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from vllm_kvspec.kernels import paged_draft_attention as draft_module
from vllm_kvspec.kernels import reference
from vllm_kvspec.kernels import tree_attention as tree_module
from vllm_kvspec.kernels.tree_build import tree_build
from vllm_kvspec.kernels.tree_inputs import tree_inputs
from vllm_kvspec.kernels.tree_walk import tree_walk

# Relative error of the whole output: fp32 sums in another order, fp16/bf16 round what both products take in.
TOLERANCE = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}
POISON = -0x5A5A5A5B
NAN = float("nan")
DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")


def padded(tensor: torch.Tensor, extra: tuple[int, ...]) -> torch.Tensor:
    """The same values as a view into a larger tensor of poison: `extra` more entries in each dimension."""
    poison = NAN if tensor.dtype.is_floating_point else POISON
    wide = torch.full([n + e for n, e in zip(tensor.shape, extra, strict=True)], poison).to(tensor.dtype)
    view = wide[tuple(slice(n) for n in tensor.shape)]
    return view.copy_(tensor)


def random_masks(parents: list[list[int]], nodes: int) -> torch.Tensor:
    """int64 [requests, nodes]: ancestor masks of trees, poison in the columns after each tree."""
    masks = torch.full((len(parents), nodes), POISON)
    for row, parent in zip(masks, parents, strict=True):
        for t, above in enumerate(parent):
            row[t] = 1 if t == 0 else row[above] | (torch.ones((), dtype=torch.int64) << t)
    return masks


@st.composite
def trees(draw, most: int) -> list[int]:
    """parent[t] < t for up to `most` nodes; chains and stars are as likely as anything between."""
    count = draw(st.integers(1, most))
    kind = draw(st.sampled_from(["chain", "star", "any"]))
    pick = {"chain": lambda t: t - 1, "star": lambda t: 0, "any": lambda t: draw(st.integers(0, t - 1))}[kind]
    return [0] + [pick(t) for t in range(1, count)]


@st.composite
def paged(draw, lengths: list[int], heads: int, dim: int, dtype: torch.dtype):
    """K and V caches [blocks, block_size, heads, dim] of a random layout, and their block table."""
    block_size = draw(st.sampled_from([4, 16]))
    layout = draw(st.sampled_from(["HND", "NHD", "split", "padded"]))
    per_request = max(lengths) // block_size + 1
    ids = draw(st.permutations(range(per_request * len(lengths) + 1)))
    table = torch.tensor(ids[:-1]).view(len(lengths), per_request)
    # The second request shares the first's full blocks, as prefix caching does.
    shared = min(lengths[:2]) // block_size if len(lengths) > 1 and draw(st.booleans()) else 0
    table[1:2, :shared] = table[0, :shared]
    seed = draw(st.integers(0, 2**16))
    rows = torch.randn(2, len(ids), heads, block_size, dim, generator=torch.Generator().manual_seed(seed)).to(dtype)
    filled = torch.zeros(len(ids), block_size, dtype=torch.bool)
    for b, length in enumerate(lengths):
        for j, block in enumerate(table[b].tolist()):
            filled[block, : max(0, length - j * block_size)] = True
    rows = rows.masked_fill(~filled[None, :, None, :, None], NAN)
    # Entries past a request's blocks lead to a block of NaN.
    used = torch.tensor([-(-length // block_size) for length in lengths])
    table = torch.where(torch.arange(per_request) < used[:, None], table, ids[-1])
    k, v = ({
        "HND": lambda: torch.cat([*rows], -1).split(dim, -1),
        "NHD": lambda: [x.transpose(1, 2) for x in torch.cat([*rows.transpose(2, 3)], -1).contiguous().split(dim, -1)],
        "split": lambda: rows,
        "padded": lambda: padded(rows, (0, 1, 2, 3, 16)),
    }[layout]())  # fmt: skip
    return k.transpose(1, 2).to(DEVICE), v.transpose(1, 2).to(DEVICE), padded(table.int(), (2, 3)).to(DEVICE)


def around(size: int) -> st.SearchStrategy[int]:
    """Lengths at which blocks and tiles of `size` begin and end."""
    return st.sampled_from([0, 1, size - 1, size, size + 1, 2 * size, 4 * size - 1, 4 * size, 4 * size + 1])


def relative_error(ours: torch.Tensor, truth: torch.Tensor) -> float:
    return ((ours.double() - truth.double()).norm() / truth.double().norm()).item()


@st.composite
def heads(draw) -> tuple[int, int, int]:
    kv_heads, group = draw(st.sampled_from([(1, 1), (2, 1), (1, 5), (2, 3), (1, 16)]))
    return kv_heads, kv_heads * group, draw(st.sampled_from([16, 24, 80]))


options = st.fixed_dictionaries(
    {"sliding_window": st.sampled_from([0, 0, 1, 5, 20]), "scale": st.sampled_from([0.1, 1.0])}
)
dtypes = st.sampled_from([torch.float32, torch.float16, torch.bfloat16])


@settings(max_examples=40, deadline=None)
@given(data=st.data(), shape=heads(), dtype=dtypes, keys=options, splits=st.sampled_from([1, 2, 4]))
def test_tree_attention(data, shape, dtype, keys, splits):
    kv_heads, num_heads, dim = shape
    contexts = data.draw(st.lists(around(16), min_size=1, max_size=3))
    parents = [data.draw(trees(most=9)) for _ in contexts]
    # Rows before the tree: none, a chunk of a prompt, or a plain row and no tree at all.
    before = [data.draw(st.sampled_from([0, 0, 2])) for _ in contexts]
    is_tree = [data.draw(st.sampled_from([True, True, False])) for _ in contexts]
    counts = [n + (len(p) if tree else 1) for n, p, tree in zip(before, parents, is_tree, strict=True)]
    lengths = [context + n for context, n in zip(contexts, counts, strict=True)]
    k_cache, v_cache, table = data.draw(paged(lengths, kv_heads, dim, dtype))
    starts = torch.tensor([0, *counts]).cumsum(0).int()
    q = torch.randn(sum(counts), num_heads, dim, generator=torch.Generator().manual_seed(sum(lengths))).to(dtype)
    # Padding rows past the batch hold NaN and keep what `out` held.
    q = padded(q, (2, 1, 8))
    q = q.as_strided((q.shape[0] + 2, *q.shape[1:]), q.stride()).to(DEVICE)
    tree_lens = [len(p) * tree for p, tree in zip(parents, is_tree, strict=True)]
    args = (
        q, k_cache, v_cache, table, padded(starts, (2,)).to(DEVICE), torch.tensor(lengths).int().to(DEVICE),
        padded(random_masks(parents, 9), (1, 2)).to(DEVICE), padded(torch.tensor(tree_lens).int(), (1,)).to(DEVICE),
    )  # fmt: skip
    tree_module.num_splits = lambda *_: splits
    ours, twin = torch.full_like(q, 7.0), torch.full_like(q, 7.0)
    tree_module.tree_attention(*args, max_query_len=max(counts), out=ours, **keys)
    reference.tree_attention(*args, max_query_len=max(counts), out=twin, **keys)
    assert ours.isfinite().all()
    assert relative_error(ours[:-2], twin[:-2]) < TOLERANCE[dtype]
    assert ours[-2:].eq(7.0).all()


@settings(max_examples=40, deadline=None)
@given(
    data=st.data(), shape=heads(), dtype=dtypes, keys=options, splits=st.sampled_from([1, 2, 4]),
    rows=st.sampled_from([1, 2, 7, 16, 17]), causal=st.booleans(),
)  # fmt: skip
def test_paged_draft_attention(data, shape, dtype, keys, splits, rows, causal):
    kv_heads, num_heads, dim = shape
    lengths = data.draw(st.lists(around(16), min_size=1, max_size=3))
    k_cache, v_cache, table = data.draw(paged(lengths, kv_heads, dim, dtype))
    gen = torch.Generator().manual_seed(sum(lengths))
    q, k_block, v_block = (
        padded(torch.randn(len(lengths), rows, n, dim, generator=gen).to(dtype), (1, 1, 1, 8)).to(DEVICE)
        for n in (num_heads, kv_heads, kv_heads)
    )
    context_lens = padded(torch.tensor(lengths).int(), (2,)).to(DEVICE)
    args = (q, k_cache, v_cache, table, context_lens, k_block, v_block)
    draft_module.num_splits = lambda *_: splits
    ours, twin = (torch.full(q.shape, NAN, dtype=dtype, device=DEVICE) for _ in range(2))
    draft_module.paged_draft_attention(*args, causal=causal, out=ours, **keys)
    reference.paged_draft_attention(*args, causal=causal, out=twin, **keys)
    assert ours.isfinite().all()
    assert relative_error(ours, twin) < TOLERANCE[dtype]


@st.composite
def _tree_inputs(draw) -> dict:
    nodes = draw(st.integers(1, 64))
    counts = draw(st.lists(st.integers(0, nodes), max_size=4))
    states, max_requests = len(counts) + 2, len(counts) + draw(st.integers(0, 3)) or 1
    gen = torch.Generator().manual_seed(draw(st.integers(0, 2**16)))
    total = sum(counts)
    return dict(
        positions=torch.randint(0, 2**40, (2 * total + 1,), generator=gen),
        logits_indices=torch.randperm(2 * total + 1, generator=gen)[:total],
        cu_num_logits=torch.tensor([0, *counts]).cumsum(0).int(),
        idx_mapping=torch.randperm(states, generator=gen)[: len(counts)],
        depth=torch.randint(0, 64, (states, nodes), generator=gen).int(),
        ancestor_mask=torch.randint(-(2**63), 2**63 - 1, (states, nodes), generator=gen),
        batch_mask=torch.full((max_requests, nodes), POISON),
        batch_len=torch.full((max_requests,), POISON, dtype=torch.int32),
        local_pos=torch.full((total,), POISON, dtype=torch.int32),
    )


@settings(max_examples=40, deadline=None)
@given(case=_tree_inputs())
def test_tree_inputs(case):
    ours, twin = (
        {name: padded(tensor, (1,) * (tensor.dim() - 1) + (3,)).to(DEVICE) for name, tensor in case.items()}
        for _ in range(2)
    )
    tree_inputs(**ours)
    reference.tree_inputs(**twin)
    for name, tensor in twin.items():
        assert torch.equal(ours[name], tensor), name


@settings(max_examples=40, deadline=None)
@given(data=st.data(), most=st.sampled_from([1, 2, 9, 33, 64]))
def test_tree_walk(data, most):
    parents = data.draw(st.lists(trees(most), min_size=1, max_size=3))
    nodes = max(map(len, parents))
    # Of one token only, every walk goes as deep as it can.
    vocabulary = data.draw(st.integers(1, 3))
    gen = torch.Generator().manual_seed(data.draw(st.integers(0, 2**16)))
    table = torch.full((len(parents) + 1, nodes), POISON, dtype=torch.int32)
    for row, parent in zip(table, parents, strict=False):
        row[: len(parent)] = torch.tensor(parent)
    starts = torch.tensor([0, *map(len, parents)]).cumsum(0).int()
    tokens = [torch.randint(0, vocabulary, (int(starts[-1]),), generator=gen).to(DEVICE) for _ in range(2)]
    args = (*tokens, padded(table, (0, 3)).to(DEVICE), starts.to(DEVICE), torch.arange(len(parents)).to(DEVICE))
    for ours, twin in zip(tree_walk(*args), reference.tree_walk(*args), strict=True):
        assert torch.equal(ours, twin)


@settings(max_examples=40, deadline=None)
@given(
    count=st.integers(1, 70), batch=st.integers(1, 3), steps=st.sampled_from([1, 3, 1000]),
    seed=st.integers(0, 2**16), data=st.data(),
)  # fmt: skip
def test_tree_build(count, batch, steps, seed, data):
    gen = torch.Generator().manual_seed(seed)
    parent = (torch.rand(batch, count, generator=gen) * (torch.arange(count) + 1)).int() - 1
    # Few distinct steps make ties; the last one means that nothing can follow.
    step = -torch.randint(0, steps, (batch, count), generator=gen) / steps
    step[torch.rand(batch, count, generator=gen) < 0.1] = -torch.inf
    score = torch.zeros(batch, count)
    for i in range(count):
        above = score.gather(1, parent[:, i : i + 1].clamp(min=0).long())[:, 0]
        score[:, i] = torch.where(parent[:, i] >= 0, above, 0.0) + step[:, i]
    token = torch.randint(0, 2**40, (batch, count), generator=gen)
    args = [padded(x, (1, 2)).to(DEVICE) for x in (score, token, parent)]
    num_nodes = data.draw(st.integers(1, min(63, count)))
    for ours, twin in zip(tree_build(*args, num_nodes), reference.tree_build(*args, num_nodes), strict=True):
        assert torch.equal(ours, twin)
