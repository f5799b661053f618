# SPDX-License-Identifier: Apache-2.0
"""Device buffers that carry a tree from the step that proposes it to the step that verifies it.

R = max_num_seqs, N1 = num_speculative_tokens + 1. Everything is written and read on the main stream, so a step never
waits for the host. Draft token ids themselves live in vLLM's ``req_states.draft_tokens``.
"""

import numpy as np
import torch
from vllm.utils.torch_utils import async_tensor_h2d
from vllm.v1.worker.gpu.buffer_utils import UvaBackedTensor


class TreeState:
    """Attributes, by row:

    - by request state: ``parent``, ``depth`` int32 [R + 1, N1], ``ancestor_mask`` int64 [R + 1, N1] (bit j of row t:
      node j is t or an ancestor of t), ``chain`` (1 where the request must get a chain). The last row,
      ``padding_request``, is no request's: padding of a batch writes there;
    - by batch position, at fixed addresses for CUDA graphs: ``batch_mask`` int64 [R, N1], ``batch_len`` int32 [R] (tree
      rows of this step including the root; 0 = plain causal request);
    - by logits row: ``local_pos`` int32 [R * N1], the depth of each row.
    """

    def __init__(self, max_num_reqs: int, num_nodes: int, device: torch.device):
        self.num_nodes = num_nodes
        self.device = device
        num_rows = num_nodes + 1
        chain = torch.arange(num_rows, dtype=torch.int64)
        self.chain_depth = chain.to(device, torch.int32)
        self.chain_parent = (chain - 1).clamp(min=0).to(device, torch.int32)
        # Row t has bits 0..t set: 2^(t+1) - 1, which for t = 63 is -1 in two's complement.
        self.chain_mask = torch.tensor([(1 << (t + 1)) - 1 if t < 63 else -1 for t in range(num_rows)], device=device)
        self.padding_request = max_num_reqs
        self.parent = self.chain_parent.repeat(max_num_reqs + 1, 1)
        self.depth = self.chain_depth.repeat(max_num_reqs + 1, 1)
        self.ancestor_mask = self.chain_mask.repeat(max_num_reqs + 1, 1)
        self.batch_mask = torch.zeros(max_num_reqs, num_rows, dtype=torch.int64, device=device)
        self.batch_len = torch.zeros(max_num_reqs, dtype=torch.int32, device=device)
        self.local_pos = torch.zeros(max_num_reqs * num_rows, dtype=torch.int32, device=device)
        self.chain = UvaBackedTensor(max_num_reqs, dtype=torch.int32)
        # Host-side: no request ever gets branches, so plain causal attention and the slots as they are serve.
        self.only_chains = False
        # Host-side: the batch's leading requests that hold all with drafts. Decides which attention kernel runs for
        # whom outside full CUDA graphs.
        self.num_draft_reqs = 0

    def any_chain(self, rows: np.ndarray) -> bool:
        """Whether any of the requests in ``rows`` must get a chain. Known on the host."""
        return bool(self.chain.np[rows].any())

    def add_requests(self, rows: list[int], chain: list[bool]) -> None:
        """Forget the trees of earlier owners of ``rows``: a padded first step must see a chain."""
        self.chain.np[rows] = chain
        self.chain.copy_to_uva()
        index = async_tensor_h2d(np.array(rows, dtype=np.int64), device=self.device)
        self.parent[index] = self.chain_parent
        self.depth[index] = self.chain_depth
        self.ancestor_mask[index] = self.chain_mask

    def store(
        self, idx_mapping: torch.Tensor, parent: torch.Tensor, depth: torch.Tensor, ancestor_mask: torch.Tensor
    ) -> None:
        """Keep the trees proposed for requests ``idx_mapping`` int64 [B]; other arguments are [B, N1]."""
        self.parent[idx_mapping] = parent
        self.depth[idx_mapping] = depth
        self.ancestor_mask[idx_mapping] = ancestor_mask

    def clear_batch(self) -> None:
        """No request of this step has tree rows."""
        self.batch_len.zero_()
        self.num_draft_reqs = 0
