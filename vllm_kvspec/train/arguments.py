# SPDX-License-Identifier: Apache-2.0
"""What ``vllm-kvspec train`` takes; the help texts are the documentation.

Three groups: the head, data and loss, and transformers' own TrainingArguments with a few other defaults. Everything can
also stand in a recipe, a YAML or JSON file given first; what follows it on the command line wins.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path

import yaml
from transformers import HfArgumentParser, TrainingArguments

from vllm_kvspec.config import KVSpecDraftConfig
from vllm_kvspec.train.losses import parse_loss
from vllm_kvspec.train.trainer import LossSettings

RECIPE_SUFFIXES = (".yaml", ".yml", ".json")
# HeadArguments that go by another name in the head's configuration.
CONFIG_NAMES = {"num_layers": "num_hidden_layers"}
# TrainingArguments that change what is learned; the others (where to log, when to save) may differ when a run goes on.
SHAPING = (
    "seed", "data_seed", "max_steps", "num_train_epochs", "per_device_train_batch_size", "gradient_accumulation_steps",
    "learning_rate", "lr_scheduler_type", "lr_scheduler_kwargs", "warmup_steps", "weight_decay", "adam_beta1",
    "adam_beta2", "adam_epsilon", "max_grad_norm", "optim", "bf16", "fp16",
)  # fmt: skip


def _require(condition: bool, sentence: str) -> None:
    if not condition:
        raise ValueError(sentence)


@dataclass
class HeadArguments:
    """The head."""

    target_model: str = field(metadata={"help": "target: directory or Hugging Face name"})
    context: str = field(
        default="hybrid",
        metadata={
            "help": '"kv" (reads the target\'s KV), "hybrid" (also its last hidden state) or "hidden" (its hidden '
            "states only, as EAGLE-3; not served by kvspec)"
        },
    )
    fusion: str = field(
        default="direct",
        metadata={
            "help": '"direct" (head layer i reads one target layer; served), or of KVShot "concat", "projection", '
            '"projection_rope", "gated" (for study), or "eagle3" (EAGLE-3 to the letter, for other engines: '
            "examples/eagle3.yaml)"
        },
    )
    drafting: str = field(
        default="block",
        metadata={"help": '"block" (all positions in one pass) or "autoregressive" (one token after the other)'},
    )
    draft_block_size: int = field(default=8, metadata={"help": "positions that a draft covers"})
    num_layers: int = field(default=3, metadata={"help": "layers of the head"})
    intermediate_size: int | None = field(default=None, metadata={"help": "MLP width; default: the target's"})
    num_parameters: int | None = field(
        default=None, metadata={"help": "instead of intermediate_size: the MLP width that comes closest to this size"}
    )
    target_kv_layer_ids: list[int] | None = field(
        default=None, metadata={"help": "target layers whose KV is read; default: evenly spaced"}
    )
    aux_hidden_state_layer_ids: list[int] | None = field(
        default=None, metadata={"help": "target layers whose hidden states are read; default: low, middle, high"}
    )
    transition: str = field(
        default="tied",
        metadata={
            "help": 'how a row knows the token before it: "tied" (by the target\'s embedding and LM head, and the '
            'row\'s hidden state) or "table" (a learned row per token)'
        },
    )
    transition_rank: int = field(default=256, metadata={"help": "rank of the transition bias; 0: none"})
    draft_vocab_size: int | None = field(
        default=None, metadata={"help": "score only this many tokens, the most frequent ones of the training rows"}
    )

    def __post_init__(self):
        _require(self.num_layers >= 1, f"num_layers must be at least 1, got {self.num_layers}; use for example 3.")
        _require(
            self.intermediate_size is None or self.num_parameters is None,
            "intermediate_size and num_parameters must not be given together: one follows from the other; leave one "
            "out.",
        )
        for key in ("intermediate_size", "num_parameters", "draft_vocab_size"):
            value = getattr(self, key)
            _require(value is None or value >= 1, f"{key} must be at least 1, got {value}; leave it out or raise it.")

    def config_fields(self) -> dict:
        """The fields of ``KVSpecDraftConfig`` that these arguments name; None where they leave the choice."""
        values = {CONFIG_NAMES.get(f.name, f.name): getattr(self, f.name) for f in fields(self)}
        return {key: value for key, value in values.items() if key not in ("target_model", "num_parameters")}

    def check_against(self, config: KVSpecDraftConfig) -> None:
        """Raise ValueError where an argument other than the default contradicts the head that training goes on from."""
        defaults = HeadArguments(self.target_model).config_fields()
        wrong = [
            key
            for key, value in self.config_fields().items()
            if value != defaults[key] and value != getattr(config, key)
        ]
        _require(
            not wrong,
            f"The head's shape must be that of --from_pretrained, which has "
            f"{', '.join(f'{key} {getattr(config, key)}' for key in wrong)}; leave these arguments out.",
        )


@dataclass
class DataArguments:
    """Data, loss, and where a run starts."""

    data_path: list[str] = field(metadata={"help": "jsonl with input_ids and loss_mask, as `prepare` writes it"})
    anchors_per_sequence: int = field(default=32, metadata={"help": "random anchors drawn per sequence and step"})
    loss_fn: str = field(
        default="kl_div",
        metadata={
            "help": '"kl_div", "ce" (against the text\'s own tokens), "tv" (total variation), "lk" (minus the log of '
            'the acceptance probability), or a mix such as "ce=0.1,tv=0.9"'
        },
    )
    depth_decay: float = field(default=6.0, metadata={"help": "loss weight of depth k is exp(-k / depth_decay)"})
    min_teacher_temperature: float = field(
        default=1.0,
        metadata={"help": "the head learns softmax(target logits / temperature of the text), with this as the least"},
    )
    cache_dir: str | None = field(
        default=None,
        metadata={
            "help": "keep here what the head reads of the target (a few kB a token), so that only the first run "
            "computes it; without it the target runs in every step"
        },
    )
    from_pretrained: str | None = field(default=None, metadata={"help": "start from this head's weights"})
    dry_run: bool = field(
        default=False, metadata={"help": "build and check everything, write the untrained head, exit"}
    )
    no_resume: bool = field(
        default=False, metadata={"help": "start anew; refused while OUTPUT_DIR.checkpoints holds checkpoints"}
    )
    overwrite_output_dir: bool = field(
        default=False, metadata={"help": "replace the head in output_dir, once the new one is complete"}
    )

    def __post_init__(self):
        for key in ("anchors_per_sequence", "depth_decay", "min_teacher_temperature"):
            value = getattr(self, key)
            _require(value > 0, f"{key} must be positive, got {value}; leave it out for the default.")
        parse_loss(self.loss_fn)

    def loss_settings(self) -> LossSettings:
        """What the trainer needs of these."""
        return LossSettings(**{f.name: getattr(self, f.name) for f in fields(LossSettings)})


@dataclass
class RunArguments(TrainingArguments):
    """transformers' TrainingArguments, with defaults for heads."""

    output_dir: str = field(metadata={"help": "the head; checkpoints go to OUTPUT_DIR.checkpoints"})
    learning_rate: float = field(default=1e-3, metadata={"help": "peak learning rate"})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "learning-rate schedule"})
    warmup_steps: float = field(default=0.03, metadata={"help": "steps of linear warm-up, or their share below 1"})
    adam_beta2: float = field(default=0.95, metadata={"help": "beta2 of Adam"})
    logging_steps: float = field(default=10, metadata={"help": "steps between two logged losses"})
    logging_nan_inf_filter: bool = field(default=False, metadata={"help": "hide losses that are not finite"})
    save_total_limit: int | None = field(default=2, metadata={"help": "checkpoints kept"})
    report_to: None | str | list[str] = field(default="none", metadata={"help": "tensorboard, wandb, trackio, none"})
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "not needed: every parameter of a head takes part in every step"}
    )
    remove_unused_columns: bool = field(default=False, metadata={"help": "must stay false: rows are not model inputs"})

    def __post_init__(self):
        _require(
            self.resume_from_checkpoint is None,
            "resume_from_checkpoint must be left out: an interrupted run goes on from its newest complete checkpoint "
            "by itself; --no_resume prevents it.",
        )
        super().__post_init__()
        _require(
            self.n_gpu <= 1,
            f"train must have one GPU per process, found {self.n_gpu}; start it with `torchrun --standalone "
            f"--nproc_per_node {self.n_gpu} -m vllm_kvspec.cli train ...` or set CUDA_VISIBLE_DEVICES=0.",
        )


