# SPDX-License-Identifier: Apache-2.0
"""What engines replay of their CUDA graphs, and whether every draft so made is the one that eager code makes."""

from dataclasses import dataclass, field

import pytest
import torch
from vllm.v1.worker.gpu.cudagraph_utils import BatchExecutionDescriptor, CudaGraphManager

from vllm_kvspec.engine.draft.graphs import DrafterGraphs
from vllm_kvspec.engine.draft.speculator import KVSpecSpeculator


@dataclass
class Replays:
    target: list[BatchExecutionDescriptor] = field(default_factory=list)
    drafter: list[BatchExecutionDescriptor] = field(default_factory=list)
    # Replays of padded batches.
    padded: int = 0
    # Replays whose trees were not the eager ones, or that wrote to another request's.
    wrong: list[BatchExecutionDescriptor] = field(default_factory=list)


def watch(patch: pytest.MonkeyPatch) -> Replays:
    """Of all engines that are started from now on. Each draft is made again without a graph and without padding."""
    replays = Replays()
    run_fullgraph, propose = CudaGraphManager.run_fullgraph, KVSpecSpeculator.propose

    def run(self, graph):
        run_fullgraph(self, graph)
        (replays.drafter if isinstance(self, DrafterGraphs) else replays.target).append(graph)

    def compare(self, input_batch, *args, **kwargs):
        state, count = self.state, len(replays.drafter)
        trees = (state.parent, state.depth, state.ancestor_mask)
        before = [tensor.clone() for tensor in trees]
        tokens = propose(self, input_batch, *args, **kwargs).clone()
        if len(replays.drafter) == count:
            return tokens
        graph, rows = replays.drafter[-1], self.rows.first(len(tokens))
        drafted = [tensor[rows.request] for tensor in trees]
        others = torch.ones(len(state.parent), dtype=torch.bool, device=tokens.device)
        others[rows.request] = others[state.padding_request] = False
        right = all(torch.equal(tensor[others], old[others]) for tensor, old in zip(trees, before, strict=True))
        with_chains = bool(self.drafter.parents) and state.any_chain(input_batch.idx_mapping_np)
        self.draft(len(tokens), with_chains, self.graphs.nodes[graph.num_reqs])
        right &= torch.equal(self.draft_tokens[: len(tokens)], tokens)
        right &= all(torch.equal(tensor[rows.request], one) for tensor, one in zip(trees, drafted, strict=True))
        replays.padded += graph.num_reqs > len(tokens)
        if not right:
            replays.wrong.append(graph)
        return tokens

    patch.setattr(CudaGraphManager, "run_fullgraph", run)
    patch.setattr(KVSpecSpeculator, "propose", compare)
    return replays
