# SPDX-License-Identifier: Apache-2.0
"""Kernels that read or change logits, against vLLM's own, interpreted."""

import pytest
import torch
from batches import MAX_LEN, MAX_REQS, VOCAB, make_batch

SEEDS = pytest.mark.parametrize("seed", range(3))
# One block, and two whose second is partly filled.
VOCABS = pytest.mark.parametrize("vocab", [70, VOCAB])
HALF = pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
# Another order of summation, another logarithm.
CLOSE = 2e-6


@SEEDS
@HALF
def test_temperature(check, seed, dtype):
    b = make_batch(seed)
    temperature = torch.tensor([0.0, 1.0, 0.7, 2.5, 1e-3, 0.3, 1.0])
    logits = b.logits(b.num_rows, stride=VOCAB + 12, dtype=dtype)
    check("sample.gumbel", "apply_temperature", logits, b.rows, temperature)


@SEEDS
@VOCABS
@pytest.mark.parametrize("apply_temperature", [False, True])
@pytest.mark.parametrize("is_drafting", [False, True])
@pytest.mark.parametrize("use_fp64", [False, True])
def test_gumbel_sample(check, seed, vocab, apply_temperature, is_drafting, use_fp64):
    b = make_batch(seed)
    rows = b.rows.clone()
    rows[1] = -1
    seeds = torch.tensor([0, -1, 1 << 62, 123456789, -(1 << 63), 5, 6])
    check(
        "sample.gumbel",
        "gumbel_sample",
        b.logits(b.num_rows, vocab, stride=vocab + 3),
        rows,
        torch.tensor([1.0, 0.7, 0.0, 2.0, 1.3, 0.0, 0.2]),
        seeds,
        b.ints(0, 1 << 30, b.num_rows, dtype=torch.int64),
        apply_temperature,
        is_drafting,
        use_fp64=use_fp64,
    )


@SEEDS
@pytest.mark.parametrize("use_fp64", [False, True])
def test_gumbel_blocks(check, seed, use_fp64):
    """The kernel itself: the maximum of every block, not only of the one that wins."""
    b = make_batch(seed)
    n, blocks = b.num_rows, 3
    vocab = 2 * 128 + 50
    best = torch.zeros(n, blocks, dtype=torch.float64 if use_fp64 else torch.float32)
    logits = b.logits(n, vocab)
    check(
        "sample.gumbel",
        "_gumbel_sample_kernel",
        torch.zeros(n, blocks, dtype=torch.int64),
        blocks,
        best,
        blocks,
        *(None, 0, 0, None, None, 0),
        logits,
        logits.stride(0),
        b.rows,
        b.ints(0, 99, MAX_REQS, dtype=torch.int64),
        b.ints(0, 99, n, dtype=torch.int64),
        torch.tensor([1.0, 0.7, 0.0, 2.0, 1.3, 0.0, 0.2]),
        vocab,
        grid=(n, blocks),
        tolerance=CLOSE,
        BLOCK_SIZE=128,
        IS_DRAFTING=False,
        APPLY_TEMPERATURE=True,
        USE_FP64=use_fp64,
        PER_TOKEN_COL=False,
    )


@SEEDS
@pytest.mark.parametrize("per_token", [False, True])
def test_gumbel_sample_keeps_logits(check, seed, per_token):
    b = make_batch(seed, drafts=False)
    n = b.num_rows
    rows = b.rows.clone()
    rows[1] = -1
    check(
        "sample.gumbel",
        "gumbel_sample",
        b.logits(n),
        rows,
        torch.tensor([1.0, 0.7, 0.0, 2.0, 1.3, 0.0, 0.2]),
        b.ints(0, 99, MAX_REQS, dtype=torch.int64),
        b.ints(0, 99, n, dtype=torch.int64),
        True,
        True,
        logits_cache=torch.zeros(MAX_REQS, 3, VOCAB + 4),
        logits_cache_col=b.ints(0, 3, n) if per_token else torch.tensor(2, dtype=torch.int32),
    )


