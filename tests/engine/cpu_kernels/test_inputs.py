# SPDX-License-Identifier: Apache-2.0
"""Index kernels (block tables, input batches, staged writes) against vLLM's own, interpreted."""

import batches
import pytest
import torch
from batches import MAX_DRAFTS, MAX_LEN, MAX_REQS, VOCAB, make_batch
from interpreted_vllm import vllm_module

SEEDS = pytest.mark.parametrize("seed", range(4))
DTYPES = pytest.mark.parametrize("dtype", [torch.int32, torch.int64])


@SEEDS
@DTYPES
@pytest.mark.parametrize("num_reqs", [1, MAX_REQS])
def test_input_batch(check, seed, dtype, num_reqs):
    b = make_batch(seed, num_reqs, dtype=dtype)
    num_tokens = int(b.query_start[-1])
    input_ids = b.ints(0, VOCAB, num_tokens + 5)
    positions = b.ints(0, 9, num_tokens + 5, dtype=torch.int64)
    seq_lens = b.ints(0, 9, MAX_REQS)
    for lookahead in (1, 3):
        check(
            "input_batch",
            "prepare_prefill_inputs",
            input_ids,
            b.ints(0, 9, lookahead, MAX_REQS),
            b.mapping,
            b.query_start,
            b.all_tokens,
            b.prefill,
            b.computed,
        )
    check("input_batch", "prepare_pos_seq_lens", b.mapping, b.query_start, b.computed, positions, seq_lens)
    lengths = (b.computed[b.mapping] + b.query_start.diff()).int()
    # Of some requests the prompt, or the prompt and a token, just ends here.
    lengths[::3] = b.prefill[b.mapping[::3]] + seed % 3
    last, drafts = (b.ints(0, VOCAB, MAX_REQS, n, dtype=torch.int64) for n in (1, MAX_DRAFTS))
    for num_new in (0, 1):
        check(
            "input_batch",
            "combine_sampled_and_draft_tokens",
            input_ids,
            b.mapping,
            last,
            b.query_start,
            lengths,
            b.prefill,
            drafts[:, : MAX_DRAFTS + num_new],
            b.cu_logits - (0 if num_new else torch.arange(num_reqs + 1, dtype=torch.int32)),
            b.num_rows - (0 if num_new else num_reqs),
            num_new,
        )
    num_sampled = b.ints(0, MAX_DRAFTS + 1, num_reqs)
    check("input_batch", "get_num_sampled_and_rejected", num_sampled, lengths, b.cu_logits, b.mapping, b.prefill)
    check("input_batch", "expand_idx_mapping", b.mapping, b.num_rows, b.cu_logits, MAX_DRAFTS + 1)
    check("input_batch", "post_update_num_computed_tokens", b.mapping, b.computed, b.query_start)


@SEEDS
@pytest.mark.parametrize("has_counts", [False, True])
@pytest.mark.parametrize("has_query", [False, True])
def test_post_update(check, seed, has_counts, has_query):
    b = make_batch(seed)
    b.mapping[seed] = -1
    n = len(b.mapping)
    num_sampled = b.ints(0, MAX_DRAFTS + 1, n)
    # The same token twice in one step counts twice.
    sampled = b.ints(0, 3, n, MAX_DRAFTS + 3, dtype=torch.int64)[:, : MAX_DRAFTS + 1]
    arguments = [
        b.mapping,
        b.computed,
        b.ints(0, VOCAB, MAX_REQS, 1, dtype=torch.int64),
        b.ints(0, 5, MAX_REQS, VOCAB) if has_counts else None,
        sampled,
        num_sampled,
        b.ints(0, 3, n),
        b.query_start if has_query else None,
        b.all_tokens,
        b.computed + 1,
    ]
    check("input_batch", "post_update", *arguments)


def test_post_update_stores_drafts(check):
    """0.33 only: the same launch stores the step's drafts."""
    import inspect

    from vllm.v1.worker.gpu.input_batch import post_update

    if "draft_tokens_out" not in inspect.signature(post_update).parameters:
        pytest.skip(reason="this vLLM stores drafts elsewhere")
    b = make_batch(0)
    n = len(b.mapping)
    check(
        "input_batch",
        "post_update",
        b.mapping,
        b.computed,
        b.ints(0, VOCAB, MAX_REQS, 1, dtype=torch.int64),
        None,
        b.ints(0, VOCAB, n, 2, dtype=torch.int64),
        b.ints(0, 3, n),
        b.ints(0, 3, n),
        b.query_start,
        b.all_tokens,
        b.computed + 1,
        b.ints(0, VOCAB, n, MAX_DRAFTS, dtype=torch.int64),
        b.ints(0, VOCAB, MAX_REQS, MAX_DRAFTS, dtype=torch.int64),
    )


