# SPDX-License-Identifier: Apache-2.0
"""What ``vllm-kvspec train`` takes beside transformers' own TrainingArguments; the help texts are the documentation."""

from dataclasses import dataclass, field


@dataclass
class HeadArguments:
    """The head."""

    target_model: str = field(metadata={"help": "target: directory or Hugging Face name"})
    context: str = field(default="hybrid", metadata={"help": '"kv" or "hybrid" (adds the target\'s last hidden state)'})
    draft_block_size: int = field(default=8, metadata={"help": "positions scored in one pass"})
    num_layers: int = field(default=3, metadata={"help": "layers of the head"})
    intermediate_size: int | None = field(default=None, metadata={"help": "MLP width; default: the target's"})
    target_kv_layer_ids: list[int] | None = field(
        default=None, metadata={"help": "one target layer per head layer; default: evenly spaced"}
    )
    transition_rank: int = field(default=64, metadata={"help": "rank of the token-transition bias"})


@dataclass
class DataArguments:
    """Data and loss."""

    data_path: list[str] = field(metadata={"help": "jsonl written by `generate`"})
    anchors_per_sequence: int = field(default=32, metadata={"help": "random anchors drawn per sequence and step"})
    depth_decay: float = field(default=6.0, metadata={"help": "loss weight of depth k is exp(-k / depth_decay)"})
    min_teacher_temperature: float = field(
        default=1.0,
        metadata={"help": "the head learns softmax(target logits / temperature of the text), with this as the least"},
    )
    from_pretrained: str | None = field(default=None, metadata={"help": "continue from this head"})
