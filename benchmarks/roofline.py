# SPDX-License-Identifier: Apache-2.0
"""What a step must cost at least, computed from shapes: the yardstick for ``bench_engine.py``. Nothing is measured.

    python benchmarks/roofline.py --bandwidth 4.3e12 --flops 790e12

Per batch and context: a plain decode step, verification of a tree of N nodes, the head's passes, the break-even tau,
(verification + head) / decode: speculation wins above it; and the head's share of a step. The formulae are those of the
engine's node budget (``vllm_kvspec/engine/budget/choice.py``), for Qwen3-8B in bfloat16.
"""

import argparse
from types import SimpleNamespace

from budget_simulation import QWEN3_8B
from report import table

from vllm_kvspec.engine.budget.choice import Device, Roofline, decoder_pass


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--bandwidth", type=float, default=4.3e12, help="bytes per second")
    parser.add_argument("--flops", type=float, default=790e12, help="dense 16-bit FLOP per second")
    parser.add_argument("--head-layers", type=int, default=1)
    parser.add_argument("--draft-vocab-size", type=int, default=151936)
    parser.add_argument("--block", type=int, default=8, help="positions that the head scores")
    parser.add_argument("--passes", type=int, default=1, help="per draft; token by token: the depth")
    parser.add_argument("--nodes", nargs="+", type=int, default=[8, 16, 32, 63])
    parser.add_argument("--batch", nargs="+", type=int, default=[1, 8, 32, 128])
    parser.add_argument("--context", nargs="+", type=int, default=[1024, 8192, 32768])
    arguments = parser.parse_args()
    target = decoder_pass(SimpleNamespace(**QWEN3_8B))
    shape = {"num_hidden_layers": arguments.head_layers, "draft_vocab_size": arguments.draft_vocab_size}
    head = decoder_pass(SimpleNamespace(**QWEN3_8B | shape))
    costs = Roofline(target, head, arguments.block, Device(arguments.bandwidth, arguments.flops))
    rows = []
    for context in arguments.context:
        for batch in arguments.batch:
            decode = costs.verify_seconds(batch, batch * context, 0)
            draft = arguments.passes * costs.draft_seconds(batch, batch * context)
            row = {"batch": batch, "context": context, "decode ms": 1e3 * decode, "draft ms": 1e3 * draft}
            for nodes in arguments.nodes:
                verify = costs.verify_seconds(batch, batch * context, nodes)
                row |= {f"verify {nodes} ms": 1e3 * verify, f"break-even tau {nodes}": (verify + draft) / decode}
                row |= {f"draft's share {nodes}": draft / (verify + draft)}
            rows.append(row)
    print(table(rows))


if __name__ == "__main__":
    main()
