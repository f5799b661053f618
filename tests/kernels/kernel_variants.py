# SPDX-License-Identifier: Apache-2.0
"""Which variants of each kernel the launchers can choose on a GPU, and which of them the compile gate compiles.

A variant is one call of a real launcher. Its features are what the compiled code depends on: the tile that
`tile_config` picks for the rows and heads, head dimension, dtypes, block size, splits, window, own keys, sinks or
soft-cap. Every number of rows up to `MAX_ROWS` and every group up to `MAX_GROUP` is asked for its tile and each
distinct tile kept once, so a change of `tile_config` changes the list by itself.

``pairs`` is a covering array: every two features that can occur together do so in some variant; beside it, where
registers are scarcest, every combination: the largest tile of the tree kernel. That is what CI compiles. ``all`` is the
product of everything that decides registers and shared memory (attention: all but the block size; candidates: every
feature), with the rest covered by the pairs.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import combinations, product

import torch
import triton

from vllm_kvspec.kernels import (
    _paged_softmax,
    gumbel_noise,
    kv_compact,
    recycle,
    tree_build,
    tree_candidates,
    tree_inputs,
    tree_walk,
)
from vllm_kvspec.kernels import draft_inputs as inputs
from vllm_kvspec.kernels import paged_draft_attention as draft
from vllm_kvspec.kernels import reference_candidates as candidates
from vllm_kvspec.kernels import reference_recycle as recycled
from vllm_kvspec.kernels import tree_attention as tree

MAX_ROWS, MAX_GROUP = 64, 16
HEAD_DIMS = (64, 80, 96, 128, 256, 512)
BLOCK_SIZES = (16, 32, 64)
# Query dtype and cache dtype. float32 queries are for tests: correct, but they spill.
DTYPES = {
    "bf16": (torch.bfloat16, torch.bfloat16),
    "fp16": (torch.float16, torch.float16),
    "fp8": (torch.bfloat16, torch.float8_e4m3fn),
}
# What decides registers and shared memory.
CRITICAL = ("tile", "group", "block keys", "D", "dtype", "splits", "window", "own", "scores")
# What the draft's rows see of their own block.
OWN = ("whole", "causal", "none")
# How scores become weights; no model has both.
SCORES = ("plain", "sinks", "soft-cap")


@dataclass(frozen=True)
class Variant:
    call: Callable[..., object]
    options: dict
    features: dict

    def __str__(self) -> str:
        return " ".join(f"{name}={value}" for name, value in self.features.items())


def ints(*shape: int, dtype: torch.dtype = torch.int32) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype)


def longs(*shape: int) -> torch.Tensor:
    return ints(*shape, dtype=torch.int64)


def caches(heads: int, dim: int, dtype: torch.dtype, block_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    raw = torch.zeros(8, heads, block_size, 2 * dim).to(dtype).transpose(1, 2)
    return raw[..., :dim], raw[..., dim:]


def draft_attention(rows, group, dim, dtype, splits, window, own, block_size, kv_heads=2) -> None:
    draft.num_splits = lambda *_: splits
    q_dtype, cache_dtype = DTYPES[dtype]
    q = torch.zeros(2, rows, group * kv_heads, dim, dtype=q_dtype)
    block = None if own == "none" else torch.zeros(2, rows, kv_heads, dim, dtype=q_dtype)
    draft.paged_draft_attention(
        q, *caches(kv_heads, dim, cache_dtype, block_size), ints(2, 64), ints(2), block, block,
        scale=0.1, sliding_window=window, causal=own == "causal", k_scale=torch.ones(1), v_scale=torch.ones(1),
        out=torch.empty_like(q),
    )  # fmt: skip


def verify_attention(rows, group, dim, dtype, splits, window, scores, block_size, kv_heads=2) -> None:
    tree.num_splits = lambda *_: splits
    q_dtype, cache_dtype = DTYPES[dtype]
    out = torch.zeros(2 * rows, group * kv_heads, dim, dtype=q_dtype)
    q, scale = (out.to(cache_dtype), torch.ones(1)) if dtype == "fp8" else (out, 1.0)
    tree.tree_attention(
        q, *caches(kv_heads, dim, cache_dtype, block_size), ints(2, 64), ints(3), ints(2), longs(256, 64), ints(256),
        scale=0.1, max_query_len=rows, sliding_window=window, q_scale=scale, k_scale=scale, v_scale=scale,
        soft_cap=50.0 if scores == "soft-cap" else 0.0,
        sinks=torch.zeros(group * kv_heads, dtype=q_dtype) if scores == "sinks" else None, out=out,
    )  # fmt: skip


def _group_kind(group: int) -> str:
    return "1" if group == 1 else "2^n" if group & (group - 1) == 0 else "other"


def _tiles(dim: int, dtype: str, is_draft: bool) -> Iterator[tuple[int, int, dict]]:
    """Rows, group and features of each distinct tile that the launcher can choose."""
    seen = set()
    # vLLM quantises the queries too where it quantises the cache; not those of the head.
    q = torch.empty(1, 1, dim, dtype=DTYPES[dtype][0 if is_draft else 1])
    for group, rows in product(range(1, MAX_GROUP + 1), range(1, MAX_ROWS + 1)):
        config = _paged_softmax.tile_config(rows * group, q, 1 if is_draft else group)
        features = {"tile": config["BLOCK_M"], "group": _group_kind(group)}
        if is_draft:
            features["block keys"] = min(config["TILE"], max(16, triton.next_power_of_2(rows)))
        if tuple(features.values()) not in seen:
            seen.add(tuple(features.values()))
            yield rows, group, features


def attention_variants(capability: int, is_draft: bool) -> list[Variant]:
    """The whole product of features for one attention kernel."""
    variants = []
    # Triton knows e4m3 from compute capability 8.9 on.
    dtypes = [dtype for dtype in DTYPES if dtype != "fp8" or capability >= 89]
    for dim, dtype in product(HEAD_DIMS, dtypes):
        for rows, group, tile in _tiles(dim, dtype, is_draft):
            kinds = product(["own"], OWN) if is_draft else product(["scores"], SCORES)
            for splits, window, (name, value), block_size in product((1, 8), (0, 4096), kinds, BLOCK_SIZES):
                options = dict(rows=rows, group=group, dim=dim, dtype=dtype, splits=splits, window=window)
                features = tile | {"D": dim, "dtype": dtype, "splits": splits, "window": window}
                options[name] = features[name] = value
                options["block_size"] = features["block size"] = block_size
                variants.append(Variant(draft_attention if is_draft else verify_attention, options, features))
    return variants


def covering_pairs(variants: list[Variant]) -> list[Variant]:
    """A small subset in which every pair of feature values that occurs in `variants` occurs; greedy, deterministic."""
    number: dict[tuple, int] = {}
    bits = []
    for variant in variants:
        pairs = combinations(variant.features.items(), 2)
        bits.append(sum(1 << number.setdefault(pair, len(number)) for pair in pairs))
    missing, chosen = (1 << len(number)) - 1, []
    while missing:
        best = max(range(len(bits)), key=lambda i: (bits[i] & missing).bit_count())
        chosen.append(variants[best])
        missing &= ~bits[best]
    return chosen


def critical_product(variants: list[Variant]) -> list[Variant]:
    """One variant for each combination of the features that decide registers and shared memory."""
    first: dict[tuple, Variant] = {}
    for variant in variants:
        first.setdefault(tuple(variant.features.get(name) for name in CRITICAL), variant)
    return list(first.values())


def small_variants() -> list[Variant]:
    """The kernels without a choice of tile, at the sizes that change their code, and at the largest ones."""
    variants = [Variant(_gumbel_noise, {}, {})]
    variants += [Variant(_draft_inputs, dict(state=state), dict(state=state)) for state in (False, True)]
    for nodes in (2, 64):
        variants += [Variant(call, dict(nodes=nodes), dict(nodes=nodes)) for call in (_tree_inputs, _tree_walk)]
        variants.append(Variant(_tree_build, dict(num_nodes=nodes - 1), dict(nodes=nodes)))
    variants += [Variant(_recycle_update, {}, {}), Variant(_own_matches, {}, {})]
    for size, coupled, head in product((1, 8, 16, 63), (False, True), (0, 232)):
        features = dict(nodes=size, coupled=coupled, candidates=head)
        variants.append(Variant(_recycle_tree, dict(size=size, coupled=coupled, head=head), features))
    for heads, dim, dtype in ((8, 128, torch.bfloat16), (1, 64, torch.uint8), (32, 256, torch.bfloat16)):
        features = {"KV heads": heads, "D": dim, "dtype": str(dtype).removeprefix("torch.")}
        variants.append(Variant(_kv_compact, dict(heads=heads, dim=dim, dtype=dtype), features))
    for dim, splits, padding in ((64, 2, True), (80, 16, False), (128, 16, True), (256, 16, True), (512, 16, True)):
        options = dict(dim=dim, splits=splits, padding=padding)
        variants.append(Variant(_merge_splits, options, {"D": dim, "splits": splits, "padding": padding}))
    return variants


def _tree_inputs(nodes: int) -> None:
    tree_inputs.tree_inputs(
        longs(512), longs(256), ints(5), longs(4), ints(256, nodes), longs(256, nodes),
        batch_mask=longs(256, nodes), batch_len=ints(256), local_pos=ints(256),
    )  # fmt: skip


def _tree_walk(nodes: int) -> None:
    tree_walk.tree_walk(longs(256), ints(256), ints(256, nodes), ints(5), longs(4))


def _tree_build(num_nodes: int) -> None:
    tree_build.tree_build(torch.zeros(4, 256), longs(4, 256), ints(4, 256), num_nodes)


def _recycle_update() -> None:
    recycle.recycle_update(
        recycled.empty_table(1024), longs(99, recycled.WIDTH), torch.zeros(99, recycled.WIDTH), input_ids=ints(512),
        positions=longs(512), logits_indices=longs(99), idx_mapping=longs(99), local_pos=ints(99),
        parent=ints(256, 33), owner=longs(256), text=ints(256, 4096),
    )  # fmt: skip


def _own_matches() -> None:
    recycle.own_matches(ints(256, 32768), longs(4), ints(4))


def _recycle_tree(size: int, coupled: bool, head: int) -> None:
    recycle.recycle_tree(
        recycled.empty_table(1024), ints(4, recycled.MATCHES), request=longs(4), base=ints(4),
        temperature=torch.zeros(4), seed=longs(4), chain=ints(4), owner=longs(256), text=ints(256, 4096), size=size,
        num_nodes=size, coupled=coupled, head_width=4,
        head=candidates.Candidates(torch.zeros(4, head), longs(4, head), ints(4, head)) if head else None,
    )  # fmt: skip


def _kv_compact(heads: int, dim: int, dtype: torch.dtype) -> None:
    layers = [torch.zeros(2, heads, 16, 2 * dim, dtype=dtype) for _ in range(2)]
    kv_compact.kv_compact(layers, kv_compact.kv_base_ptrs(layers), ints(4, 64), longs(4), ints(4, 33), ints(4))


def _merge_splits(dim: int, splits: int, padding: bool) -> None:
    parts = _paged_softmax.new_parts(4, 32, splits, dim, torch.device("cpu"))
    out = torch.zeros(4, 32, dim, dtype=torch.bfloat16)
    _paged_softmax.merge_splits(parts, out, ints(1) if padding else None)


def _gumbel_noise() -> None:
    gumbel_noise.gumbel_noise(longs(256), torch.zeros(256), longs(4, 8), longs(4), 151936)


def _draft_inputs(state: bool) -> None:
    hidden = torch.zeros(4, 4096, dtype=torch.bfloat16) if state else None
    rows = inputs.DraftRows(longs(4), ints(4), longs(4), torch.zeros(4), longs(4), ints(4), hidden)
    inputs.draft_inputs(
        longs(3), ints(256), longs(256, 1), torch.zeros(256), longs(256), ints(256), num_sampled=ints(3),
        path=ints(3, 33) if state else None, cu_num_logits=ints(4), logits_indices=longs(99),
        hidden_states=torch.zeros(512, 4096, dtype=torch.bfloat16), rows=rows, padding_request=255,
    )  # fmt: skip


def candidate_variants() -> list[Variant]:
    """One level of a tree of candidates, from 151936 logits; a stride of 0 stands for their memory."""
    parents = {"1": (1, True), "8 sharing logits": (8, True), "8": (8, False)}
    widths = {"4 ranked": (4, False), "8 at fixed places": (8, True), "8 of the last level": (8, False)}
    variants = []
    ranks = {"0": (0, False), "96": (96, False), "256": (256, False), "256 gated": (256, True)}
    for dtype, batch, (of, (p, shared)), (rank, (r, gated)), ids, coupled, (width, (w, fixed)) in product(
        (torch.bfloat16, torch.float32),
        (1, 8),
        parents.items(),
        ranks.items(),
        ("all", "listed", "by parent"),
        (False, True),
        widths.items(),
    ):
        # Only parents with logits of their own have tokens of their own, and then no transition bias.
        if ids == "by parent" and (r or shared):
            continue
        options = dict(
            dtype=dtype, batch=batch, num_parents=p, shared=shared, rank=r, gated=gated, width=w, fixed=fixed
        )
        features = {
            "dtype": str(dtype).removeprefix("torch."),
            "batch": batch,
            "parents": of,
            "rank": rank,
            "children": width,
        }
        flags = {"ids": ids, "coupled": coupled}
        variants.append(Variant(_tree_level, options | flags, features | flags))
    return variants


def _tree_level(dtype, batch, num_parents, shared, rank, gated, width, fixed, ids, coupled) -> None:
    entries = 4096 if ids == "by parent" else 151936
    shape = (batch, num_parents)
    # A level of 8 ranked children serves to find a row's best tokens: none of them is a parent.
    num_next = 0 if width == 8 and not fixed else 8
    level = candidates.Level(num_parents, width, num_next, ints(num_parents * width) if fixed else None)
    parents = candidates.Parents(longs(*shape), torch.zeros(shape), ints(*shape))
    transition = torch.zeros(256, rank, dtype=dtype) if rank else None
    gate = torch.zeros(batch, 1, rank, dtype=dtype).expand(-1, num_parents, -1) if gated else None
    tree_candidates.tree_level(
        torch.zeros(entries + 128, dtype=dtype).as_strided((*shape, entries), (0, 0 if shared else 16, 1)),
        parents, transition, transition, level=level, depth=3, base=longs(batch), idx_mapping=longs(batch),
        temperature=torch.zeros(256), seeds=longs(256), coupled=coupled, chain=ints(256),
        scales=candidates.RankingScales(0.5, 0.8),
        draft_ids={"all": None, "listed": longs(entries), "by parent": longs(*shape, entries)}[ids], gate=gate,
        candidates=candidates.empty_candidates(batch, [level], torch.device("cpu")), offset=0,
    )  # fmt: skip


def largest_tile(variants: list[Variant]) -> Variant:
    """The first variant of head dimension 128 that fills the largest tile."""
    return max((v for v in variants if v.features["D"] == 128), key=lambda v: v.features["tile"])


def largest_tiles(variants: list[Variant]) -> list[Variant]:
    """Every combination of group, splits, window and scores in the largest tile, in bf16 at head dimension 128."""
    fixed = {"tile": largest_tile(variants).features["tile"], "D": 128, "dtype": "bf16", "block size": 16}
    return [v for v in variants if fixed.items() <= v.features.items()]


def select(capability: int, selection: str) -> list[Variant]:
    """Variants to compile for one GPU generation; selection is ``largest``, ``pairs`` or ``all``."""
    if selection == "largest":
        return [largest_tile(attention_variants(capability, is_draft)) for is_draft in (True, False)]
    candidate_level = candidate_variants()
    chosen = small_variants() + (candidate_level if selection == "all" else covering_pairs(candidate_level))
    for is_draft in (True, False):
        variants = attention_variants(capability, is_draft)
        chosen += covering_pairs(variants)
        if not is_draft:
            chosen += largest_tiles(variants)
        if selection == "all":
            chosen += critical_product(variants)
    return chosen
