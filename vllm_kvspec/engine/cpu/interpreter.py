# SPDX-License-Identifier: Apache-2.0
"""Two vLLM 0.32 kernels that Triton's interpreter cannot run, replaced by torch on CPU. Nothing here runs on a GPU.

Remove each when the interpreter (or vLLM's kernel) accepts it: ``tests/engine/test_interpreter.py`` says when.
"""

import numpy as np
import torch


def apply_grammar_bitmask(
    self, logits: torch.Tensor, input_batch, grammar_req_ids: list[str], grammar_bitmask: np.ndarray
) -> None:
    """In place of ``StructuredOutputsWorker.apply_grammar_bitmask``, whose kernel the interpreter refuses.

    ``grammar_bitmask`` int32 [num_rows, ceil(vocab / 32)], one row per logits row of the listed requests in order; a
    clear bit forbids its token.
    """
    if not grammar_req_ids:
        return
    index = {req_id: i for i, req_id in enumerate(input_batch.req_ids)}
    starts = input_batch.cu_num_logits_np
    rows = np.concatenate([np.arange(starts[index[r]], starts[index[r] + 1]) for r in grammar_req_ids])
    bits = np.unpackbits(grammar_bitmask[: len(rows)].view(np.uint8), axis=1, bitorder="little")
    forbidden = torch.from_numpy(bits[:, : logits.shape[-1]] == 0)
    row_index = torch.from_numpy(rows).long()
    logits[row_index] = logits[row_index].masked_fill(forbidden, float("-inf"))


def work_around() -> None:
    """Install both replacements in this process. Idempotent."""
    import vllm.v1.sample.ops.topk_topp_sampler as topk_topp_sampler
    from vllm.v1.worker.gpu.structured_outputs import StructuredOutputsWorker

    # `_topk_topp_kernel` calls `.to` on a program id, a python int in the interpreter: take vLLM's torch path.
    topk_topp_sampler.HAS_TRITON = False
    StructuredOutputsWorker.apply_grammar_bitmask = apply_grammar_bitmask
