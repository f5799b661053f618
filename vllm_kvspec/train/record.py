# SPDX-License-Identifier: Apache-2.0
"""The finished head as a directory: weights, how it was made (``training.json``), and a model card.

Written beside its place and moved there by one rename, so that a head is either complete or absent.
"""

import importlib.metadata
import json
import math
import platform
import resource
import shutil
import time
from pathlib import Path

import torch
from transformers import PreTrainedModel, TrainerCallback

from vllm_kvspec import __version__
from vllm_kvspec.config import KVSpecDraftConfig
from vllm_kvspec.models.draft_head import KVSpecDraftModel
from vllm_kvspec.train.checkpoints import RECORD_NAME

CARD = """\
---
library_name: vllm-kvspec
base_model: {target}
tags: [speculative-decoding, vllm]
---
# Draft head for {target}

{parameters:,} parameters, {config.num_hidden_layers} layers, context `{config.context}`, fusion `{config.fusion}`, \
drafting `{config.drafting}`, blocks of {config.draft_block_size}, {vocabulary}, \
{bias}. It fits this target only.

{serving}

Data: {rows} rows with {supervised} tokens to learn from ({data}). Trained for {steps} steps in {seconds} s with \
vllm-kvspec {version}:

```bash
{command}
```

`training.json` holds every setting, the versions and the losses.
"""
SERVE = """\
```bash
vllm serve {target} --speculative-config '{{"method": "kvspec", "model": "{name}", "num_speculative_tokens": {nodes}}}'
```"""
EXPORT = """Served by engines that know EAGLE-3, vLLM's own method for one, once it is written in their format:

```bash
vllm-kvspec export --format eagle3 --draft_model {name} --output_dir {name}-eagle3
vllm serve {target} --speculative-config '{{"method": "eagle3", "model": "{name}-eagle3", "num_speculative_tokens": 5}}'
```"""


class RunCallback(TrainerCallback):
    """Other anchors on every rank, a loss at every checkpoint, elapsed seconds in the history, a stop at a lost loss.

    The Trainer seeds all ranks alike, which their samplers need; what a rank draws itself must differ. A checkpoint
    without a logged loss would lose the losses since the last one, and the curve of a resumed run would differ.
    """

    def on_train_begin(self, args, state, control, **kwargs):
        if args.process_index:
            torch.manual_seed(args.seed + args.process_index)
        self.started = time.monotonic() - max((entry.get("elapsed", 0) for entry in state.log_history), default=0)

    def on_step_end(self, args, state, control, **kwargs):
        control.should_log = control.should_log or control.should_save

    def on_log(self, args, state, control, logs=None, **kwargs):
        state.log_history[-1]["elapsed"] = round(time.monotonic() - self.started, 1)
        loss = (logs or {}).get("loss")
        if loss is not None and not math.isfinite(float(loss)):
            raise ValueError(
                f"The loss must stay finite, found {loss} at step {state.global_step}; lower the learning rate, or "
                "train without --fp16."
            )


def loss_history(log_history: list[dict]) -> list[dict]:
    """The losses of transformers' ``log_history``: ``{"step": k, "loss": mean since the entry before}``."""
    return [{"step": entry["step"], "loss": float(entry["loss"])} for entry in log_history if "loss" in entry]


def versions() -> dict[str, str]:
    """Versions of what the result depends on."""
    packages = {name: importlib.metadata.version(name) for name in ("torch", "transformers", "accelerate", "datasets")}
    return {"vllm_kvspec": __version__, **packages, "python": platform.python_version()}


def memory(head: PreTrainedModel, target: PreTrainedModel) -> dict[str, int | None]:
    """Bytes of the two models and the peak of this process: resident memory, and on a GPU what torch allocated."""
    return {
        "target_bytes": _num_bytes(target),
        "head_bytes": _num_bytes(head),
        # Linux counts in KiB.
        "peak_rss_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "peak_cuda_bytes": torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None,
    }


def _num_bytes(model: PreTrainedModel) -> int:
    return sum(p.numel() * p.element_size() for p in model.parameters())


def write_head(head: KVSpecDraftModel, output: Path, record: dict) -> None:
    """Write ``head`` in bfloat16 with ``record`` (``training.json``) and a model card to ``output``, all or nothing.

    What stood in ``output`` is replaced. The head itself is left in bfloat16.
    """
    partial, replaced = (output.with_name(f"{output.name}.{state}") for state in ("partial", "replaced"))
    for leftover in (partial, replaced):
        shutil.rmtree(leftover, ignore_errors=True)
    head.to(torch.bfloat16).save_pretrained(partial)
    (partial / RECORD_NAME).write_text(json.dumps(record, indent=2) + "\n")
    (partial / "README.md").write_text(_card(head, output.name, record))
    if output.exists():
        output.rename(replaced)
    partial.rename(output)
    shutil.rmtree(replaced, ignore_errors=True)


def _card(head: KVSpecDraftModel, name: str, record: dict) -> str:
    config, target = head.config, record["settings"]["target_model"]
    reduced = config.draft_vocab_size < config.vocab_size
    return CARD.format(
        target=target,
        config=config,
        parameters=record["parameters"],
        vocabulary=f"{config.draft_vocab_size} of {config.vocab_size} tokens" if reduced else "whole vocabulary",
        bias=f"transition bias of rank {config.transition_rank}" if config.transition_rank else "no transition bias",
        serving=_serving(config).format(target=target, name=name, nodes=2 * config.draft_block_size),
        rows=record["rows"],
        supervised=record["supervised_tokens"],
        data=", ".join(record["settings"]["data_path"]),
        steps=record["steps"],
        seconds=record["seconds"],
        version=record["versions"]["vllm_kvspec"],
        command=record["command"],
    )


def _serving(config: KVSpecDraftConfig) -> str:
    if config.is_eagle3:
        return EXPORT
    return SERVE if config.context != "hidden" and config.fusion == "direct" else "For study; it is not served."
