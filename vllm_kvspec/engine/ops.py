# SPDX-License-Identifier: Apache-2.0
"""The kernels the engine calls: Triton on a GPU; on CPU their torch twins, the costly ones compiled.

``VLLM_KVSPEC_KERNELS`` chooses otherwise, for tests: ``torch`` runs the twins, ``triton`` the kernels, which on CPU
needs Triton's interpreter (``TRITON_INTERPRET=1``): right, but a thousand times slower.
"""

import os
from collections.abc import Callable
from functools import partial

import torch
from torch.nn.functional import linear
from vllm.platforms import current_platform

_CHOICES = ("auto", "triton", "torch")
_choice = os.environ.get("VLLM_KVSPEC_KERNELS", "auto")
if _choice not in _CHOICES:
    raise ValueError(f"VLLM_KVSPEC_KERNELS must be one of {', '.join(_CHOICES)}; found {_choice!r}.")

USE_TRITON = _choice == "triton" or (_choice == "auto" and not current_platform.is_cpu())
USE_COMPILED = _choice == "auto" and current_platform.is_cpu()

if USE_TRITON:
    from vllm_kvspec.kernels.draft_inputs import draft_inputs
    from vllm_kvspec.kernels.gumbel_noise import gumbel_noise
    from vllm_kvspec.kernels.kv_compact import kv_compact
    from vllm_kvspec.kernels.loose_scores import loose_scores
    from vllm_kvspec.kernels.paged_draft_attention import paged_draft_attention
    from vllm_kvspec.kernels.recycle import own_matches, recycle_tree, recycle_update
    from vllm_kvspec.kernels.tree_attention import tree_attention
    from vllm_kvspec.kernels.tree_build import tree_build
    from vllm_kvspec.kernels.tree_candidates import tree_candidates, tree_level
    from vllm_kvspec.kernels.tree_inputs import tree_inputs
    from vllm_kvspec.kernels.tree_walk import tree_walk
else:
    from vllm_kvspec.kernels.reference import kv_compact, tree_inputs
    from vllm_kvspec.kernels.reference_draft_inputs import draft_inputs
    from vllm_kvspec.kernels.reference_loose import loose_scores

    if USE_COMPILED:
        from vllm_kvspec.engine.cpu.kernels.attention import paged_draft_attention, tree_attention
        from vllm_kvspec.engine.cpu.kernels.candidates import tree_candidates, tree_level
        from vllm_kvspec.engine.cpu.kernels.gumbel import gumbel_noise
        from vllm_kvspec.engine.cpu.kernels.linear import PackedLinear
        from vllm_kvspec.engine.cpu.kernels.recycle import own_matches, recycle_tree, recycle_update
        from vllm_kvspec.engine.cpu.kernels.trees import tree_build, tree_walk
    else:
        from vllm_kvspec.kernels.reference import (
            gumbel_noise,
            paged_draft_attention,
            tree_attention,
            tree_build,
            tree_walk,
        )
        from vllm_kvspec.kernels.reference_candidates import tree_candidates, tree_level
        from vllm_kvspec.kernels.reference_recycle import own_matches, recycle_tree, recycle_update


def fixed_linear(weight: torch.Tensor) -> Callable[[torch.Tensor], torch.Tensor]:
    """``x`` [rows, k] -> ``x @ weight.T`` [rows, n], for a ``weight`` [n, k] that stays as it is."""
    return PackedLinear(weight) if USE_COMPILED else partial(linear, weight=weight)


__all__ = [
    "USE_COMPILED",
    "USE_TRITON",
    "draft_inputs",
    "fixed_linear",
    "gumbel_noise",
    "kv_compact",
    "loose_scores",
    "own_matches",
    "paged_draft_attention",
    "recycle_tree",
    "recycle_update",
    "tree_attention",
    "tree_build",
    "tree_candidates",
    "tree_inputs",
    "tree_level",
    "tree_walk",
]
