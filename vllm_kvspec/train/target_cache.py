# SPDX-License-Identifier: Apache-2.0
"""What a head reads of its frozen target, on disk: computed once for the training rows instead of in every step.

Per token, in 16 bits: keys and values of the layers that the head reads, the last hidden state, from which the trainer
makes the target's distribution with the frozen LM head (exactly, at 2 H bytes instead of a vocabulary of
probabilities), and the auxiliary hidden states if the head has any. Embeddings come from the target's table.

    bytes a token = 2 * (2 * kv layers * Hkv * D + H + auxiliary layers * H)
    SmolLM2-135M, a head of two layers    2,688
    Qwen3-8B, a head of three layers     20,480

The records of a row's tokens follow each other, in memory-mapped shards of whole rows: what is not in memory is read
from the disk. A shard has its name when it is complete, so an interrupted run goes on with the next one. Who computes
them is a ``Writer``: the target in torch (``torch_writer``), or vLLM's engine (``vllm_kvspec.cache``).
"""

import hashlib
import json
import logging
import shutil
from collections.abc import Callable
from functools import lru_cache
from itertools import accumulate
from pathlib import Path

import numpy as np
import torch
from datasets import Dataset
from tqdm import tqdm
from transformers import PreTrainedModel

from vllm_kvspec.config import KVSpecDraftConfig
from vllm_kvspec.models.target import TargetView, kv_windows, view_target
from vllm_kvspec.train.checkpoints import differences, write_json

logger = logging.getLogger(__name__)

SHARD_BYTES = 128 << 20
# Padded tokens of one forward of the target.
TOKENS_PER_BATCH = 4096
CONTENTS_NAME = "contents.json"
ROWS_PER_BATCH = 1000

# Writes the records of rows of token ids into a file of int16 [tokens, W], row i from token starts[i] on; to be told of
# the tokens that are done.
Writer = Callable[[Path, list[list[int]], list[int], Callable[[int], None]], None]


def record_sizes(config: KVSpecDraftConfig) -> list[int]:
    """Values of each part of a token's record: key and value of every layer read, hidden state, auxiliary ones."""
    kv = config.num_key_value_heads * config.head_dim
    aux = len(config.aux_hidden_state_layer_ids) * config.hidden_size
    return [kv] * 2 * len(config.target_kv_layer_ids) + [config.hidden_size] + [aux] * bool(aux)


def pack(view: TargetView, dtype: torch.dtype) -> torch.Tensor:
    """The records [B, S, W] of a view of whole sequences."""
    parts = [x.transpose(1, 2).flatten(2) for pair in view.kv for x in pair]
    parts += [view.hidden] + ([] if view.fused is None else [view.fused])
    return torch.cat([part.to(dtype) for part in parts], dim=-1)


def unpack(
    records: torch.Tensor, config: KVSpecDraftConfig, target: PreTrainedModel, input_ids: torch.Tensor
) -> TargetView:
    """The view that ``pack`` made the records [B, S, W] of, in the target's dtype; ``input_ids`` [B, S]."""
    embeds = target.get_input_embeddings()(input_ids)
    *kv, last = records.to(embeds.dtype).split(record_sizes(config), dim=-1)
    fused = None
    if config.aux_hidden_state_layer_ids:
        fused, last = last, kv.pop()
    kv = [x.unflatten(-1, (-1, config.head_dim)).transpose(1, 2) for x in kv]
    pairs = list(zip(kv[::2], kv[1::2], strict=True))
    return TargetView(kv=pairs, windows=kv_windows(target, config), hidden=last, embeds=embeds, fused=fused)


