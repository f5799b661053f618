# SPDX-License-Identifier: Apache-2.0
"""Sample-and-walk verification: the target's own token at every tree node, then a walk from the root.

The target token of each row is drawn as vLLM's sampler draws it: from the processed logits, with Gumbel noise keyed by
the request's seed and the row's true position (``gumbel_sample``, vllm/v1/worker/gpu/sample/gumbel.py). A child is
accepted when it carries that token. Whatever the tree, the emitted tokens are the target's own samples at their
positions, so the output equals plain decoding, token for token under the same seed. A node is accepted with probability
p(children).

Two values of vLLM's ``rejection_sample_method`` give up on that: "fly" (FLy, arXiv 2511.22972) goes on to a token that
the target did not sample, where it was unsure and samples what is drafted behind that token (``loose_scores``);
"synthetic" forces acceptance, for benchmarks (``engine/verify/synthetic.py``).
"""

from dataclasses import replace

import numpy as np
import torch
from vllm.v1.outputs import LogprobsTensors
from vllm.v1.worker.gpu.input_batch import InputBatch
from vllm.v1.worker.gpu.sample.gumbel import gumbel_sample
from vllm.v1.worker.gpu.sample.logprob import compute_topk_scores
from vllm.v1.worker.gpu.sample.output import SamplerOutput
from vllm.v1.worker.gpu.spec_decode.rejection_sampler import RejectionSampler

from vllm_kvspec.engine import ops
from vllm_kvspec.engine.verify.synthetic import force_acceptance, uniform_by_position
from vllm_kvspec.engine.verify.tree_state import TreeState


