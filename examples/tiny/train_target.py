# SPDX-License-Identifier: Apache-2.0
"""Train the tiny target: a Qwen3 language model of about 4.5M parameters with its own tokenizer, on two CPU cores.

    python examples/tiny/train_target.py --output_dir examples/tiny/target

Writes a Hugging Face directory in bfloat16 and ``training.json`` with the recipe and the held-out loss beside those of
a unigram and an interpolated 5-gram model on the same tokens.
"""

import argparse
import json
import math
import random
import sys
from collections import Counter, defaultdict
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import TensorDataset
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM, Trainer, TrainingArguments

from corpus import Document, load_documents, split

END_OF_TEXT, CHAT_START, CHAT_END = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def train_tokenizer(documents: list[Document], vocab_size: int) -> PreTrainedTokenizerFast:
    """Byte-level BPE on the training files, digits split one by one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.train_from_iterator(
        (d.text for d in documents),
        trainers.BpeTrainer(
            vocab_size=vocab_size,
            special_tokens=[END_OF_TEXT, CHAT_START, CHAT_END],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, eos_token=CHAT_END, pad_token=END_OF_TEXT, clean_up_tokenization_spaces=False
    )
    fast.chat_template = CHAT_TEMPLATE
    return fast


def token_stream(documents: list[Document], tokenizer: PreTrainedTokenizerFast, seed: int) -> torch.Tensor:
    """Files and chats in random order, each ended by its own end token; int64 ``[num_tokens]``."""
    end_of_text = tokenizer.convert_tokens_to_ids(END_OF_TEXT)
    pieces = []
    for document in documents:
        pieces.append(tokenizer(document.text)["input_ids"] + [end_of_text])
        for question, answer in document.chats:
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            pieces.append(tokenizer(tokenizer.apply_chat_template(chat, tokenize=False))["input_ids"] + [end_of_text])
    random.Random(seed).shuffle(pieces)
    return torch.tensor([token for piece in pieces for token in piece])


def causal_batch(rows: list[tuple[torch.Tensor]]) -> dict[str, torch.Tensor]:
    input_ids = torch.stack([row[0] for row in rows])
    return {"input_ids": input_ids, "labels": input_ids}


def blocks(stream: torch.Tensor, length: int) -> TensorDataset:
    return TensorDataset(stream[: len(stream) // length * length].view(-1, length))


def ngram_losses(train: list[int], held_out: list[int], order: int, vocab_size: int) -> dict[int, float]:
    """Held-out nats per token of Witten-Bell interpolated n-gram models of order 1 and ``order``."""
    follow: list[defaultdict] = [defaultdict(Counter) for _ in range(order)]
    for i in range(len(train)):
        for n in range(min(order, i + 1)):
            follow[n][tuple(train[i - n : i])][train[i]] += 1
    totals = [{context: counts.total() for context, counts in level.items()} for level in follow]
    losses = {1: 0.0, order: 0.0}
    for i in range(order, len(held_out)):
        p = 1.0 / vocab_size
        for n in range(order):
            context = tuple(held_out[i - n : i])
            if context in totals[n]:
                counts, total = follow[n][context], totals[n][context]
                p = (counts[held_out[i]] + len(counts) * p) / (total + len(counts))
            if n == 0:
                losses[1] -= math.log(p)
        losses[order] -= math.log(p)
    return {n: loss / (len(held_out) - order) for n, loss in losses.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output_dir", type=Path, required=True)
    parser.add_argument("--vocab_size", type=int, default=4096)
    parser.add_argument("--sequence_length", type=int, default=512)
    parser.add_argument("--max_steps", type=int, default=2000)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--learning_rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()

    train_documents, held_out_documents = split(load_documents())
    tokenizer = train_tokenizer(train_documents, args.vocab_size)
    train_stream = token_stream(train_documents, tokenizer, args.seed)
    held_out_stream = token_stream(held_out_documents, tokenizer, args.seed)
    print(f"{len(train_documents)} training files, {len(train_stream):,} tokens; ", end="")
    print(f"{len(held_out_documents)} held out, {len(held_out_stream):,} tokens", flush=True)

    torch.manual_seed(args.seed)
    end_of_chat = tokenizer.convert_tokens_to_ids(CHAT_END)
    config = Qwen3Config(
        vocab_size=args.vocab_size,
        hidden_size=192,
        intermediate_size=576,
        num_hidden_layers=8,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        tie_word_embeddings=True,
        bos_token_id=None,
        eos_token_id=end_of_chat,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    training_args = TrainingArguments(
        output_dir=str(args.output_dir) + ".checkpoints",
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine_with_min_lr",
        lr_scheduler_kwargs={"min_lr_rate": 0.05},
        warmup_steps=100,
        weight_decay=0.1,
        adam_beta2=0.95,
        logging_steps=50,
        save_steps=500,
        save_total_limit=1,
        report_to="none",
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
    )
    trainer = Trainer(
        model=model,
        args=training_args,
        train_dataset=blocks(train_stream, args.sequence_length),
        eval_dataset=blocks(held_out_stream, args.sequence_length),
        data_collator=causal_batch,
    )
    result = trainer.train()
    neural = trainer.evaluate()["eval_loss"]
    ngram = ngram_losses(train_stream.tolist(), held_out_stream.tolist(), 5, args.vocab_size)

    model.to(torch.bfloat16).save_pretrained(args.output_dir)
    tokenizer.save_pretrained(args.output_dir)
    report = {
        "command": "python " + " ".join(sys.argv),
        "python": sys.version.split()[0],
        "parameters": model.num_parameters(),
        "train_files": len(train_documents),
        "train_tokens": len(train_stream),
        "held_out_files": len(held_out_documents),
        "held_out_tokens": len(held_out_stream),
        "seconds": round(result.metrics["train_runtime"]),
        "tokens_seen": args.max_steps * args.batch_size * args.sequence_length,
        "held_out_loss_nats": {"target": neural, "5-gram": ngram[5], "unigram": ngram[1]},
    }
    (args.output_dir / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
