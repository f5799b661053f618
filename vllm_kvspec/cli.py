# SPDX-License-Identifier: Apache-2.0
"""Command line: ``vllm-kvspec {init,prepare,cache,train,eval,compare,export,doctor}``.

Each command imports what it needs when it runs.
"""

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

INIT_EXAMPLE = "example: vllm-kvspec init --target_model Qwen/Qwen3-8B --output_dir head --num_layers 3"
PREPARE_EXAMPLE = (
    "example: vllm-kvspec prepare --target_model Qwen/Qwen3-8B --data_path chats.jsonl HuggingFaceH4/ultrachat_200k "
    "--split train_sft --output rows.jsonl --num_prompts 50000; the same command goes on where it was interrupted"
)
DOCTOR_EXAMPLE = "example: vllm-kvspec doctor --target_model Qwen/Qwen3-8B --draft_model head"
TRAIN_EXAMPLE = (
    "example: vllm-kvspec train --target_model TARGET --data_path rows.jsonl --output_dir head --num_layers 3 "
    "--max_steps 2000; or vllm-kvspec train recipe.yaml --max_steps 2000; several GPUs: torchrun --standalone "
    "--nproc_per_node 8 -m vllm_kvspec.cli train ..."
)
CACHE_EXAMPLE = (
    "example: vllm-kvspec cache --engine_args '{\"tensor_parallel_size\": 4}' recipe.yaml --cache_dir states; then "
    "vllm-kvspec train recipe.yaml --cache_dir states"
)
EVAL_EXAMPLE = (
    "example: vllm-kvspec eval --target_model TARGET --draft_model head --data_path held_out.jsonl --num_prompts 64 "
    "--output results/head.json --plot results/head"
)
EXPORT_EXAMPLE = (
    "example: vllm-kvspec export --format eagle3 --draft_model head --output_dir head-eagle3; then vllm serve TARGET "
    """--speculative-config '{"method": "eagle3", "model": "head-eagle3", "num_speculative_tokens": 5}'"""
)
COMPARE_EXAMPLE = "example: vllm-kvspec compare results/*.json --output results/heads.md --plot results"


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
        transition=args.transition,
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
    parser.add_argument("--transition", choices=["tied", "table"], default="tied")
    parser.add_argument("--transition_rank", type=int, default=256)
    parser.add_argument("--seed", type=int, default=0)
    parser.set_defaults(run=_init)


def _prepare(args: argparse.Namespace) -> None:
    from vllm_kvspec.prepare import prepare

    options = {key: value for key, value in vars(args).items() if key not in ("run", "rest", "argv")}
    try:
        done = prepare(**options, command=shlex.join(["vllm-kvspec", *args.argv]))
    except KeyboardInterrupt:
        sys.exit(f"Interrupted; the same command goes on where {args.output} ends.")
    print(f"{args.output}: {done.rows} rows, {done.tokens} tokens, {done.learned_tokens} of them to learn from.")


def _add_prepare(commands) -> None:
    parser = commands.add_parser("prepare", help="let a target write the training rows", epilog=PREPARE_EXAMPLE)
    parser.add_argument("--target_model", required=True, help="target: directory or Hugging Face name")
    parser.add_argument(
        "--data_path",
        nargs="+",
        required=True,
        help="files (jsonl, json, parquet, txt) or Hugging Face datasets: messages, ShareGPT conversations or text",
    )
    parser.add_argument("--split", default="train", help="split of the Hugging Face datasets")
    parser.add_argument("--output", type=Path, required=True, help="jsonl to write; its record goes to OUTPUT.json")
    parser.add_argument(
        "--regenerate",
        choices=["engine", "server", "transformers", "none"],
        default="engine",
        help="what writes the answers: vLLM here (default) or at --base_url, transformers, or none (kept as given)",
    )
    parser.add_argument(
        "--base_url",
        nargs="+",
        default=[],
        help="vLLM servers of the target that write the answers (http://HOST:8000/v1), with or without kvspec",
    )
    parser.add_argument("--concurrency", type=int, default=64, help="requests at a time to each --base_url")
    parser.add_argument("--num_prompts", type=int, help="draw this many, longer texts more often (default: each once)")
    parser.add_argument("--prompt_length", type=int, default=64, help="tokens of a text that become its prompt")
    parser.add_argument("--max_new_tokens", type=int, default=512, help="tokens of an answer")
    parser.add_argument("--max_length", type=int, default=4096, help="tokens of a row, within the target's context")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0], help="taken in turn")
    parser.add_argument("--batch_size", type=int, default=256, help="prompts between two writes of the file")
    parser.add_argument("--seed", type=int, default=0, help="chooses prompts and samples")
    parser.add_argument("--chat_template_kwargs", type=json.loads, default={}, help="json object")
    parser.add_argument("--engine_args", type=json.loads, default={}, help="json object: arguments of vllm.LLM")
    parser.set_defaults(run=_prepare)