class TreeRejectionSampler(RejectionSampler):
    """vLLM's RejectionSampler with the acceptance rule replaced; chunking and logprobs are kept.

    After a call, ``path`` int32 [B, N1] holds each request's accepted nodes by depth (identity beyond them). With
    ``keeps_logits``, ``logits`` [L, V] is what was verified, until ``take_logits``.
    """

    keeps_logits = False

    def __init__(self, sampler, spec_config, device: torch.device, state: TreeState):
        super().__init__(sampler, spec_config, device)
        self.state = state
        self.is_loose = spec_config.rejection_sample_method == "fly"
        self.spec_config = spec_config
        self.path: torch.Tensor | None = None
        self.logits: torch.Tensor | None = None
        # Of the call that is under way, and of its latest chunk of requests.
        self._logprobs_dims: tuple[int, int] | None = None
        self._chunk_paths: list[torch.Tensor] = []
        self._chunk_mapping: torch.Tensor | None = None

    def __call__(
        self,
        logits: torch.Tensor,
        input_batch: InputBatch,
        draft_logits: torch.Tensor | None = None,
        invalid_drafts: torch.Tensor | None = None,
    ) -> SamplerOutput:
        # vLLM tells placeholder drafts by `position - local_pos < prefill_len`; positions are depths here, so must
        # local_pos be.
        batch = replace(input_batch, expanded_local_pos=self.state.local_pos[: logits.shape[0]])
        self._chunk_paths = []
        self._logprobs_dims = self.sampler.get_logprobs_dims(input_batch.idx_mapping_np)
        output = super().__call__(logits, batch, None, invalid_drafts)
        self.logits = logits if self.keeps_logits else None
        self.path = self._chunk_paths[0] if len(self._chunk_paths) == 1 else torch.cat(self._chunk_paths)
        return output

    def take_logits(self) -> torch.Tensor | None:
        """``logits``, which are kept no longer."""
        logits, self.logits = self.logits, None
        return logits

    def _verify(
        self,
        logits: torch.Tensor,
        draft_logits: torch.Tensor | None,
        draft_sampled: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        idx_mapping: torch.Tensor,
        idx_mapping_np: np.ndarray,
        expanded_idx_mapping: torch.Tensor,
        expanded_local_pos: torch.Tensor,
        seq_lens_upper_bound_np: np.ndarray,
        verify_draft_sampled: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        processed_logits = self.sampler.apply_sampling_params(
            logits,
            expanded_idx_mapping,
            idx_mapping,
            idx_mapping_np,
            pos,
            draft_sampled,
            expanded_local_pos,
            seq_lens_upper_bound_np,
        )
        target_tokens = self._sample_rows(processed_logits, expanded_idx_mapping, pos)
        if self.synthetic_conditional_rates is not None:
            target_tokens, verify_draft_sampled = self._force_acceptance(
                target_tokens, verify_draft_sampled, pos, cu_num_logits, expanded_idx_mapping, expanded_local_pos
            )
        trees = (target_tokens, verify_draft_sampled, self.state.parent, cu_num_logits, idx_mapping)
        loose = ()
        if self.is_loose:
            score = ops.loose_scores(processed_logits, *trees, self.spec_config.fly_entropy_threshold)
            loose = (score, self.spec_config.fly_window_size)
        sampled, num_sampled, path = ops.tree_walk(*trees, *loose)
        self._chunk_paths.append(path)
        self._chunk_mapping = expanded_idx_mapping
        return processed_logits, sampled, num_sampled

    def _force_acceptance(
        self,
        target_tokens: torch.Tensor,
        draft_tokens: torch.Tensor,
        pos: torch.Tensor,
        cu_num_logits: torch.Tensor,
        expanded_idx_mapping: torch.Tensor,
        depth: torch.Tensor,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """``rejection_sample_method="synthetic"``: see ``engine/verify/synthetic.py``."""
        start = self._first_rows(target_tokens.shape[0], cu_num_logits)[1]
        node = torch.arange(target_tokens.shape[0], device=start.device) - start
        parent_rows = start + self.state.parent[expanded_idx_mapping.long(), node]
        uniform = uniform_by_position(self.sampler.sampling_states.seeds.gpu, pos, expanded_idx_mapping)
        return force_acceptance(
            target_tokens, draft_tokens, parent_rows, depth, uniform, self.synthetic_conditional_rates
        )

    @staticmethod
    def _first_rows(num_rows: int, cu_num_logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Of each logits row: its request in the batch, and that request's first row. Both int64 [L]."""
        rows = torch.arange(num_rows, device=cu_num_logits.device, dtype=cu_num_logits.dtype)
        request = torch.searchsorted(cu_num_logits[1:], rows, right=True)
        return request, cu_num_logits[request].long()

    def _sample_rows(
        self, processed_logits: torch.Tensor, expanded_idx_mapping: torch.Tensor, pos: torch.Tensor
    ) -> torch.Tensor:
        """The target's token of each row, int64 [L], from logits [L, V] with every sampling parameter applied."""
        states = self.sampler.sampling_states
        return gumbel_sample(
            processed_logits,
            expanded_idx_mapping,
            states.temperature.gpu,
            states.seeds.gpu,
            pos,
            # The logits have it already.
            apply_temperature=False,
            is_drafting=False,
            use_fp64=self.sampler.use_fp64_gumbel,
        )

    def _get_logprobs_tensors(
        self,
        sampled: torch.Tensor,
        num_sampled: torch.Tensor,
        logits: torch.Tensor,
        cu_num_logits: torch.Tensor,
        cu_num_logits_np: np.ndarray,
        max_num_logprobs: int,
    ) -> LogprobsTensors | None:
        if self._logprobs_dims is None:
            return None
        num_logprobs, max_per_req_token_ids = self._logprobs_dims
        # vLLM pairs logits row i of a request with its sampled token i; on a tree that token came from row path[i].
        request, start = self._first_rows(logits.shape[0], cu_num_logits)
        node = torch.arange(logits.shape[0], device=logits.device) - start
        source = start + self._chunk_paths[-1][request, node]
        tokens = torch.where(node < num_sampled[request], sampled[request, node], 0)
        # As vLLM's Sampler does; its RejectionSampler leaves the tokens out that a request lists.
        return compute_topk_scores(
            logits[source],
            num_logprobs,
            tokens,
            cu_num_logits_np.tolist() if len(source) > len(num_sampled) else None,
            logprob_token_ids_state=self.sampler.logprob_token_ids_state,
            expanded_idx_mapping=self._chunk_mapping,
            max_per_req_token_ids=max_per_req_token_ids,
            logits_mode=self.sampler.logprobs_mode in ("raw_logits", "processed_logits"),
        )
