# SPDX-License-Identifier: Apache-2.0
"""Command line: ``vllm-kvspec {init,generate,train,eval}``. Each command imports what it needs when it runs."""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

INIT_EXAMPLE = "example: vllm-kvspec init --target_model Qwen/Qwen3-8B --output_dir head --num_layers 3"
GENERATE_EXAMPLE = (
    "example: vllm-kvspec generate --target_model TARGET --data_path texts.jsonl --output rows.jsonl "
    "--num_prompts 4000 --temperatures 0 1"
)
TRAIN_EXAMPLE = (
    "example: vllm-kvspec train --target_model TARGET --data_path rows.jsonl --output_dir head --num_layers 3 "
    "--max_steps 2000 --per_device_train_batch_size 8 --learning_rate 2e-3 --lr_scheduler_type cosine"
)
EVAL_EXAMPLE = (
    "example: vllm-kvspec eval --target_model TARGET --draft_model head --data_path held_out.jsonl --num_prompts 64"
)


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


def _generate(args: argparse.Namespace) -> None:
    from vllm_kvspec.train.run import generate

    count = generate(
        args.target_model,
        args.data_path,
        args.output,
        num_prompts=args.num_prompts,
        prompt_length=args.prompt_length,
        max_new_tokens=args.max_new_tokens,
        temperatures=args.temperatures,
        batch_size=args.batch_size,
        seed=args.seed,
    )
    print(f"Wrote {count} rows to {args.output}.")


def _add_prompt_arguments(parser: argparse.ArgumentParser, num_prompts: int, max_new_tokens: int) -> None:
    parser.add_argument("--target_model", required=True, help="target: directory or Hugging Face name")
    parser.add_argument("--data_path", nargs="+", required=True, help='jsonl files with "text" or "messages"')
    parser.add_argument("--num_prompts", type=int, default=num_prompts)
    parser.add_argument("--prompt_length", type=int, default=64, help="tokens of a prompt")
    parser.add_argument("--max_new_tokens", type=int, default=max_new_tokens)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--seed", type=int, default=0, help="chooses the prompts")


def _add_generate(commands) -> None:
    parser = commands.add_parser("generate", help="let a target continue prompts", epilog=GENERATE_EXAMPLE)
    _add_prompt_arguments(parser, num_prompts=1000, max_new_tokens=192)
    parser.add_argument("--output", type=Path, required=True, help="jsonl to write")
    parser.add_argument("--batch_size", type=int, default=64)
    parser.set_defaults(run=_generate)


def _train(args: argparse.Namespace) -> None:
    from vllm_kvspec.train.run import train

    print(f"Wrote {train(args.rest, prog='vllm-kvspec train', epilog=TRAIN_EXAMPLE)}.")


def _add_train(commands) -> None:
    # transformers' parser of TrainingArguments reads these arguments and prints their help.
    parser = commands.add_parser("train", help="train a head", add_help=False)
    parser.set_defaults(run=_train, takes_rest=True)


def _eval(args: argparse.Namespace) -> None:
    from vllm_kvspec.eval.report import measure

    report = measure(
        args.target_model,
        args.draft_model,
        args.data_path,
        num_prompts=args.num_prompts,
        prompt_length=args.prompt_length,
        max_new_tokens=args.max_new_tokens,
        temperatures=args.temperatures,
        num_nodes=args.num_nodes,
        beam=args.beam,
        width=args.width,
        seed=args.seed,
    )
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


def _add_eval(commands) -> None:
    parser = commands.add_parser("eval", help="measure a head's acceptance offline", epilog=EVAL_EXAMPLE)
    _add_prompt_arguments(parser, num_prompts=64, max_new_tokens=160)
    parser.add_argument("--draft_model", required=True, help="directory of the head")
    parser.add_argument("--num_nodes", type=int, nargs="+", default=[8, 16, 32, 63], help="tree sizes")
    parser.add_argument("--beam", type=int, default=8, help="nodes expanded per level")
    parser.add_argument("--width", type=int, default=4, help="children per node")
    parser.add_argument("--output", type=Path, help="json to write")
    parser.set_defaults(run=_eval)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse ``argv`` (the process's own when None) and run the command."""
    parser = argparse.ArgumentParser(prog="vllm-kvspec", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_init, _add_generate, _add_train, _add_eval):
        add(commands)
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "takes_rest", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    args.run(args)


if __name__ == "__main__":
    main()
