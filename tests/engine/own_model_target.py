# SPDX-License-Identifier: Apache-2.0
"""A second tiny target, unlike the bundled one: Llama, head_dim 32, 6 query heads on 2 KV heads, untied embeddings."""

import json
import sys
from pathlib import Path
from pydoc_data import topics

import torch
from transformers import LlamaConfig, LlamaForCausalLM

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES / "tiny"))

from corpus import Document  # noqa: E402
from train_target import train_tokenizer  # noqa: E402

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 132,
    "intermediate_size": 264,
    "num_hidden_layers": 5,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "head_dim": 32,
    "max_position_embeddings": 512,
    "rope_parameters": {"rope_type": "default", "rope_theta": 50000.0},
    "tie_word_embeddings": False,
}


def write_texts(directory: Path) -> Path:
    """The language reference's topics as ``{"text": ...}`` rows."""
    path = directory / "texts.jsonl"
    texts = [text for text in topics.topics.values() if len(text) > 400]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return path


def write_target(directory: Path, texts: Path, steps: int) -> Path:
    """Train the target on the texts for ``steps`` steps of 16 x 96 tokens and write it with its tokenizer."""
    rows = [json.loads(line)["text"] for line in texts.read_text().splitlines()]
    tokenizer = train_tokenizer([Document("topics", text, []) for text in rows], SHAPE["vocab_size"])
    stream = torch.tensor([token for text in rows for token in tokenizer(text)["input_ids"]])
    torch.manual_seed(0)
    end = tokenizer.eos_token_id
    target = LlamaForCausalLM(
        LlamaConfig(**SHAPE, bos_token_id=None, eos_token_id=end, pad_token_id=tokenizer.pad_token_id)
    )
    optimizer = torch.optim.AdamW(target.parameters(), lr=3e-3)
    for _ in range(steps):
        starts = torch.randint(len(stream) - 96, (16, 1))
        ids = stream[starts + torch.arange(96)]
        loss = target(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    target.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