@SEEDS
@HALF
def test_min_p(check, seed, dtype):
    b = make_batch(seed)
    min_p = torch.tensor([0.0, 0.1, 0.9, 1.0, 1e-6, 0.0, 0.3])
    check("sample.min_p", "apply_min_p", b.logits(b.num_rows, stride=VOCAB + 5, dtype=dtype), b.rows, min_p)


@SEEDS
@VOCABS
def test_penalties(check, seed, vocab):
    b = make_batch(seed)
    tokens = b.ints(0, vocab, MAX_REQS, MAX_LEN)
    mask, counts = (torch.full((MAX_REQS, width), 3, dtype=torch.int32) for width in ((vocab + 31) // 32, vocab))
    _, _, _, _, mask, counts, _ = check_bincount(check, b, tokens, mask, counts)
    drafts = b.ints(0, vocab, b.num_rows)
    # Some drafts repeat, and some are placeholders.
    drafts[2:4] = int(drafts[1])
    drafts[-1] = -1
    check(
        "sample.penalties",
        "apply_penalties",
        b.logits(b.num_rows, vocab),
        b.rows,
        drafts,
        b.local_pos,
        torch.tensor([1.0, 1.3, 0.8, 1.0, 2.0, 1.0, 1.1]),
        torch.tensor([0.0, 0.5, -0.5, 0.3, 0.0, 0.0, 0.2]),
        torch.tensor([0.0, 0.0, 0.7, 0.0, -0.4, 0.9, 0.2]),
        mask,
        counts,
        tolerance=CLOSE,
    )


def check_bincount(check, b, tokens, mask, counts):
    """Checks, then returns the arguments as our kernel leaves them."""
    from vllm.v1.worker.gpu.sample.penalties import bincount

    arguments = [b.mapping, tokens, b.prompt, b.prefill, mask, counts, int(b.prefill.max())]
    check("sample.penalties", "bincount", *arguments)
    bincount(*arguments)
    return arguments


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("restores", [False, True])
def test_logit_bias(check, seed, restores):
    b = make_batch(seed)

    def ids(width):
        return torch.stack([torch.randperm(VOCAB, generator=b.gen)[:width] for _ in range(MAX_REQS)]).int()

    logits = b.logits(b.num_rows)
    stops = ids(9)
    # A row that allows nothing but stop tokens.
    request = int(b.rows[0])
    logits[0] = float("-inf")
    logits[0, stops[request, :2].long()] = 1.0
    num_allowed = b.ints(0, 3, MAX_REQS) * b.ints(0, 30, MAX_REQS)
    num_allowed[request] = 0
    check(
        "sample.logit_bias",
        "apply_logit_bias",
        logits,
        b.rows,
        b.ints(0, 40, b.num_rows, dtype=torch.int64),
        num_allowed,
        ids(60),
        b.ints(0, 2, MAX_REQS) * b.ints(0, 30, MAX_REQS),
        ids(30),
        torch.randn(MAX_REQS, 30, generator=b.gen),
        b.ints(0, 80, MAX_REQS),
        b.ints(0, 9, MAX_REQS).clamp(min=2 * int(seed % 2)),
        b.ints(0, 2, MAX_REQS) if seed < 3 else torch.ones(MAX_REQS, dtype=torch.int32),
        stops,
        restores,
    )


@pytest.mark.parametrize("seed", range(6))
def test_bad_words(check, seed):
    """Few tokens, so that words of up to three occur, across the border of output and drafts too."""
    b = make_batch(seed)
    tokens, drafts = b.ints(0, 3, MAX_REQS, MAX_LEN), b.ints(0, 3, b.num_rows)
    offsets = torch.cat([torch.zeros(MAX_REQS, 1), b.ints(1, 4, MAX_REQS, 8).cumsum(1)], 1).int()
    changed = check(
        "sample.bad_words",
        "apply_bad_words",
        torch.randn(b.num_rows, VOCAB, generator=b.gen),
        b.rows,
        b.ints(0, 3, MAX_REQS, 40),
        offsets,
        b.ints(0, 9, MAX_REQS),
        tokens,
        b.prompt,
        b.prompt + b.ints(0, 5, MAX_REQS),
        drafts,
        b.local_pos,
        8,
    )
    assert changed is None


@pytest.mark.parametrize("seed", range(45))
def test_thinking_budget(check, seed):
    """Few tokens, so that markers occur anywhere; a cache that is cold, warm, or of a request that was there before."""
    b = make_batch(seed, MAX_REQS)
    tokens, drafts = b.ints(0, 3, MAX_REQS, MAX_LEN), b.ints(0, 3, b.num_rows)
    total = b.prompt + b.ints(0, 5, MAX_REQS)
    scan = b.ints(0, 60, MAX_REQS)
    scan[::2] = 0
    place = b.ints(-1, 9, MAX_REQS)
    place[::2] = -1
    check(
        "sample.thinking_budget",
        "apply_thinking_budget",
        torch.randn(b.num_rows, VOCAB, generator=b.gen),
        b.mapping,
        b.rows,
        b.ints(-1, 3, MAX_REQS),
        tokens,
        total,
        drafts,
        b.local_pos,
        place,
        place - 1 + (place < 0).int(),
        scan,
        torch.tensor([0, 1, 2][: 1 + seed % 3], dtype=torch.int32),
        torch.tensor([1, 1, 0][: 1 + seed // 3 % 3], dtype=torch.int32),
        torch.tensor([2, 0, 1, 1], dtype=torch.int32),
    )


@SEEDS
@pytest.mark.parametrize("block", [4, 1024])
def test_thinking_cold_scan(check, seed, block):
    b = make_batch(seed)
    none = torch.full((MAX_REQS,), -1, dtype=torch.int32)
    check(
        "sample.thinking_budget",
        "_update_committed_marker_cache_kernel",
        b.mapping,
        b.ints(0, 6, MAX_REQS),
        b.ints(0, 5, MAX_REQS, MAX_LEN),
        MAX_LEN,
        b.prompt,
        none,
        none,
        torch.zeros(MAX_REQS, dtype=torch.int32),
        torch.tensor([0, 1], dtype=torch.int32),
        torch.tensor([2, 2, 3], dtype=torch.int32),
        grid=(len(b.mapping),),
        START_LEN=2,
        NATURAL_END_LEN=3,
        MAX_LEN=3,
        BLOCK=block,
    )


@SEEDS
@HALF
@pytest.mark.parametrize("mask_stride", [5, 8])
@pytest.mark.parametrize("every_position", [False, True], ids=["0.32", "0.33"])
def test_grammar_bitmask(check, seed, dtype, mask_stride, every_position):
    b = make_batch(seed)
    with_grammar = torch.randperm(len(b.mapping), generator=b.gen)[:3].tolist()
    lengths = [mask_stride if every_position else int(n) for n in b.cu_logits.diff()]
    mapping = torch.tensor([r * mask_stride + i for r in with_grammar for i in range(lengths[r])]).int()
    # Row by row in the matrix that vLLM keeps, with more rows than are used.
    bitmask = b.ints(-(1 << 31), 1 << 31, len(mapping) + 2, (VOCAB + 31) // 32, dtype=torch.int64).int()[: len(mapping)]
    logits = b.logits(b.num_rows, stride=VOCAB + 5, dtype=dtype)
    check(
        "structured_outputs",
        "_apply_grammar_bitmask_kernel",
        logits,
        logits.stride(0),
        mapping,
        b.cu_logits,
        bitmask,
        bitmask.stride(0),
        VOCAB,
        grid=(len(mapping), 1),
        MASK_STRIDE=mask_stride,
        BLOCK_SIZE=2048,
    )


def _finite_rows(b, dtype=torch.float32):
    logits = b.logits(b.num_rows, stride=VOCAB + 5, dtype=dtype)
    logits[:, 5] = torch.arange(b.num_rows)
    return logits


@SEEDS
@HALF
@pytest.mark.parametrize("num_ids", [1, 7])
def test_token_logprobs(check, seed, dtype, num_ids):
    b = make_batch(seed, 7)
    ids = b.ints(0, VOCAB, b.num_rows, num_ids, dtype=torch.int64)
    check("sample.logprob", "compute_token_logprobs", _finite_rows(b, dtype), ids, tolerance=CLOSE)


@SEEDS
@HALF
@pytest.mark.parametrize("num_logprobs", [0, 5])
@pytest.mark.parametrize("logits_mode", [False, True])
def test_topk_scores(seed, dtype, num_logprobs, logits_mode, check):
    """Ranks, and which tokens are listed; ties are as torch.topk breaks them on both sides.

    Sampled tokens have finite logits: of -inf vLLM's kernel counts the padding of its last block too.
    """
    b = make_batch(seed, 7)
    logits = _finite_rows(b, dtype)
    sampled = logits.isfinite().float().multinomial(1, generator=b.gen)[:, 0]
    check(
        "sample.logprob",
        "_ranks_kernel",
        torch.zeros(b.num_rows, dtype=torch.int64),
        logits,
        logits.stride(0),
        sampled,
        VOCAB,
        grid=(b.num_rows,),
        BLOCK_SIZE=1024,
    )
    result = check_scores(b, logits, num_logprobs, sampled, logits_mode)
    assert result.logprob_token_ids.shape == (b.num_rows, 1 + num_logprobs)


def check_scores(b, logits, num_logprobs, sampled, logits_mode):
    from interpreted_vllm import vllm_module
    from vllm.v1.worker.gpu.sample import logprob

    own = b.ints(0, VOCAB, MAX_REQS, 9)
    num_own = b.ints(0, 3, MAX_REQS) * 3

    class State:
        class token_ids:
            gpu = own

        class num_token_ids:
            gpu = num_own

    results = [
        module.compute_topk_scores(
            logits, num_logprobs, sampled, None, State, b.rows, int(num_own.max()) * with_own, logits_mode
        )
        for with_own in (0, 1)
        for module in (logprob, vllm_module("sample.logprob"))
    ]
    for ours, theirs in (results[:2], results[2:]):
        assert torch.equal(ours.logprob_token_ids, theirs.logprob_token_ids)
        assert torch.equal(ours.selected_token_ranks, theirs.selected_token_ranks)
        torch.testing.assert_close(ours.logprobs, theirs.logprobs, rtol=CLOSE, atol=CLOSE)
    return results[0]


@SEEDS
@pytest.mark.parametrize("rows_per_request", [1, 5])
@pytest.mark.parametrize("max_kept", [3, 400])
def test_sampling_mask(check, seed, rows_per_request, max_kept):
    b = make_batch(seed, drafts=rows_per_request > 1)
    num_sampled = torch.minimum(b.ints(0, rows_per_request + 1, len(b.mapping)), b.cu_logits.diff())
    n = len(b.mapping) * rows_per_request
    logits = b.logits(b.num_rows)
    logits[0, 7] = float("inf")
    check(
        "sample.output",
        "_compact_sampling_mask_kernel",
        logits,
        logits.stride(0),
        logits.stride(1),
        b.cu_logits,
        num_sampled,
        torch.zeros(n, max_kept, dtype=torch.int32),
        max_kept,
        torch.zeros(n, (VOCAB + 7) // 8, dtype=torch.uint8),
        (VOCAB + 7) // 8,
        torch.full((n,), 9, dtype=torch.int32),
        VOCAB,
        max_kept,
        grid=(n,),
        ROWS_PER_REQUEST=rows_per_request,
        BLOCK_SIZE=1024,
    )


@HALF
def test_num_nans(dtype):
    """vLLM's kernel calls CUDA's isnan, which the interpreter does not have: against torch."""
    from vllm.v1.worker.gpu.metrics.logits import get_num_nans

    b = make_batch(0)
    logits = b.logits(20, stride=VOCAB + 3, dtype=dtype)
    logits[4, :7] = float("nan")
    logits[19, VOCAB - 1] = float("nan")
    assert get_num_nans(logits).tolist() == [0] * 4 + [7] + [0] * 14 + [1]


def test_bf16_logits():
    """The interpreter rounds bfloat16 wrongly: against the same values in fp32, which bfloat16 logits become."""
    from vllm.v1.worker.gpu.sample import gumbel, logprob, min_p

    b = make_batch(0)
    logits = b.logits(40, dtype=torch.bfloat16)
    logits[:, 5] = 1
    rows = b.mapping[torch.arange(40) % len(b.mapping)]
    temperature = torch.tensor([0.0, 0.7, 0.0, 2.0, 1.0, 0.3, 1.0])
    arguments = (rows, temperature, torch.arange(MAX_REQS), torch.arange(40), True, False)
    assert torch.equal(gumbel.gumbel_sample(logits, *arguments), gumbel.gumbel_sample(logits.float(), *arguments))
    sampled = torch.arange(40)
    for have, want in zip(*(logprob.compute_topk_scores(x, 3, sampled) for x in (logits, logits.float())), strict=True):
        assert have is want is None or torch.equal(have, want)
    expected = logits.float()
    gumbel.apply_temperature(expected, rows, temperature)
    gumbel.apply_temperature(logits, rows, temperature)
    assert torch.equal(logits, expected.bfloat16())
    expected = logits.float()
    for x in (expected, logits):
        min_p.apply_min_p(x, rows, torch.full((MAX_REQS,), 0.2))
    assert torch.equal(logits, expected.bfloat16())


def _vllm_top_k_top_p(logits, k, p):
    """vLLM's own torch function, which ``install`` has replaced in its module."""
    import importlib.util

    from vllm.v1.sample.ops import topk_topp_sampler

    spec = importlib.util.spec_from_file_location("vllm_topk_topp", topk_topp_sampler.__file__)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.apply_top_k_top_p_pytorch(logits, k, p, allow_cpu_sync=True)


@pytest.mark.parametrize("seed", range(9))
@pytest.mark.parametrize("with_k", [False, True])
@pytest.mark.parametrize("scale", [0.3, 1.0, 5.0])
def test_top_p(seed, with_k, scale):
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    gen = torch.Generator().manual_seed(seed)
    vocab = (7, VOCAB, 20_000)[seed % 3]
    logits = torch.randn(20, vocab, generator=gen) * scale
    logits[4, 1:] = float("-inf")
    logits[5, ::2] = float("-inf")
    logits[6, 3] = 90
    p = torch.rand(20, generator=gen)
    p[:3] = torch.tensor([1.0, 1e-6, 0.999])
    k = torch.randint(1, vocab + 1, (20,), generator=gen, dtype=torch.int32)
    k[0] = vocab
    arguments = lambda: (logits.clone(), k.clone() if with_k else None, p)  # noqa: E731
    ours, theirs = apply_top_k_top_p(*arguments()), _vllm_top_k_top_p(*arguments())
    # A sum that rounds otherwise may move the border by a token: none does here.
    assert torch.equal(ours, theirs)


def test_top_p_of_equal_logits():
    from vllm.v1.sample.ops.topk_topp_sampler import apply_top_k_top_p

    kept = apply_top_k_top_p(torch.zeros(2, 100), None, torch.tensor([0.105, 1.0]))
    assert kept.isfinite().sum(1).tolist() == [11, 100]
    assert kept[0, -11:].eq(0).all()
    strided = torch.randn(3, 105)[:, :100]
    expected = apply_top_k_top_p(strided.clone(), None, torch.full((3,), 0.5))
    assert torch.equal(apply_top_k_top_p(strided, None, torch.full((3,), 0.5)), expected)
    assert torch.equal(strided, expected)
