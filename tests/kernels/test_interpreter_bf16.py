# SPDX-License-Identifier: Apache-2.0
"""bf16 in the interpreter, as the other tests rely on it: computed on values, not bit patterns; rounded to even."""

import torch
import triton
import triton.language as tl


@triton.jit
def _arithmetic(a_ptr, b_ptr, sum_ptr, less_ptr, dot_ptr, round_ptr, wide_ptr, SIZE: tl.constexpr):
    row = tl.arange(0, SIZE)[:, None]
    column = tl.arange(0, SIZE)[None, :]
    at = row * SIZE + column
    a = tl.load(a_ptr + at)
    b = tl.load(b_ptr + at)
    tl.store(sum_ptr + at, a + b)
    tl.store(less_ptr + at, (a < b).to(tl.int32))
    tl.store(dot_ptr + at, tl.dot(a, b))
    tl.store(round_ptr + at, tl.load(wide_ptr + at).to(tl.bfloat16))


def test_bf16_arithmetic_equals_torch(device):
    torch.manual_seed(0)
    size = 16
    a, b = (torch.randn(size, size, device=device).bfloat16() for _ in range(2))
    wide = torch.randn(size, size, device=device) * 1000
    total, rounded = torch.zeros_like(a), torch.zeros_like(a)
    less = torch.zeros(size, size, dtype=torch.int32, device=device)
    dot = torch.zeros(size, size, device=device)
    _arithmetic[(1,)](a, b, total, less, dot, rounded, wide, SIZE=size)
    assert torch.equal(total, a + b)
    assert torch.equal(less, (a < b).int())
    assert torch.equal(rounded, wide.bfloat16())
    torch.testing.assert_close(dot.double(), a.double() @ b.double(), rtol=1e-6, atol=1e-5)