def _cache(args: argparse.Namespace) -> None:
    from vllm_kvspec.cache import cache

    found = cache(args.rest, args.engine_args, prog="vllm-kvspec cache", epilog=CACHE_EXAMPLE)
    print(f"{found.directory}: {found.num_bytes:,} bytes, {found.bytes_per_token:,} a token of {len(found)} rows.")


def _add_cache(commands) -> None:
    # The rest are train's own.
    parser = commands.add_parser(
        "cache", help="let vLLM write what training reads of the target; takes train's flags", add_help=False
    )
    parser.add_argument("--engine_args", type=json.loads, default={})
    parser.set_defaults(run=_cache, takes_rest=True)


def _train(args: argparse.Namespace) -> None:
    from vllm_kvspec.train.run import train

    logging.basicConfig(format="%(message)s")
    logging.getLogger("vllm_kvspec").setLevel(logging.INFO)
    train(args.rest, prog="vllm-kvspec train", epilog=TRAIN_EXAMPLE)


def _add_train(commands) -> None:
    # transformers' parser of TrainingArguments reads these arguments and prints their help.
    parser = commands.add_parser("train", help="train a head", add_help=False)
    parser.set_defaults(run=_train, takes_rest=True)


def _eval(args: argparse.Namespace) -> None:
    from vllm_kvspec.eval.report import measure, plot

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
        tree_depth=args.tree_depth,
        seed=args.seed,
        dtype=args.dtype,
        name=args.name,
        texts_dir=args.texts_dir or (args.output and args.output.parent),
        with_bottlenecks=args.with_bottlenecks,
        graft=args.graft,
        command=shlex.join(["vllm-kvspec", *args.argv]),
        output=args.output,
    )
    if args.plot:
        print("Wrote " + ", ".join(map(str, plot(report, args.plot))) + ".")


def _add_eval(commands) -> None:
    parser = commands.add_parser("eval", help="measure a head's acceptance offline", epilog=EVAL_EXAMPLE)
    parser.add_argument("--target_model", required=True, help="target: directory or Hugging Face name")
    parser.add_argument(
        "--draft_model", help="directory of the head or the assistant (default: none, as served without a model)"
    )
    parser.add_argument(
        "--graft", action="store_true", default=None, help="the head as it is served by default (default, but slow)"
    )
    parser.add_argument("--no_graft", dest="graft", action="store_false", help='the head alone, "graft": false')
    parser.add_argument("--data_path", nargs="+", required=True, help='jsonl files with "text", "messages" or "turns"')
    parser.add_argument("--num_prompts", type=int, default=64)
    parser.add_argument(
        "--prompt_length",
        type=int,
        default=64,
        help="tokens of a prompt; longer chats, template included, are left out",
    )
    parser.add_argument("--max_new_tokens", type=int, default=160)
    parser.add_argument("--seed", type=int, default=0, help="chooses the prompts")
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.0, 1.0])
    parser.add_argument("--num_nodes", type=int, nargs="*", default=[8, 16, 32, 63], help="tree sizes; none: chains")
    parser.add_argument("--beam", type=int, default=8, help="nodes expanded per level")
    parser.add_argument("--width", type=int, default=4, help="children per node")
    parser.add_argument("--tree_depth", type=int, help="levels of an assistant's trees (default: 6)")
    parser.add_argument("--dtype", choices=["float32", "bfloat16", "float16"], default="float32")
    parser.add_argument("--name", help="what compare calls the head (default: what kind it is); seeds share a name")
    parser.add_argument("--no_bottlenecks", dest="with_bottlenecks", action="store_false", help="acceptance only")
    parser.add_argument("--output", type=Path, help="json to write; the same command goes on where it was interrupted")
    parser.add_argument("--texts_dir", type=Path, help="keep the target's texts here (default: beside --output)")
    parser.add_argument("--plot", type=Path, help="directory for acceptance.png and tau.png")
    parser.set_defaults(run=_eval)


