# SPDX-License-Identifier: Apache-2.0
"""Command line: ``vllm-kvspec init`` and its siblings. Each command imports what it needs when it runs."""

import argparse
from collections.abc import Sequence

INIT_EXAMPLE = "example: vllm-kvspec init --target_model Qwen/Qwen3-8B --output_dir head --num_layers 3"


def _init(args: argparse.Namespace) -> None:
    from vllm_kvspec.models.create import write_untrained_head

    directory = write_untrained_head(
        args.target_model,
        args.output_dir,
        seed=args.seed,
        context=args.context,
        draft_block_size=args.draft_block_size,
        num_hidden_layers=args.num_layers,
        target_kv_layer_ids=args.target_kv_layer_ids,
        transition_rank=args.transition_rank,
    )
    print(f"Wrote an untrained head to {directory}.")


def _add_init(commands) -> None:
    parser = commands.add_parser("init", help="write an untrained head for a target", epilog=INIT_EXAMPLE)
    parser.add_argument("--target_model", required=True, help="target: directory or Hugging Face name")
    parser.add_argument("--output_dir", required=True)
    parser.add_argument("--context", choices=["kv", "hybrid"], default="hybrid")
    parser.add_argument("--draft_block_size", type=int, default=8)
    parser.add_argument("--num_layers", type=int, default=3)
    parser.add_argument("--target_kv_layer_ids", type=int, nargs="+", help="one target layer per head layer")
    parser.add_argument("--transition_rank", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_init)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse ``argv`` (the process's own when None) and run the command."""
    parser = argparse.ArgumentParser(prog="vllm-kvspec", description=__doc__)
    commands = parser.add_subparsers(required=True)
    _add_init(commands)
    args = parser.parse_args(argv)
    args.run(args)


if __name__ == "__main__":
    main()