@SEEDS
def test_prompt_logprobs_token_ids(check, seed):
    b = make_batch(seed)
    arguments = (int(b.query_start[-1]), b.query_start, b.mapping, b.computed, b.all_tokens)
    check("sample.prompt_logprob", "get_prompt_logprobs_token_ids", *arguments)


@SEEDS
def test_draft_rows(check, seed):
    b = make_batch(seed)
    rows = torch.cat([torch.arange(e - n, e) for e, n in zip(b.query_start[1:], b.cu_logits.diff(), strict=True)])
    num_tokens = int(b.query_start[-1])
    check(
        "spec_decode.rejection_sampler",
        "gather_draft_sampled",
        b.ints(0, VOCAB, num_tokens),
        b.ints(0, 50, num_tokens, dtype=torch.int64),
        rows,
        b.rows,
        b.local_pos,
        b.prefill,
    )
    sampled = b.ints(0, VOCAB, len(b.mapping), MAX_DRAFTS + 1, dtype=torch.int64)
    num_sampled = torch.minimum(b.ints(0, MAX_DRAFTS + 2, len(b.mapping)), b.cu_logits.diff())
    check(
        "spec_decode.rejection_sampler",
        "_flatten_sampled_kernel",
        torch.zeros(b.num_rows, dtype=torch.int64),
        sampled,
        sampled.stride(0),
        num_sampled,
        b.cu_logits,
        grid=(len(b.mapping),),
        num_warps=1,
    )


def _tables(b: batches.Batch, num_groups: int):
    """Tables of several widths, and what vLLM passes of them: addresses and strides."""
    widths = [2 + 3 * g for g in range(num_groups)]
    sources = [b.ints(1, 900, MAX_REQS, w) for w in widths]
    num_blocks = torch.stack([b.ints(0, w + 1, MAX_REQS) for w in widths])
    return sources, num_blocks, torch.tensor(widths)


def _pointers(tensors: list[torch.Tensor]) -> torch.Tensor:
    return torch.tensor([t.data_ptr() for t in tensors], dtype=torch.uint64)


@SEEDS
@pytest.mark.parametrize("num_groups", [1, 3])
def test_gather_block_tables(seed, num_groups):
    import inspect

    from vllm.v1.worker.gpu import block_table

    has_window = "sliding_window_reach" in inspect.signature(block_table.BlockTables.__init__).parameters
    b = make_batch(seed)
    sources, num_blocks, strides = _tables(b, num_groups)
    padded = len(b.mapping) + seed % 3
    for masked in (False, True) if has_window else (False,):
        results = []
        for module in (block_table, vllm_module("block_table")):
            outs = [torch.full_like(t, 77) for t in sources]
            window = ()
            if has_window:
                # 0.33
                window = (b.computed, torch.tensor([8, 0, 3], dtype=torch.int32), torch.full((3,), 4).int())
            module._gather_block_tables_kernel[(num_groups, padded)](
                b.mapping,
                _pointers(sources),
                _pointers(outs),
                strides,
                num_blocks,
                num_blocks.stride(0),
                len(b.mapping),
                *window,
                **({"MASK_SLIDING_WINDOW": masked} if has_window else {}),
                BLOCK_SIZE=1024,
            )
            results.append(outs)
        for have, want in zip(*results, strict=True):
            assert torch.equal(have, want)


