# SPDX-License-Identifier: Apache-2.0
"""The train and generate commands: parse, load, call the library, write the head with the record of how it was made."""

import json
import logging
import random
from collections.abc import Sequence
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, HfArgumentParser, TrainingArguments

from vllm_kvspec.models.draft_head import KVSpecDraftModel, head_config_for
from vllm_kvspec.train.arguments import DataArguments, HeadArguments
from vllm_kvspec.train.data import collate, cut_prompts, generate_rows, load_rows, load_texts, write_rows
from vllm_kvspec.train.trainer import KVSpecTrainer, init_from_target

logger = logging.getLogger(__name__)


def load_target(name: str, dtype: torch.dtype = torch.float32):
    """A target (causal LM in ``dtype``) and its tokenizer."""
    target = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    if torch.cuda.is_available():
        target = target.cuda()
    return target.eval(), AutoTokenizer.from_pretrained(name)


def make_head(arguments: HeadArguments, data: DataArguments, target, tokenizer) -> KVSpecDraftModel:
    """A head to train: new for this target, or the one of ``data.from_pretrained``."""
    if data.from_pretrained:
        return KVSpecDraftModel.from_pretrained(data.from_pretrained, dtype=torch.float32)
    config = head_config_for(
        target.config.get_text_config(),
        tokenizer,
        context=arguments.context,
        draft_block_size=arguments.draft_block_size,
        num_hidden_layers=arguments.num_layers,
        intermediate_size=arguments.intermediate_size,
        target_kv_layer_ids=arguments.target_kv_layer_ids,
        transition_rank=arguments.transition_rank,
    )
    head = KVSpecDraftModel(config)
    init_from_target(head, target)
    return head


def train(argv: Sequence[str], **parser_options) -> Path:
    """Train a head as ``argv`` says and write it in bfloat16 with ``training.json`` beside it.

    ``parser_options`` (prog, epilog) are for the help text. Returns the head's directory.
    """
    parser = HfArgumentParser((HeadArguments, DataArguments, TrainingArguments), **parser_options)
    head_args, data_args, args = parser.parse_args_into_dataclasses(list(argv))
    args.remove_unused_columns = False
    torch.manual_seed(args.seed)
    target, tokenizer = load_target(head_args.target_model)
    head = make_head(head_args, data_args, target, tokenizer)
    rows = load_rows(data_args.data_path, head.config.draft_block_size)
    logger.info("%d training rows, head of %d parameters", len(rows), head.num_parameters())
    output = Path(args.output_dir)
    # The finished head goes to output_dir; intermediate checkpoints beside it, where they can be thrown away.
    args.output_dir = f"{output}.checkpoints"
    trainer = KVSpecTrainer(
        model=head,
        args=args,
        train_dataset=rows,
        data_collator=collate,
        target=target,
        anchors_per_sequence=data_args.anchors_per_sequence,
        depth_decay=data_args.depth_decay,
        min_teacher_temperature=data_args.min_teacher_temperature,
    )
    result = trainer.train()
    head.to(torch.bfloat16).save_pretrained(output)
    report = {
        "command": "vllm-kvspec train " + " ".join(argv),
        "parameters": head.num_parameters(),
        "rows": len(rows),
        "steps": result.global_step,
        "seconds": round(result.metrics["train_runtime"]),
        "train_loss": result.training_loss,
        "loss_history": [
            {"step": entry["step"], "loss": round(float(entry["loss"]), 4)}
            for entry in trainer.state.log_history
            if "loss" in entry
        ],
    }
    earlier = Path(data_args.from_pretrained or "") / "training.json"
    if data_args.from_pretrained and earlier.is_file():
        report["started_from"] = json.loads(earlier.read_text())
    (output / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    return output


def generate(
    target_model: str,
    data_path: list[str],
    output: Path,
    *,
    num_prompts: int,
    prompt_length: int,
    max_new_tokens: int,
    temperatures: list[float],
    batch_size: int,
    seed: int,
) -> int:
    """Write the target's continuations of prompts cut from ``data_path``; returns the number of rows."""
    target, tokenizer = load_target(target_model)
    torch.manual_seed(seed)
    prompts = cut_prompts(load_texts(data_path), tokenizer, num_prompts, prompt_length, seed)
    random.Random(seed).shuffle(prompts)
    rows = generate_rows(
        target,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        temperatures=temperatures,
        batch_size=batch_size,
    )
    return write_rows(rows, output)
