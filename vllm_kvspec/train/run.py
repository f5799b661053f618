# SPDX-License-Identifier: Apache-2.0
"""The train command: check everything, then train, then write the head with the record of how it was made.

Memory of a step, beside the weights of target and head, the optimizer's two moments and the head's gradients. The
target runs online, without gradients; of one with a complete ``cache_dir`` only embeddings and LM head are loaded,
and only what the head reads is in memory (``train.target_cache``). With B sequences of S tokens, A anchors a sequence,
blocks of G rows and V scored tokens:

    target's KV                2 * target layers * Hkv * D * B * S      values, in the target's dtype
    target's hidden states     B * S * H                                times 1 + layers with auxiliary layers
    logits, softmax, gradient  about 6 * B * A * G * V                  float32: usually the most

The last shrinks with ``anchors_per_sequence``, ``per_device_train_batch_size`` (and ``gradient_accumulation_steps``)
and ``draft_vocab_size``. ``training.json`` states the peak of the run.
"""

import json
import logging
import shlex
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate import PartialState
from datasets import Dataset
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from vllm_kvspec.config import KVSpecDraftConfig, check_fingerprint, target_fingerprint, tokenizer_sha256
from vllm_kvspec.models.draft_head import KVSpecDraftModel, head_config_for
from vllm_kvspec.models.target import checkpoint_sha256, load_ends
from vllm_kvspec.train.arguments import DataArguments, HeadArguments, RunArguments, parse, settings
from vllm_kvspec.train.checkpoints import RECORD_NAME, find_checkpoint, is_finished, start_run
from vllm_kvspec.train.data import collate, load_rows
from vllm_kvspec.train.record import RunCallback, loss_history, memory, versions, write_head
from vllm_kvspec.train.target_cache import TargetCache, torch_writer
from vllm_kvspec.train.trainer import KVSpecTrainer, init_from_target
from vllm_kvspec.train.vocabulary import frequent_tokens, token_counts

logger = logging.getLogger(__name__)


