# SPDX-License-Identifier: Apache-2.0
"""What training reads of the target, written by the workers of a vLLM engine while they prefill the training rows.

A worker extension of an engine without kvspec, so any model that Model Runner V2 runs will do, on several GPUs as on
one; the records are those of ``train.target_cache``. Keys and values are taken as the attention layers get them, before
they are cached: no block tables, and the same whatever the cache's layout and dtype. Every rank writes its own KV heads
into the common file, the first one also the hidden states. The engine must run eagerly (nothing is called in a graph)
and compute every token (no prefix cache).
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from vllm.distributed import get_tensor_model_parallel_rank

from vllm_kvspec.engine.target_kv import layers_by_index


class RecordsTargetStates:
    """``worker_extension_cls``: what ``LLM.collective_rpc`` calls."""

    def start_recording(self, layer_ids: list[int], dtype: str) -> None:
        """Record layers ``layer_ids`` and the last hidden states in ``dtype`` ("bfloat16" or "float16"). Raises
        ValueError for layers without keys and values of their own."""
        self.kvspec_recorder = Recorder(self.model_runner, layer_ids, getattr(torch, dtype))

    def record_rows(self, file: str, starts: dict[str, int]) -> None:
        """The requests to come: by id, where each one's first token goes in ``file``."""
        self.kvspec_recorder.open(Path(file), starts)

    def close_rows(self) -> None:
        """All of them have run."""
        self.kvspec_recorder.close()


class Recorder:
    """Copies each step's keys, values and hidden states to a file. The step waits for the copy."""

    def __init__(self, runner: Any, layer_ids: list[int], dtype: torch.dtype):
        self.dtype = dtype
        self.rank = get_tensor_model_parallel_rank()
        self.layers = [None] * len(layer_ids)
        names = layers_by_index(runner.kv_cache_config)
        context = runner.compilation_config.static_forward_context
        modules = [context[names[i][0]] if i in names else None for i in layer_ids]
        shared = [getattr(module, "kv_sharing_target_layer_name", None) for module in modules]
        if missing := [i for i, module, to in zip(layer_ids, modules, shared, strict=True) if not module or to]:
            raise ValueError(
                f"Layers {layer_ids} of the target must have keys and values of their own, layers {missing} have none; "
                "name others: --target_kv_layer_ids."
            )
        for number, module in enumerate(modules):
            # No hook: models out of transformers call ``forward`` themselves.
            module.forward = self._keeping(number, module.forward)
        self._find_columns(runner, modules)
        self.sample = runner.sample
        runner.sample = self._record_and_sample

    def _keeping(self, number: int, forward):
        """vLLM's ``Attention.forward`` that remembers the keys and values it was given."""

        def keep(query, key, value, *args, **kwargs):
            self.layers[number] = key, value
            return forward(query, key, value, *args, **kwargs)

        return keep

    def _find_columns(self, runner: Any, modules: list) -> None:
        """``width`` of a record, and which of its columns this rank writes."""
        parallel, model = runner.vllm_config.parallel_config, runner.model_config
        columns, start = [], 0
        for module in modules:
            # Fewer heads than ranks: several ranks have the same one.
            heads = max(model.get_total_num_kv_heads(), module.num_kv_heads)
            first = self.rank * heads // parallel.tensor_parallel_size
            for _ in ("key", "value"):
                own = np.arange(module.num_kv_heads * module.head_size) + first * module.head_size
                columns.append(start + own)
                start += heads * module.head_size
        hidden = model.get_hidden_size()
        if self.rank == 0:
            columns.append(start + np.arange(hidden))
        self.width, self.columns = start + hidden, np.concatenate(columns)

    def open(self, file: Path, starts: dict[str, int]) -> None:
        self.file = np.memmap(file, np.int16, "r+").reshape(-1, self.width)
        self.starts = starts

    def close(self) -> None:
        self.file.flush()
        del self.file, self.starts

    def _record_and_sample(self, hidden_states: torch.Tensor, input_batch: Any, grammar_output: Any):
        """In place of the runner's ``sample``, which has the last hidden states of every token of the step."""
        count = input_batch.num_tokens
        parts = [x[:count].reshape(count, -1) for pair in self.layers for x in pair]
        if self.rank == 0:
            parts.append(hidden_states[:count])
        records = torch.cat([part.to(self.dtype) for part in parts], dim=-1).cpu().view(torch.int16).numpy()
        ends, begun = input_batch.query_start_loc_np, input_batch.num_computed_tokens_np
        for i, request in enumerate(input_batch.req_ids):
            start = self.starts[request] + begun[i]
            self.file[start : start + ends[i + 1] - ends[i], self.columns] = records[ends[i] : ends[i + 1]]
        return self.sample(hidden_states, input_batch, grammar_output)
