# SPDX-License-Identifier: Apache-2.0
"""The train command as one rank of several, under torchrun: what it does is ``vllm_kvspec.cli``'s own business.

    torchrun --nproc_per_node 2 ddp_probe.py PROBE_DIR train ...

Beside that it writes PROBE_DIR/RANK.pt: the random states this rank drew anchors with, its rows' tokens, its
parameters at the end, and where it wrote.
"""

import os
import sys
from pathlib import Path

import torch

from vllm_kvspec.cli import main
from vllm_kvspec.train import trainer

seen = {"random_states": [], "tokens": [], "written": []}
sample_anchors, compute_loss = trainer.sample_anchors, trainer.KVSpecTrainer.compute_loss
run_training, save_pretrained = trainer.KVSpecTrainer.train, trainer.KVSpecDraftModel.save_pretrained


def probe_anchors(loss_mask: torch.Tensor, count: int) -> torch.Tensor:
    # The state they are drawn with: the anchors themselves differ between ranks in any case, as the rows do.
    seen["random_states"].append(torch.get_rng_state())
    return sample_anchors(loss_mask, count)


def probe_loss(self, model, inputs, *args, **kwargs):
    seen["tokens"].append(inputs["input_ids"].clone())
    return compute_loss(self, model, inputs, *args, **kwargs)


def probe_training(self, *args, **kwargs):
    result = run_training(self, *args, **kwargs)
    seen["parameters"] = {name: p.detach().clone() for name, p in self.model.named_parameters()}
    return result


def probe_save(self, directory, *args, **kwargs):
    seen["written"].append(str(directory))
    return save_pretrained(self, directory, *args, **kwargs)


trainer.sample_anchors, trainer.KVSpecTrainer.compute_loss = probe_anchors, probe_loss
trainer.KVSpecTrainer.train, trainer.KVSpecDraftModel.save_pretrained = probe_training, probe_save
main(sys.argv[2:])
torch.save(seen, Path(sys.argv[1]) / f"{os.environ['RANK']}.pt")