def load_target(name: str, dtype: torch.dtype = torch.float32, device: torch.device | str | None = None):
    """A target (causal LM in ``dtype``, on ``device`` or else on the GPU if there is one) and its tokenizer."""
    target = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    target = target.to(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    return target.eval(), AutoTokenizer.from_pretrained(name)


def count_parameters(config: KVSpecDraftConfig) -> int:
    """Trainable parameters of a head, without building it."""
    with torch.device("meta"):
        return KVSpecDraftModel(config).num_parameters()


def fit_intermediate_size(target_config, fields: dict, num_parameters: int) -> int:
    """The MLP width with which a head of these config ``fields`` comes closest to ``num_parameters``.

    Raises ValueError when even a width of 1 has more.
    """
    sizes = [fields | {"intermediate_size": width} for width in (1, 2)]
    least, next_least = (count_parameters(head_config_for(target_config, **size)) for size in sizes)
    if num_parameters < least:
        raise ValueError(
            f"num_parameters must be at least {least}, the head without its MLP, got {num_parameters}; raise it, or "
            "lower num_layers or transition_rank."
        )
    return 1 + round((num_parameters - least) / (next_least - least))


def head_config(arguments: HeadArguments, from_pretrained: str | None, target_config, tokenizer) -> KVSpecDraftConfig:
    """The shape of the head to train: new for this target, or that of the head that training starts from."""
    if from_pretrained:
        config = KVSpecDraftConfig.from_pretrained(from_pretrained)
        arguments.check_against(config)
        check_fingerprint(config, target_fingerprint(target_config, tokenizer))
        return config
    fields = arguments.config_fields()
    if arguments.num_parameters:
        fields["intermediate_size"] = fit_intermediate_size(target_config, fields, arguments.num_parameters)
    return head_config_for(target_config, tokenizer, **fields)


def make_head(
    config: KVSpecDraftConfig, from_pretrained: str | None, target: PreTrainedModel, counts: torch.Tensor
) -> KVSpecDraftModel:
    """The head at the start of training, float32; ``counts`` [V] choose a reduced draft vocabulary."""
    if from_pretrained:
        return KVSpecDraftModel.from_pretrained(from_pretrained, dtype=torch.float32)
    head = KVSpecDraftModel(config)
    if config.draft_vocab_size < config.vocab_size:
        head.set_draft_vocabulary(frequent_tokens(counts, config.draft_vocab_size))
    init_from_target(head, target)
    return head


def train(argv: Sequence[str], **parser_options) -> Path:
    """Train a head as ``argv`` says and write it in bfloat16 with ``training.json`` and a model card.

    An interrupted run goes on from its newest complete checkpoint; a finished one is left as it is. With several
    processes (torchrun) only the first one writes. ``parser_options`` (prog, epilog) are for the help text. Returns the
    head's directory. Raises ValueError, before anything is written, for arguments, data or directories that do not fit.
    """
    head_args, data, args = parse(argv, **parser_options)
    output, checkpoints = Path(args.output_dir), Path(f"{args.output_dir}.checkpoints")
    args.output_dir = str(checkpoints)
    chosen = settings(head_args, data, args)
    say = logger.info if args.should_save else logger.debug
    if is_finished(output, chosen, data.overwrite_output_dir):
        say("%s holds the head that these settings make; nothing to do.", output)
        return output
    resume_from = find_checkpoint(checkpoints, chosen, resume=not data.no_resume, overwrite=data.overwrite_output_dir)
    head, target, rows, counts, cache = _load(head_args, data, args)
    record = _record_start(argv, chosen, data, head, rows, counts)
    if data.dry_run:
        record |= {"dry_run": True}
    else:
        say("Training a head of %d parameters on %d rows.", record["parameters"], len(rows))
        record |= _run_trainer(head, target, rows, cache, data, args, chosen, resume_from)
    if args.should_save:
        write_head(head, output, record | {"memory": memory(head, target)})
    say("Wrote %s%s.", output, ", untrained" if data.dry_run else "")
    return output


def load_rows_for(
    head_args: HeadArguments, data: DataArguments, args: RunArguments
) -> tuple[KVSpecDraftConfig, Dataset, TargetCache | None]:
    """The head's shape, the rows, and their cache if one is asked for, checked against each other; no weights."""
    target_config = AutoConfig.from_pretrained(head_args.target_model).get_text_config()
    tokenizer = AutoTokenizer.from_pretrained(head_args.target_model)
    config = head_config(head_args, data.from_pretrained, target_config, tokenizer)
    with args.main_process_first(desc="reading the rows"):
        rows = load_rows(
            data.data_path,
            config.draft_block_size,
            tokenizer_sha256=tokenizer_sha256(tokenizer),
            max_length=target_config.max_position_embeddings,
        )
    if not data.cache_dir:
        return config, rows, None
    weights = checkpoint_sha256(head_args.target_model)
    return config, rows, TargetCache(Path(data.cache_dir), rows, config, compute_dtype(args), weights)


def compute_dtype(args: RunArguments) -> torch.dtype:
    """What the target is loaded and computed in."""
    return torch.bfloat16 if args.bf16 else torch.float32


def _load(head_args: HeadArguments, data: DataArguments, args: RunArguments):
    """Head, target, rows, their token counts and cache."""
    config, rows, cache = load_rows_for(head_args, data, args)
    counts = token_counts(rows, config.vocab_size)
    if cache and not cache.missing:
        target = load_ends(head_args.target_model, compute_dtype(args), args.device)
    else:
        target, _ = load_target(head_args.target_model, compute_dtype(args), args.device)
    torch.manual_seed(args.seed)
    return make_head(config, data.from_pretrained, target, counts), target, rows, counts, cache


def _run_trainer(
    head: KVSpecDraftModel,
    target: PreTrainedModel,
    rows: Dataset,
    cache: TargetCache | None,
    data: DataArguments,
    args: RunArguments,
    chosen: dict,
    resume_from: Path | None,
) -> dict:
    """Train ``head``; what ``training.json`` says about it."""
    if cache:
        cache.fill(torch_writer(target, head.config), args.process_index, args.world_size)
        # Shards of the other processes.
        PartialState().wait_for_everyone()
    trainer = KVSpecTrainer(
        model=head,
        args=args,
        train_dataset=cache or rows,
        data_collator=collate,
        callbacks=[RunCallback()],
        target=target,
        settings=data.loss_settings(),
    )
    if args.should_save:
        start_run(Path(args.output_dir), chosen)
        if resume_from:
            logger.info("Going on from %s.", resume_from)
    result = trainer.train(resume_from_checkpoint=str(resume_from) if resume_from else None)
    # A rank that left would take the others' connections with it.
    trainer.accelerator.wait_for_everyone()
    history = trainer.state.log_history
    return {
        "steps": result.global_step,
        "seconds": history[-1]["elapsed"],
        "loss_history": loss_history(history),
        "target_cache": cache and {"bytes": cache.num_bytes, "bytes_per_token": cache.bytes_per_token},
    }


def _record_start(
    argv: Sequence[str], chosen: dict, data: DataArguments, head: KVSpecDraftModel, rows: Dataset, counts: torch.Tensor
) -> dict:
    """What ``training.json`` says about a run that is yet to start."""
    record = {
        "command": "vllm-kvspec train " + shlex.join(argv),
        "settings": chosen,
        "versions": versions(),
        "parameters": head.num_parameters(),
        "rows": len(rows),
        "supervised_tokens": int(counts.sum()),
        "steps": 0,
        "seconds": 0,
    }
    if head.draft_token_ids is not None:
        record["draft_vocab_coverage"] = (counts[head.draft_token_ids].sum() / counts.sum()).item()
    earlier = Path(data.from_pretrained or "") / RECORD_NAME
    if data.from_pretrained and earlier.is_file():
        record["started_from"] = json.loads(earlier.read_text())
    return record
