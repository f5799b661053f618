# SPDX-License-Identifier: Apache-2.0
"""What the node budget chooses and what it should bring, computed on the roofline. Nothing here is measured.

    python benchmarks/budget_simulation.py > benchmarks/results/budget_simulation.md

For a Qwen3-8B shaped target and a head over its KV cache, by batch and context: the chosen number of nodes and the
speed against plain decoding, beside a tree of 16 nodes and a chain that never change. Acceptance is a model: a node's
children are right with the same probabilities at every depth, and a tree holds the likeliest nodes. The first child's
probability is set so that a chain of 7 reaches the given tau; of the rest, the second, third and fourth child get
35%, 15% and 10%, which puts trees within 0.2 of the bundled head's tau at temperature 1.
"""

import argparse
import heapq
import shlex
import sys
from types import SimpleNamespace

from vllm_kvspec.engine.budget.choice import (
    Acceptance,
    Device,
    Roofline,
    budget_sizes,
    choose_nodes,
    decoder_pass,
    tokens_per_second,
)
from vllm_kvspec.tree import MAX_NODES

QWEN3_8B = dict(
    hidden_size=4096, intermediate_size=12288, num_hidden_layers=36, num_attention_heads=32, num_key_value_heads=8,
    head_dim=128, vocab_size=151936,
)  # fmt: skip
OTHER_CHILDREN = (0.35, 0.15, 0.10)
CHAIN = 7
BATCHES = (1, 4, 8, 16, 32, 64, 128, 256)
CONTEXTS = (1024, 8192, 32768)


def tree_profile(first: float, block: int) -> dict[int, float]:
    """tau of the tree of the n likeliest nodes, for n = 1..63."""
    children = [first, *((1 - first) * share for share in OTHER_CHILDREN)]
    heap = [(-p, 1) for p in children]
    heapq.heapify(heap)
    taus, tau = {}, 1.0
    for nodes in range(1, MAX_NODES + 1):
        p, depth = heapq.heappop(heap)
        tau = taus[nodes] = tau - p
        if depth < block:
            for child in children:
                heapq.heappush(heap, (p * child, depth + 1))
    return taus


def chain_tau(first: float, length: int) -> float:
    return sum(first**k for k in range(length + 1))


def first_child(tau: float) -> float:
    """Probability of the first child with which a chain of 7 has ``tau``, by bisection."""
    low, high = 0.0, 1.0
    while high - low > 1e-6:
        middle = (low + high) / 2
        low, high = (middle, high) if chain_tau(middle, CHAIN) < tau else (low, middle)
    return low


def rows(args: argparse.Namespace, roofline: Roofline, tau: float) -> list[dict]:
    """One row per batch and context that fits the KV room."""
    first = first_child(tau)
    tree = Acceptance(tree_profile(first, args.block))
    chain = Acceptance({n: chain_tau(first, n) for n in range(1, CHAIN + 1)})
    result = []
    for context in CONTEXTS:
        for batch in BATCHES:
            total = batch * context
            if total * roofline.target.context_bytes > args.kv_room:
                continue

            def speed(acceptance: Acceptance, nodes: int, batch=batch, total=total) -> float:
                plain = tokens_per_second(roofline, 0.0, batch, total, 0)
                return tokens_per_second(roofline, acceptance.accepted(nodes), batch, total, nodes) / plain

            nodes = choose_nodes(roofline, tree, budget_sizes(args.ceiling), batch, total)
            best = choose_nodes(roofline, tree, range(args.ceiling + 1), batch, total)
            result.append(
                {
                    "context": context,
                    "batch": batch,
                    "nodes": nodes,
                    "auto": speed(tree, nodes) if nodes else 1.0,
                    "best": speed(tree, best) if best else 1.0,
                    "tree of 16": speed(tree, 16),
                    f"chain of {CHAIN}": speed(chain, CHAIN),
                }
            )
    return result


def table(found: list[dict]) -> str:
    fixed = ["tree of 16", f"chain of {CHAIN}"]
    lines = ["| context | batch | nodes chosen | auto | " + " | ".join(fixed) + " |", "|---" * 6 + "|"]
    for row in found:
        cells = [f"{row['context'] // 1024}k", row["batch"], row["nodes"], f"{row['auto']:.2f}"]
        lines.append("| " + " | ".join(map(str, [*cells, *(f"{row[name]:.2f}" for name in fixed)])) + " |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--bandwidth", type=float, default=Device.bandwidth, help="bytes per second")
    parser.add_argument("--flops", type=float, default=Device.flops, help="dense 16-bit FLOP per second")
    parser.add_argument("--kv_room", type=float, default=117e9, help="bytes left for KV cache")
    parser.add_argument("--head_layers", type=int, default=2)
    parser.add_argument("--draft_vocab_size", type=int, default=32768)
    parser.add_argument("--block", type=int, default=8, help="positions that the head scores")
    parser.add_argument("--ceiling", type=int, default=MAX_NODES, help="num_speculative_tokens")
    parser.add_argument("--tau", type=float, nargs="+", default=[3.2, 5.7], help="of a chain of 7: chat, mathematics")
    args = parser.parse_args()
    target = SimpleNamespace(**QWEN3_8B)
    head = SimpleNamespace(
        **{**QWEN3_8B, "num_hidden_layers": args.head_layers, "draft_vocab_size": args.draft_vocab_size}
    )
    device = Device(args.bandwidth, args.flops)
    roofline = Roofline(decoder_pass(target), decoder_pass(head), args.block, device)
    print("# The node budget on the roofline\n")
    print("**Computed, not measured.** Speed against plain decoding; nothing here ran on a GPU.\n")
    print(f"```\npython benchmarks/budget_simulation.py {shlex.join(sys.argv[1:])}".rstrip() + "\n```\n")
    print(
        f"Qwen3-8B shapes in bfloat16, {args.bandwidth / 1e12:.2f} TB/s, {args.flops / 1e12:.0f} TFLOP/s, "
        f"{args.kv_room / 1e9:.0f} GB for KV; head of {args.head_layers} layers, block {args.block}, "
        f"draft vocabulary {args.draft_vocab_size}; at most {args.ceiling} nodes, chosen from "
        f"{budget_sizes(args.ceiling)[::-1]}. Batches that do not fit the KV room are left out.\n"
    )
    for tau in args.tau:
        found = rows(args, roofline, tau)
        print(f"## tau {tau} with a chain of {CHAIN}\n\n{table(found)}\n")
        lost = max(1 - row["auto"] / row["best"] for row in found)
        print(f"Any number of nodes instead of these sizes would win at most {100 * lost:.1f}%.\n")


if __name__ == "__main__":
    main()
