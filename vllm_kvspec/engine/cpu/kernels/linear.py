# SPDX-License-Identifier: Apache-2.0
"""Products of a few rows with a large matrix on CPU: what vLLM's own linear layers do there, for a bare weight.

``torch.nn.functional.linear`` takes three times as long for the 4 to 16 rows of a draft.
"""

import torch
from torch import nn
from vllm.model_executor.layers.utils import dispatch_cpu_unquantized_gemm


class PackedLinear:
    """``x @ weight.T`` with a packed copy of ``weight`` [n, k], by the library that vLLM chooses for this CPU."""

    def __init__(self, weight: torch.Tensor):
        self.layer = nn.Module()
        self.layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
        dispatch_cpu_unquantized_gemm(self.layer, remove_weight=False)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """``x`` [rows, k] in the weight's dtype -> [rows, n]."""
        return self.layer.cpu_linear(x, self.layer.weight, None)