@SEEDS
@pytest.mark.parametrize("num_groups", [1, 3])
def test_slot_mappings(check, seed, num_groups):
    b = make_batch(seed)
    b.mapping[0] = -1
    block_sizes = torch.tensor([16, 64, 5][:num_groups], dtype=torch.int32)
    tables = [b.ints(0, 900, MAX_REQS, MAX_LEN // int(size) + 1) for size in block_sizes]
    enabled = torch.tensor([True, False, True][:num_groups])
    num_tokens = int(b.query_start[-1])
    slots = torch.zeros(num_groups, num_tokens + 9, dtype=torch.int64)
    check(
        "block_table",
        "_compute_slot_mappings_kernel",
        slots.shape[1],
        b.mapping,
        b.query_start,
        b.ints(0, MAX_LEN, num_tokens, dtype=torch.int64),
        _pointers(tables),
        torch.tensor([t.stride(0) for t in tables]),
        block_sizes,
        enabled,
        torch.ones_like(enabled),
        slots,
        slots.stride(0),
        0,
        grid=(num_groups, len(b.mapping) + 1),
        CP_SIZE=1,
        CP_INTERLEAVE=1,
        PAD_ID=-1,
        TRITON_BLOCK_SIZE=1024,
    )


def _writes(b: batches.Batch, num_writes: int, width: int):
    lengths = b.ints(0, width, num_writes)
    starts = b.ints(0, width, num_writes).minimum(width - lengths)
    return b.ints(0, MAX_REQS, num_writes), starts, lengths.cumsum(0).int()


@SEEDS
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.float32])
@pytest.mark.parametrize("width", [1, 1500])
def test_apply_write(check, seed, dtype, width):
    """Later writes win, in vLLM by chance of the schedule: here rows differ."""
    b = make_batch(seed)
    rows, starts, ends = _writes(b, MAX_REQS, width)
    rows = torch.randperm(MAX_REQS, generator=b.gen).int()
    out = torch.zeros(MAX_REQS, width, dtype=dtype)
    contents = b.ints(0, 99, int(ends[-1]) + 1).to(dtype)
    arguments = (out, out.stride(0), rows, starts, contents, ends, None)
    check("buffer_utils", "_apply_write_kernel", *arguments, grid=(MAX_REQS, 2), BLOCK_SIZE=1024, MULTI_GROUP=False)


@SEEDS
def test_apply_write_to_groups(seed):
    from vllm.v1.worker.gpu import buffer_utils

    b = make_batch(seed)
    rows, starts, ends = _writes(b, MAX_REQS, 6)
    rows = torch.randperm(MAX_REQS, generator=b.gen).int()
    groups, contents = b.ints(0, 2, MAX_REQS), b.ints(0, 99, int(ends[-1]) + 1)
    results = []
    for module in (buffer_utils, vllm_module("buffer_utils")):
        outs = [torch.zeros(MAX_REQS, width, dtype=torch.int32) for width in (6, 9)]
        strides = torch.tensor([6, 9])
        arguments = (_pointers(outs), strides, rows, starts, contents, ends, groups)
        module._apply_write_kernel[(MAX_REQS, 1)](*arguments, BLOCK_SIZE=1024, MULTI_GROUP=True)
        results.append(outs)
    for have, want in zip(*results, strict=True):
        assert torch.equal(have, want)


@SEEDS
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_prompt_embeds(check, seed, dtype):
    b = make_batch(seed)
    hidden = 37
    embeds = [torch.randn(60, hidden, generator=b.gen).to(dtype) for _ in range(MAX_REQS)]
    masks = [(torch.rand(60, generator=b.gen) < 0.3).to(torch.uint8) for _ in range(MAX_REQS)]
    mask_pointers = _pointers(masks)
    mask_pointers[::2] = 0
    lens = b.ints(0, 61, MAX_REQS)
    check(
        "model_states.prompt_embeds",
        "_apply_prompt_embeds_kernel",
        torch.zeros(int(b.query_start[-1]), hidden, dtype=dtype),
        hidden,
        _pointers(embeds),
        mask_pointers,
        lens,
        b.mapping,
        b.query_start,
        b.computed,
        hidden,
        grid=(len(b.mapping), 1),
        TOKEN_BLOCK=16,
        BLOCK_SIZE=1024,
    )


def test_zero_kv_blocks():
    from vllm.v1.worker import utils

    results = []
    for module in (utils, vllm_module("utils")):
        cache = torch.arange(2 * 6 * 10, dtype=torch.int32).view(2, 6, 10)
        module._zero_kv_blocks_kernel[(2, 2, 1)](
            _pointers([cache[0], cache[1, 0, 1:]]),
            torch.tensor([10, 10]),
            torch.tensor([10, 7]),
            torch.tensor([4, 1]),
            BLOCK_SIZE=16,
        )
        results.append(cache)
    assert torch.equal(*results)
    assert results[0][0, 4].eq(0).all() and results[0][1, 1, 1:8].eq(0).all() and results[0][0, 0].ne(0)[1:].all()