def _compare(args: argparse.Namespace) -> None:
    from vllm_kvspec.eval.compare import load_reports, markdown, plot

    reports = load_reports(args.reports)
    text = markdown(reports)
    print(text)
    if args.output:
        args.output.parent.mkdir(parents=True, exist_ok=True)
        args.output.write_text(text + "\n")
    if args.plot:
        print("Wrote " + ", ".join(map(str, plot(reports, args.plot, args.panels))) + ".")


def _add_compare(commands) -> None:
    parser = commands.add_parser("compare", help="eval reports of several heads side by side", epilog=COMPARE_EXAMPLE)
    parser.add_argument("reports", type=Path, nargs="+", metavar="REPORT.json", help="written by eval --output")
    parser.add_argument("--output", type=Path, help="markdown to write")
    parser.add_argument("--plot", type=Path, help="directory for acceptance.png and tau.png")
    parser.add_argument(
        "--panels", nargs="+", default=[], metavar='"TITLE: NAME ..."', help="plot these heads together, one panel each"
    )
    parser.set_defaults(run=_compare)


def _export(args: argparse.Namespace) -> None:
    from vllm_kvspec.export import export

    print(f"Wrote {export(args.draft_model, args.output_dir, target_model=args.target_model)}.")


def _add_export(commands) -> None:
    parser = commands.add_parser("export", help="write a head for other engines", epilog=EXPORT_EXAMPLE)
    parser.add_argument("--format", choices=["eagle3"], required=True, help="eagle3: vLLM's own method, for one")
    parser.add_argument(
        "--draft_model", required=True, help='directory of a head that was trained with fusion "eagle3"'
    )
    parser.add_argument("--output_dir", required=True, help="new or empty")
    parser.add_argument("--target_model", help="directory or Hugging Face name (default: as the head names it)")
    parser.set_defaults(run=_export)


def _doctor(args: argparse.Namespace) -> None:
    from vllm_kvspec.doctor import doctor

    if not doctor(args.target_model, args.draft_model):
        sys.exit(1)


def _add_doctor(commands) -> None:
    parser = commands.add_parser("doctor", help="check the installation, a target and a head", epilog=DOCTOR_EXAMPLE)
    parser.add_argument("--target_model", help="target: directory or Hugging Face name")
    parser.add_argument("--draft_model", help="directory of the head")
    parser.set_defaults(run=_doctor)


def main(argv: Sequence[str] | None = None) -> None:
    """Parse ``argv`` (the process's own when None) and run the command."""
    parser = argparse.ArgumentParser(prog="vllm-kvspec", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    for add in (_add_init, _add_prepare, _add_cache, _add_train, _add_eval, _add_compare, _add_export, _add_doctor):
        add(commands)
    args, rest = parser.parse_known_args(argv)
    if rest and not getattr(args, "takes_rest", False):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    args.rest = rest
    args.argv = sys.argv[1:] if argv is None else list(argv)
    args.run(args)


if __name__ == "__main__":
    main()
