# SPDX-License-Identifier: Apache-2.0
"""The KV cache after tree decoding: none of it is ours, and the target's part is what plain decoding leaves."""

import contextlib
from types import SimpleNamespace

import pytest
import requests_mix
import torch
from engine_runner import TARGET, generate, model_runner
from transformers import AutoModelForCausalLM
from vllm.v1.attention.backends.triton_attn import TritonAttentionBackend, TritonAttentionMetadataBuilder

from vllm_kvspec.engine.runner import check_backend
from vllm_kvspec.engine.target_kv import layers_by_index, split_kv
from vllm_kvspec.engine.verify.attention_cpu import CPUTreeMetadataBuilder

# fp32, eight layers, another order of summation.
TOLERANCE = 2e-4
# One layer as the model is, the others half as wide; vLLM's own attention on a CPU misreads such a cache.
TWO_DTYPES = {"kv_cache_dtype": "bfloat16", "kv_cache_dtype_skip_layers": ["1"]}


def test_no_layer_of_ours(make_engine, spec):
    """Every cached layer is the target's: the room for context is that of a server without speculation."""
    with make_engine(spec()) as llm:
        runner = model_runner(llm)
        names = [name for group in runner.kv_cache_config.kv_cache_groups for name in group.layer_names]
        num_layers = llm.llm_engine.model_config.hf_config.num_hidden_layers
        assert sorted(names) == sorted(f"model.layers.{i}.self_attn.attn" for i in range(num_layers))
        assert runner.speculator.draft_attn_layer_names == set()


@pytest.mark.parametrize(
    ("flags", "tolerance"),
    [({}, TOLERANCE), pytest.param(TWO_DTYPES, 0.05, marks=[pytest.mark.once, pytest.mark.cpu])],
    ids=["one dtype", "two dtypes"],
)
def test_equals_a_plain_forward(reference, oracle_file, make_engine, spec, flags, tolerance):
    """K and V of every layer against transformers' own forward over prompt and output, after trees with long paths."""
    request = requests_mix.greedy_batch()[6]
    with make_engine(spec(14, drafter="oracle", oracle_file=oracle_file), **flags) as llm:
        tokens = request["prompt"] + generate(llm, [[request]])[0][0][0]["token_ids"]
        runner = model_runner(llm)
        # The last sampled token was never an input, so it has no KV.
        length = len(tokens) - 1
        context = runner.compilation_config.static_forward_context
        layers = layers_by_index(runner.kv_cache_config)
        # The only request so far: its blocks are still listed in the row it had.
        row = next(r for r in range(runner.max_num_reqs) if runner.block_tables.num_blocks.np[0, r] > 0)
        blocks = runner.block_tables.block_tables[0].gpu[row].long()
        found = []
        for i in sorted(layers):
            caches = split_kv(context[layers[i][0]].kv_cache, context[layers[i][0]].head_size)
            block_size = caches[0].shape[1]
            needed = blocks[: -(-length // block_size)]
            found.append([cache[needed].flatten(0, 1)[:length].clone() for cache in caches])

    with torch.no_grad():
        model = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32)
        past = model(torch.tensor([tokens[:-1]]), use_cache=True).past_key_values
    assert tokens[len(request["prompt"]) :] == reference["greedy"][6][0]["token_ids"]
    dtypes = [k.dtype for k, _ in found]
    assert dtypes == [torch.bfloat16 if flags and i != 1 else torch.float32 for i in range(len(found))]
    close = {"atol": tolerance, "rtol": tolerance, "check_dtype": False}
    for (k, v), layer in zip(found, past.layers, strict=True):
        torch.testing.assert_close(k, layer.keys[0].transpose(0, 1), **close)
        torch.testing.assert_close(v, layer.values[0].transpose(0, 1), **close)


@pytest.mark.parametrize(
    ("builder", "kernel_block_size", "sentence"),
    [
        (CPUTreeMetadataBuilder, None, None),
        (TritonAttentionMetadataBuilder, None, "has TritonAttentionBackend"),
        (CPUTreeMetadataBuilder, 128, "Pass --block-size 128"),
    ],
)
def test_layers_of_another_backend_are_refused(builder, kernel_block_size, sentence):
    """They would take tree rows for a chain, or number their blocks otherwise than the head does."""
    group = SimpleNamespace(
        metadata_builders=[object.__new__(builder)],
        layer_names=["model.layers.0"],
        backend=TritonAttentionBackend,
        kernel_block_size=kernel_block_size,
        kv_cache_spec=SimpleNamespace(block_size=256),
    )
    with pytest.raises(ValueError, match=sentence) if sentence else contextlib.nullcontext():
        check_backend(group)