def parse(argv: Sequence[str], **parser_options) -> tuple[HeadArguments, DataArguments, RunArguments]:
    """The arguments of ``train``: flags, or a recipe file and flags that override it.

    ``parser_options`` (prog, epilog) are for the help text. Raises ValueError for values that cannot be.
    """
    parser = HfArgumentParser((HeadArguments, DataArguments, RunArguments), **parser_options)
    argv = list(argv)
    if argv and argv[0].endswith(RECIPE_SUFFIXES):
        argv = _recipe_flags(Path(argv[0])) + argv[1:]
    return parser.parse_args_into_dataclasses(argv, look_for_args_file=False)


def _recipe_flags(path: Path) -> list[str]:
    """A recipe as flags, so that later flags override it and one parser checks both."""
    _require(path.is_file(), f"A recipe must be a YAML or JSON file, found nothing at {path}; give its path first.")
    recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    _require(isinstance(recipe, dict), f"A recipe must map argument names to values, found {recipe!r} in {path}.")
    flags: list[str] = []
    for key, value in recipe.items():
        if value is not None:
            values = value if isinstance(value, list) else [json.dumps(value) if isinstance(value, dict) else value]
            flags += [f"--{key}", *map(str, values)]
    return flags


def settings(head: HeadArguments, data: DataArguments, args: RunArguments) -> dict:
    """Everything that shapes what is learned, as plain JSON: equal settings make equal heads."""
    where = ("cache_dir", "dry_run", "no_resume", "overwrite_output_dir")
    run = args.to_dict()
    chosen = {
        **vars(head),
        **{key: value for key, value in vars(data).items() if key not in where},
        **{key: run[key] for key in SHAPING},
        "world_size": args.world_size,
    }
    return json.loads(json.dumps(chosen))
