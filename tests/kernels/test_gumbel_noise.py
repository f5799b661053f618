# SPDX-License-Identifier: Apache-2.0
"""gumbel_noise: equal to what vLLM's own sampler draws, kernel equal to twin, and really Gumbel distributed."""

import pytest
import torch
from interpreted_vllm import vllm_module

from vllm_kvspec.kernels import reference
from vllm_kvspec.kernels.gumbel_noise import gumbel_noise

# Kernel and twin round logarithms and the series independently: a few units in the last place of fp32.
ULPS = dict(rtol=2e-6, atol=2e-6)


def _case(device):
    seeds = torch.tensor([0, -1, 1 << 62, 123456789, -(1 << 63)], device=device)
    temperature = torch.tensor([1.0, 0.7, 0.0, 2.0, 1.3], device=device)
    positions = torch.tensor([[0, 1, 2], [4095, 4096, 4097], [7, 8, 9], [1 << 20, 5, 0]], device=device)
    return seeds, temperature, positions, torch.tensor([3, 1, 2, 4], device=device)


@pytest.mark.parametrize("vocab_size", [pytest.param(1, id="V1"), pytest.param(1500, id="two-blocks-partly-filled")])
def test_kernel_matches_twin(device, vocab_size):
    ours, twin = gumbel_noise(*_case(device), vocab_size), reference.gumbel_noise(*_case(device), vocab_size)
    torch.testing.assert_close(ours, twin, **ULPS)
    assert ours[2].eq(0).all()


@pytest.mark.parametrize("draw", [gumbel_noise, reference.gumbel_noise])
def test_equals_the_noise_of_vllm(device, draw):
    """vLLM's jit functions, run token by token, are the truth that the coupling rests on."""
    triton = pytest.importorskip("triton")
    tl = triton.language
    pytest.importorskip("vllm")
    vllm_gumbel = vllm_module("sample.gumbel")
    uniform, log1p = vllm_gumbel.murmur3_uniform32, vllm_gumbel._log1p_neg_stable

    @triton.jit
    def vllm_noise(out_ptr, seed_ptr, pos_ptr, temp_ptr, vocab_size, BLOCK: tl.constexpr):
        token = tl.arange(0, BLOCK)
        u = uniform(tl.load(seed_ptr), tl.load(pos_ptr), token)
        noise = -tl.log(-log1p(u)) * tl.load(temp_ptr)
        tl.store(out_ptr + token, noise, mask=token < vocab_size)

    # The jit function must find its globals, which are this test's locals.
    globals().update(uniform=uniform, log1p=log1p, tl=tl)
    seeds, temperature, positions, mapping = _case(device)
    ours = draw(seeds, temperature, positions, mapping, 1000)
    for b, r in enumerate(mapping.tolist()):
        if temperature[r] == 0:
            continue
        for g in range(positions.shape[1]):
            expected = torch.full((1000,), float("nan"), device=device)
            vllm_noise[(1,)](expected, seeds[r], positions[b, g], temperature[r], 1000, BLOCK=1024)
            torch.testing.assert_close(ours[b, g], expected, **ULPS)


@pytest.mark.parametrize("temp", [pytest.param(1.0, id="T1"), pytest.param(0.6, id="T0.6")])
def test_vllm_samples_the_argmax_of_logits_plus_our_noise(device, temp):
    """The whole sampler: its token is the argmax of logits + our noise, hence drafts ranked by it are coupled."""
    pytest.importorskip("vllm")
    vllm_gumbel = vllm_module("sample.gumbel")
    torch.manual_seed(0)
    vocab, rows = 700, 6
    seeds = torch.arange(3, device=device) * 977 + 5
    temperature = torch.full((3,), temp, device=device)
    mapping = torch.tensor([2, 0, 1], device=device)
    positions = torch.randint(0, 9000, (3, 2), device=device)
    logits = torch.randn(rows, vocab, device=device)
    sampled = vllm_gumbel.gumbel_sample(
        logits.clone(),
        mapping.repeat_interleave(2).int(),
        temperature,
        seeds,
        positions.flatten(),
        apply_temperature=True,
        is_drafting=False,
    )
    noise = reference.gumbel_noise(seeds, temperature, positions, mapping, vocab)
    assert sampled.tolist() == (logits + noise.view(rows, vocab)).argmax(-1).tolist()


def test_noise_is_gumbel():
    one = torch.ones(1)
    noise = reference.gumbel_noise(torch.tensor([42]), one, torch.arange(50)[None], torch.tensor([0]), 4000)
    # Mean is Euler's constant, variance pi^2 / 6; 200,000 draws give standard errors of 0.003 and 0.009.
    assert abs(noise.mean().item() - 0.5772) < 0.012
    assert abs(noise.var().item() - 1.6449) < 0.04
