# SPDX-License-Identifier: Apache-2.0
"""Cases of the kernels that read or move KV: inputs, launch, torch twin, and the bytes that any implementation moves.

Needs torch and triton; vLLM's own attention kernels are added where they can be imported. Attention inputs are those of
serving: shuffled blocks of 16, K and V of a head side by side, every request with the same context.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from vllm_kvspec.kernels import reference
from vllm_kvspec.kernels.kv_compact import kv_compact
from vllm_kvspec.kernels.paged_draft_attention import paged_draft_attention
from vllm_kvspec.kernels.tree_attention import tree_attention
from vllm_kvspec.tree import ancestor_masks, depths

BLOCK_SIZE = 16

Outputs = tuple[torch.Tensor, ...]
# Largest difference allowed, relative to the largest value of the twin's output.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 5e-3, torch.bfloat16: 2e-2}


def difference(found: Outputs, expected: Outputs) -> tuple[float, bool]:
    """(largest difference relative to the twin's largest value, whether it is allowed); integers must be equal."""
    worst, allowed = 0.0, len(found) == len(expected)
    for a, b in zip(found, expected, strict=False):
        if not b.is_floating_point():
            allowed &= torch.equal(a, b)
            continue
        error = ((a.double() - b.double()).abs().max() / b.double().abs().max().clamp(min=1e-30)).item()
        worst = max(worst, error)
        # A NaN compares false.
        allowed &= error <= TOLERANCE[b.dtype]
    return worst, allowed


@dataclass(frozen=True)
class Geometry:
    """Shape of the target; the defaults are Qwen3-8B's."""

    num_heads: int = 32
    num_kv_heads: int = 8
    head_dim: int = 128
    num_layers: int = 36
    vocab_size: int = 151936
    draft_block_size: int = 8
    hidden_size: int = 4096
    transition_rank: int = 256
    dtype: torch.dtype = torch.bfloat16

    @property
    def kv_bytes_per_token(self) -> int:
        """Of one layer."""
        return 2 * self.num_kv_heads * self.head_dim * self.dtype.itemsize


@dataclass
class Case:
    """``run`` and ``twin`` return the same tensors; ``others`` are foreign kernels with the twin of what they compute.

    ``bytes_moved`` counts what must cross the memory bus once; None where latency is all there is.
    """

    kernel: str
    shape: dict[str, int]
    run: Callable[[], Outputs]
    twin: Callable[[], Outputs]
    bytes_moved: int | None = None
    others: dict[str, tuple[Callable[[], Outputs], Callable[[], Outputs]]] = field(default_factory=dict)
    compare: Callable[[Outputs, Outputs], tuple[float, bool]] = difference


def random_parents(num_nodes: int, generator: torch.Generator) -> list[int]:
    """A random tree, deep rather than wide."""
    back = torch.randint(1, 4, (num_nodes,), generator=generator).tolist()
    return [max(0, node + 1 - step) for node, step in enumerate(back)]


def random_trees(batch: int, rows: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """parent int32, depth int32, ancestor_mask int64, each [batch, rows]."""
    generator = torch.Generator().manual_seed(0)
    parents = [random_parents(rows - 1, generator) for _ in range(batch)]
    columns = ([[0, *p] for p in parents], [depths(p) for p in parents], [ancestor_masks(p) for p in parents])
    dtypes = (torch.int32, torch.int32, torch.int64)
    return tuple(torch.tensor(c, dtype=d, device=device) for c, d in zip(columns, dtypes, strict=True))


def paged_cache(geometry: Geometry, batch: int, length: int, layers: int, device: torch.device):
    """(logical caches [blocks, Hkv, 16, 2D], one per layer, and block_table int32 [batch, blocks of a request])."""
    per_request = -(-length // BLOCK_SIZE)
    shape = (batch * per_request, BLOCK_SIZE, geometry.num_kv_heads, 2 * geometry.head_dim)
    caches = [torch.randn(shape, dtype=geometry.dtype, device=device).transpose(1, 2) for _ in range(layers)]
    table = torch.randperm(batch * per_request, device=device).view(batch, per_request).int()
    return caches, table


def split_kv(cache: torch.Tensor, head_dim: int) -> tuple[torch.Tensor, torch.Tensor]:
    """K and V views [blocks, 16, Hkv, D] of a logical cache."""
    return cache.transpose(1, 2).split(head_dim, dim=-1)


def tree_attention_case(g: Geometry, batch: int, context: int, rows: int, layers: int, device: torch.device) -> Case:
    """Verification rows over context + rows keys; with one row, plain decoding."""
    caches, table = paged_cache(g, batch, context + rows, layers, device)
    # Large enough that one wrong bit of the mask shows beside any context.
    nodes = torch.arange(context, context + rows, device=device)
    for cache in caches:
        values = split_kv(cache, g.head_dim)[1]
        values[table[:, nodes // BLOCK_SIZE].long(), nodes % BLOCK_SIZE] *= max(1.0, (context / rows) ** 0.5)
    q = torch.randn(batch * rows, g.num_heads, g.head_dim, dtype=g.dtype, device=device)
    starts = torch.arange(0, batch * rows + 1, rows, dtype=torch.int32, device=device)
    seq_lens = torch.full((batch,), context + rows, dtype=torch.int32, device=device)
    mask = random_trees(batch, rows, device)[2] if rows > 1 else torch.ones(batch, 1, dtype=torch.int64, device=device)
    batch_len = torch.full((batch,), rows if rows > 1 else 0, dtype=torch.int32, device=device)
    keywords = dict(scale=g.head_dim**-0.5, max_query_len=rows)

    def over_layers(kernel, lens):
        def run():
            inputs = [(*split_kv(cache, g.head_dim), table, starts, seq_lens, mask, lens) for cache in caches]
            return tuple(kernel(q, *layer, **keywords, out=torch.empty_like(q)) for layer in inputs)

        return run

    causal = over_layers(reference.tree_attention, torch.zeros_like(batch_len))
    return Case(
        "tree_attention",
        dict(batch=batch, context=context, rows=rows, layers=layers),
        over_layers(tree_attention, batch_len),
        over_layers(reference.tree_attention, batch_len),
        layers * (batch * (context + rows) * g.kv_bytes_per_token + 2 * q.nbytes),
        {name: (run, causal) for name, run in foreign_attention(g, q, caches, table, starts, seq_lens, rows).items()},
    )


def paged_draft_attention_case(
    g: Geometry, batch: int, context: int, rows: int, layers: int, device: torch.device
) -> Case:
    """The head's block of ``rows`` queries over the context of ``layers`` target layers."""
    caches, table = paged_cache(g, batch, context + rows, layers, device)
    shape = (batch, rows, g.num_heads, g.head_dim)
    q = torch.randn(shape, dtype=g.dtype, device=device)
    k_block, v_block = (
        torch.randn(batch, rows, g.num_kv_heads, g.head_dim, dtype=g.dtype, device=device) for _ in range(2)
    )
    lens = torch.full((batch,), context, dtype=torch.int32, device=device)

    def over_layers(kernel):
        def run():
            inputs = [(*split_kv(cache, g.head_dim), table, lens, k_block, v_block) for cache in caches]
            return tuple(kernel(q, *layer, scale=g.head_dim**-0.5, out=torch.empty_like(q)) for layer in inputs)

        return run

    starts = torch.arange(0, batch * rows + 1, rows, dtype=torch.int32, device=device)
    seq_lens, flat = lens + rows, q.flatten(0, 1)
    no_tree = (torch.zeros(batch, rows, dtype=torch.int64, device=device), torch.zeros_like(lens))

    def causal():
        keywords = dict(scale=g.head_dim**-0.5, max_query_len=rows)
        inputs = [(*split_kv(cache, g.head_dim), table, starts, seq_lens, *no_tree) for cache in caches]
        return tuple(reference.tree_attention(flat, *layer, **keywords, out=torch.empty_like(flat)) for layer in inputs)

    others = foreign_attention(g, flat, caches, table, starts, seq_lens, rows)
    return Case(
        "paged_draft_attention",
        dict(batch=batch, context=context, rows=rows, layers=layers),
        over_layers(paged_draft_attention),
        over_layers(reference.paged_draft_attention),
        layers * (batch * (context + rows) * g.kv_bytes_per_token + 2 * q.nbytes),
        {name: (run, causal) for name, run in others.items()},
    )


def foreign_attention(g: Geometry, q, caches, table, starts, seq_lens, rows: int) -> dict[str, Callable[[], Outputs]]:
    """vLLM's unified Triton attention and FlashAttention 3, causal, same rows and keys; those that can run here."""
    found: dict[str, Callable[[], Outputs]] = {}
    max_len = table.shape[1] * BLOCK_SIZE
    if q.device.type != "cuda":
        # Without a GPU vLLM has no Triton.
        return found
    try:
        from vllm.v1.attention.backends.triton_attn import MIN_LAUNCH_GRID_SIZE_2D, NUM_PAR_SOFTMAX_SEGMENTS
        from vllm.v1.attention.ops.triton_unified_attention import unified_attention
    except ImportError:
        return found
    # The split-KV scratch as vLLM's metadata builder makes it; used for single rows only.
    threshold = MIN_LAUNCH_GRID_SIZE_2D // g.num_kv_heads
    parts = (threshold, g.num_heads, NUM_PAR_SOFTMAX_SEGMENTS)
    padded_dim = 1 << (g.head_dim - 1).bit_length()
    scratch = [torch.empty(s, dtype=torch.float32, device=q.device) for s in ((*parts, padded_dim), parts, parts)]

    def vllm_triton() -> Outputs:
        outs = []
        for cache in caches:
            k, v = split_kv(cache, g.head_dim)
            outs.append(torch.empty_like(q))
            unified_attention(
                q=q, k=k, v=v, out=outs[-1], cu_seqlens_q=starts, max_seqlen_q=rows, seqused_k=seq_lens,
                max_seqlen_k=max_len, softmax_scale=g.head_dim**-0.5, causal=True, window_size=(-1, -1),
                block_table=table, softcap=0, q_descale=None, k_descale=None, v_descale=None,
                seq_threshold_3D=threshold, num_par_softmax_segments=NUM_PAR_SOFTMAX_SEGMENTS,
                softmax_segm_output=scratch[0], softmax_segm_max=scratch[1], softmax_segm_expsum=scratch[2],
            )  # fmt: skip
        return tuple(outs)

    found["vllm_triton"] = vllm_triton
    if q.dtype == torch.float32 or torch.cuda.get_device_capability(q.device)[0] != 9:
        return found
    try:
        from vllm.vllm_flash_attn import flash_attn_varlen_func
    except ImportError:
        return found

    def flash_attention_3() -> Outputs:
        return tuple(
            flash_attn_varlen_func(
                q,
                *split_kv(cache, g.head_dim),
                max_seqlen_q=rows,
                cu_seqlens_q=starts,
                max_seqlen_k=max_len,
                seqused_k=seq_lens,
                block_table=table,
                softmax_scale=g.head_dim**-0.5,
                causal=True,
                fa_version=3,
            )  # fmt: skip
            for cache in caches
        )

    found["flash_attention_3"] = flash_attention_3
    return found


def kv_compact_case(g: Geometry, batch: int, rows: int, layers: int, device: torch.device) -> Case:
    """Every request accepts the longest path of its tree; the whole path moves."""
    # The context does not matter: only rows near the end move.
    base_position = 3 * BLOCK_SIZE + 5
    caches, table = paged_cache(g, batch, base_position + rows, layers, device)
    parent, depth, _ = (t.cpu() for t in random_trees(batch, rows, device))
    path = torch.arange(rows, dtype=torch.int32).repeat(batch, 1)
    for b in range(batch):
        node = int(depth[b].argmax())
        while node:
            path[b, depth[b, node]] = node
            node = int(parent[b, node])
    num_sampled = depth.max(1).values + 1
    moved = int(((path != torch.arange(rows)) & (torch.arange(rows) < num_sampled[:, None])).sum())
    base = torch.full((batch,), base_position, dtype=torch.int64, device=device)
    inputs = (table, base, path.to(device), num_sampled.to(device))
    pristine = [cache.clone() for cache in caches]
    pointers = reference.kv_base_ptrs(caches)

    def twin():
        copies = [cache.clone() for cache in pristine]
        reference.kv_compact(copies, reference.kv_base_ptrs(copies), *inputs)
        return tuple(copies)

    def run():
        kv_compact(caches, pointers, *inputs)
        return tuple(caches)

    shape = dict(batch=batch, rows=rows, layers=layers)
    # Read and written.
    return Case("kv_compact", shape, run, twin, 2 * moved * layers * g.kv_bytes_per_token)