def torch_writer(target: PreTrainedModel, config: KVSpecDraftConfig) -> Writer:
    """Records by ``target`` itself, without gradients, rows of about the same length together: little padding."""

    @torch.no_grad()
    def write(file: Path, rows: list[list[int]], starts: list[int], done: Callable[[int], None]) -> None:
        records = np.memmap(file, np.int16, "r+").reshape(-1, sum(record_sizes(config)))
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        while order:
            batch = order[: max(1, TOKENS_PER_BATCH // len(rows[order[0]]))]
            while len(batch) > 1 and len(batch) * len(rows[batch[-1]]) > TOKENS_PER_BATCH:
                batch.pop()
            order = order[len(batch) :]
            ids = [torch.tensor(rows[i]) for i in batch]
            padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True).to(target.device)
            packed = pack(view_target(target, config, padded), record_dtype(target.dtype)).cpu().view(torch.int16)
            for values, i in zip(packed.numpy(), batch, strict=True):
                records[starts[i] : starts[i] + len(rows[i])] = values[: len(rows[i])]
                done(len(rows[i]))
        records.flush()

    return write


def record_dtype(target_dtype: torch.dtype) -> torch.dtype:
    """Bfloat16 states are kept as they are, others in float16."""
    return torch.bfloat16 if target_dtype == torch.bfloat16 else torch.float16


class TargetCache(torch.utils.data.Dataset):
    """Training rows with the target's records: item i is row i and ``records`` [its tokens, W].

    ``rows``: as ``data.load_rows`` gives them; ``dtype``: the target's while it computes; ``weights``: what tells its
    weights from others (``checkpoint_sha256``). Raises ValueError when ``directory`` holds the records of something
    else, or the disk has no room for these.
    """

    def __init__(self, directory: Path, rows: Dataset, config: KVSpecDraftConfig, dtype: torch.dtype, weights: str):
        self.directory, self.rows, self.config = directory, rows, config
        self.dtype = record_dtype(dtype)
        self.width = sum(record_sizes(config))
        digest, self.lengths = _digest_and_lengths(rows)
        self.starts = [0, *accumulate(self.lengths)]
        self.shards = _shards(self.starts, SHARD_BYTES // self.bytes_per_token)
        self.shard_of = [i for i, (first, end) in enumerate(self.shards) for _ in range(first, end)]
        self.contents = {
            "target_weights_sha256": weights,
            "rows_sha256": digest,
            "dtype": str(self.dtype),
            "target_kv_layer_ids": config.target_kv_layer_ids,
            "aux_hidden_state_layer_ids": config.aux_hidden_state_layer_ids,
            "shard_bytes": SHARD_BYTES,
        }
        self._check_directory()
        self._open = lru_cache(maxsize=None)(self._map)

    @property
    def bytes_per_token(self) -> int:
        return 2 * self.width

    @property
    def num_bytes(self) -> int:
        """Of the whole cache."""
        return self.bytes_per_token * sum(self.lengths)

    def _check_directory(self) -> None:
        path = self.directory / CONTENTS_NAME
        if path.is_file():
            found = json.loads(path.read_text())
            if found != self.contents:
                raise ValueError(
                    f"cache_dir must hold the target's states for these rows and layers; {self.directory} was made "
                    f"with {differences(found, self.contents)}. Name another cache_dir, or delete it."
                )
        elif self.directory.is_dir() and any(self.directory.iterdir()):
            raise ValueError(f"cache_dir must be new, empty or a cache, found other files in {self.directory}.")

    @property
    def missing(self) -> list[int]:
        """Shards that are not there yet."""
        return [i for i in range(len(self.shards)) if not self._path(i).is_file()]

    def fill(self, write: Writer, rank: int = 0, world_size: int = 1) -> None:
        """Have ``write`` compute the shards that are missing; with several processes, each its share of them."""
        missing = self.missing
        needed = self.bytes_per_token * sum(self._tokens(i) for i in missing)
        self.directory.mkdir(parents=True, exist_ok=True)
        free = shutil.disk_usage(self.directory).free
        if needed > free:
            raise ValueError(
                f"cache_dir needs {needed:,} bytes more ({self.bytes_per_token:,} a token), found {free:,} free at "
                f"{self.directory}; name another disk, use fewer rows, or train without a cache."
            )
        if rank == 0:
            write_json(self.directory / CONTENTS_NAME, self.contents)
        # By number, whatever the others have finished meanwhile.
        own = [i for i in missing if i % world_size == rank]
        total = sum(self._tokens(i) for i in own)
        with tqdm(total=total, desc="target's states", unit="token", disable=None if own else True) as bar:
            for shard in own:
                self._write(shard, write, bar.update)

    def _write(self, shard: int, write: Writer, done: Callable[[int], None]) -> None:
        first, end = self.shards[shard]
        partial = self._path(shard).with_suffix(".partial")
        with partial.open("wb") as file:
            file.truncate(self.bytes_per_token * self._tokens(shard))
        starts = [self.starts[row] - self.starts[first] for row in range(first, end)]
        write(partial, list(self.rows[list(range(first, end))]["input_ids"]), starts, done)
        partial.rename(self._path(shard))

    def _path(self, shard: int) -> Path:
        return self.directory / f"shard-{shard:05}.bin"

    def _tokens(self, shard: int) -> int:
        first, end = self.shards[shard]
        return self.starts[end] - self.starts[first]

    def _slice(self, row: int, first: int) -> slice:
        """Where a row's records are in the shard that starts with row ``first``."""
        start = self.starts[row] - self.starts[first]
        return slice(start, start + self.lengths[row])

    def _map(self, shard: int) -> np.ndarray:
        return np.memmap(self._path(shard), np.int16, "r", shape=(self._tokens(shard), self.width))

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, row: int) -> dict:
        shard = self.shard_of[row]
        values = np.array(self._open(shard)[self._slice(row, self.shards[shard][0])])
        return self.rows[row] | {"records": torch.from_numpy(values).view(self.dtype)}


def _digest_and_lengths(rows: Dataset) -> tuple[str, list[int]]:
    """SHA-256 over the rows' tokens, and the rows' lengths."""
    found, lengths = hashlib.sha256(), []
    for batch in rows.with_format("arrow").iter(batch_size=ROWS_PER_BATCH):
        ids = batch["input_ids"].combine_chunks()
        counts = ids.value_lengths().to_numpy().astype(np.int64)
        found.update(counts.tobytes() + ids.flatten().to_numpy().astype(np.int64).tobytes())
        lengths += counts.tolist()
    return found.hexdigest(), lengths


def _shards(starts: list[int], tokens: int) -> list[tuple[int, int]]:
    """(first, end) of consecutive rows with at most ``tokens`` tokens together, or of one longer row."""
    shards, first = [], 0
    for row in range(1, len(starts)):
        if row - first > 1 and starts[row] - starts[first] > tokens:
            shards.append((first, row - 1))
            first = row - 1
    return [*shards, (first, len(starts) - 1)]
