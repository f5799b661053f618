# SPDX-License-Identifier: Apache-2.0
"""The drafter without a head: a table of what the target said may follow, and each request's own text.

Every verified row, accepted or not, teaches the table its best successors. Requests see what those of the same owner
have taught: the owner is a hash of ``cache_salt``, or of the request itself. All of it stays on the device; a step adds
four launches for what its rows teach and three for the trees, the latter inside the drafter's CUDA graph.
"""

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import nn
from vllm.logger import init_logger
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.input_batch import InputBatch

from vllm_kvspec.engine import ops
from vllm_kvspec.engine.config.keys import KVSpecConfig
from vllm_kvspec.kernels.reference_candidates import Candidates, Level, RankingScales, empty_candidates, root_parents
from vllm_kvspec.kernels.reference_draft_inputs import DraftRows
from vllm_kvspec.kernels.reference_recycle import WIDTH, RecycleTable, empty_table

logger = init_logger("vllm.kvspec.recycle")

SLOTS = 1 << 18
# The owner of what requests without a salt teach.
SHARED = 0
# Only the best successors of each row are wanted, no next level.
BEST = Level(num_parents=1, width=WIDTH, num_next=0)
UNSCALED = RankingScales(1.0, 1.0)


def owner_of(request, scope: str) -> int:
    """Whose entries a new request (vLLM's NewRequestData) teaches and sees, a 64-bit integer.

    Our scheduler writes ``kvspec_salt`` on it. A request without (another scheduler, steps that are timed at start)
    is alone.
    """
    if scope == "salt" and hasattr(request, "kvspec_salt"):
        # The target with an adapter says other things.
        adapter = request.lora_request and request.lora_request.lora_int_id
        if request.kvspec_salt is None and adapter is None:
            return SHARED
        name = f"adapter {adapter} salt {request.kvspec_salt!r}"
    else:
        name = f"request {request.req_id}"
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "little", signed=True) or 1


class RecycleDrafter(nn.Module):
    """Same interface as ``head_drafter.Drafter``. A module, so that sleep at level 2 restores its buffers."""

    # Every tree is grown anew; chains come from ``rows.chain``.
    parents = None

    def __init__(self, config: KVSpecConfig, req_states, device: torch.device):
        super().__init__()
        self.num_nodes = config.num_speculative_tokens
        self.coupled = config.draft_noise == "coupled"
        self.scope = config.recycle_scope
        for name, tensor in empty_table(SLOTS, device)._asdict().items():
            self.register_buffer(name, tensor, persistent=False)
        self.register_buffer("owner_of_request", torch.zeros(req_states.max_num_reqs, dtype=torch.int64, device=device))
        self.text = req_states.all_token_ids
        size = sum(tensor.nbytes for tensor in self.table) / 2**20
        logger.info("kvspec recycles the target's logits in a table of %d contexts (%.0f MiB).", SLOTS, size)

    @property
    def table(self) -> RecycleTable:
        return RecycleTable(self.owner, self.context, self.token, self.log_prob)

    def weights_changed(self) -> None:
        """The target has got other weights: the table learns them as it goes."""

    def add_requests(self, rows: Sequence[int], requests: Sequence) -> None:
        """New owners of the request states ``rows``."""
        owners = np.array([owner_of(request, self.scope) for request in requests], dtype=np.int64)
        index = async_tensor_h2d(np.array(rows, dtype=np.int64), device=self.owner.device)
        self.owner_of_request[index] = async_tensor_h2d(owners, device=self.owner.device)

    def learn(self, logits: torch.Tensor, batch: InputBatch, parent: torch.Tensor) -> None:
        """``logits`` [L, V] of the rows that a step verified; ``parent`` int32 [>= R, N1] of the trees they are on."""
        rows = len(logits)
        zeros = torch.zeros(rows, dtype=torch.int64, device=logits.device)
        best = empty_candidates(rows, [BEST], logits.device)
        ops.tree_level(
            logits.unsqueeze(1), root_parents(zeros), None, None, level=BEST, depth=0, base=zeros, idx_mapping=zeros,
            temperature=zeros[:1].float(), seeds=zeros[:1], coupled=False, scales=UNSCALED, candidates=best, offset=0,
        )  # fmt: skip
        ops.recycle_update(
            self.table,
            best.token,
            best.score,
            input_ids=batch.input_ids,
            positions=batch.positions,
            logits_indices=batch.logits_indices,
            idx_mapping=batch.expanded_idx_mapping,
            local_pos=batch.expanded_local_pos,
            parent=parent,
            owner=self.owner_of_request,
            text=self.text.gpu,
        )

    def trees(
        self,
        rows: DraftRows,
        with_chains: bool,
        num_nodes: int | None = None,
        head: Candidates | None = None,
        head_width: int = 0,
    ) -> tuple[torch.Tensor, ...]:
        """See ``Drafter.trees``. ``head``: candidates of a head, ``head_width`` children a node, to graft onto."""
        text = self.text.gpu
        return ops.recycle_tree(
            self.table,
            ops.own_matches(text, rows.request, rows.base),
            request=rows.request,
            base=rows.base,
            temperature=rows.temperature,
            seed=rows.seed,
            chain=rows.chain,
            owner=self.owner_of_request,
            text=text,
            size=self.num_nodes,
            num_nodes=num_nodes or self.num_nodes,
            coupled=self.coupled,
            head=head,
            head_width=head_width,
        )
