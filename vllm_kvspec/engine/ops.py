# SPDX-License-Identifier: Apache-2.0
"""The kernels the engine calls: Triton on a GPU; on CPU their torch twins, the costly ones compiled.

On CPU, Triton kernels run in the interpreter: right, but a thousand times slower. Set ``VLLM_KVSPEC_KERNELS=triton``
(with ``TRITON_INTERPRET=1``) to run them there all the same (the tests do), or ``torch`` to run the twins anywhere.
"""

import os

from vllm.platforms import current_platform

_CHOICES = ("auto", "triton", "torch")
_choice = os.environ.get("VLLM_KVSPEC_KERNELS", "auto")
if _choice not in _CHOICES:
    raise ValueError(f"VLLM_KVSPEC_KERNELS must be one of {', '.join(_CHOICES)}; found {_choice!r}.")

USE_TRITON = _choice == "triton" or (_choice == "auto" and not current_platform.is_cpu())

if USE_TRITON:
    from vllm_kvspec.kernels.draft_inputs import draft_inputs
    from vllm_kvspec.kernels.gumbel_noise import gumbel_noise
    from vllm_kvspec.kernels.kv_compact import kv_compact
    from vllm_kvspec.kernels.paged_draft_attention import paged_draft_attention
    from vllm_kvspec.kernels.tree_attention import tree_attention
    from vllm_kvspec.kernels.tree_build import tree_build
    from vllm_kvspec.kernels.tree_candidates import tree_candidates, tree_level
    from vllm_kvspec.kernels.tree_inputs import tree_inputs
    from vllm_kvspec.kernels.tree_walk import tree_walk
else:
    from vllm_kvspec.kernels.reference import (
        gumbel_noise,
        kv_compact,
        paged_draft_attention,
        tree_attention,
        tree_build,
        tree_inputs,
        tree_walk,
    )
    from vllm_kvspec.kernels.reference_candidates import tree_candidates, tree_level
    from vllm_kvspec.kernels.reference_draft_inputs import draft_inputs

if _choice == "auto" and not USE_TRITON:
    from vllm_kvspec.engine.cpu.kernels.attention import paged_draft_attention, tree_attention  # noqa: F811
    from vllm_kvspec.engine.cpu.kernels.candidates import tree_candidates, tree_level  # noqa: F811
    from vllm_kvspec.engine.cpu.kernels.gumbel import gumbel_noise  # noqa: F811

__all__ = [
    "USE_TRITON",
    "draft_inputs",
    "gumbel_noise",
    "kv_compact",
    "paged_draft_attention",
    "tree_attention",
    "tree_build",
    "tree_candidates",
    "tree_inputs",
    "tree_level",
    "tree_walk",
]
