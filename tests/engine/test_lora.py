# SPDX-License-Identifier: Apache-2.0
"""LoRA adapters on the target: each request's text is what plain vLLM answers with the same adapter."""

import json
from pathlib import Path

import pytest
import torch
from engine_runner import PLAIN_ENGINE, TARGET, generate, run_script, spec_counters
from requests_mix import prompt
from safetensors.torch import save_file

RANK = 4
# vLLM 0.32's CPU kernels give a row without adapter that of the last slot, which therefore stays empty while there is
# such a row.
LORA = {
    "enable_lora": True,
    "max_loras": 3,
    "max_lora_rank": 8,
    "max_cpu_loras": 4,
    "lora_dtype": "bfloat16",
    # All but down_proj.
    "lora_target_modules": ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "lm_head"],
}
PARAMS = (
    {"temperature": 0.0, "logprobs": 2},
    {"temperature": 1.0, "top_p": 0.95, "seed": 5},
    {"temperature": 0.0, "repetition_penalty": 1.2},
)


def write_adapter(directory: Path, seed: int) -> str:
    """An adapter of every projection and of the LM head, in PEFT's format, strong enough to change the text."""
    config = json.loads(Path(TARGET, "config.json").read_text())
    hidden, inner = config["hidden_size"], config["intermediate_size"]
    q, kv = (config[f"num_{kind}_heads"] * config["head_dim"] for kind in ("attention", "key_value"))
    # Inputs and outputs.
    shapes = {f"self_attn.{name}_proj": (hidden, kv) for name in "kv"}
    shapes |= {"self_attn.q_proj": (hidden, q), "self_attn.o_proj": (q, hidden)}
    shapes |= {f"mlp.{name}_proj": (hidden, inner) for name in ("gate", "up")} | {"mlp.down_proj": (inner, hidden)}
    modules = {
        f"model.layers.{i}.{name}": shape for i in range(config["num_hidden_layers"]) for name, shape in shapes.items()
    }
    modules["lm_head"] = (hidden, config["vocab_size"])
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, (inputs, outputs) in modules.items():
        a, b = ((RANK, inputs), inputs**-0.5), ((outputs, RANK), 0.1)
        for part, (size, scale) in (("A", a), ("B", b)):
            weights[f"base_model.model.{name}.lora_{part}.weight"] = scale * torch.randn(size, generator=generator)
    directory.mkdir()
    save_file(weights, directory / "adapter_model.safetensors")
    described = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "bias": "none", "base_model_name_or_path": TARGET}
    described["target_modules"] = sorted({name.split(".")[-1] for name in modules})
    (directory / "adapter_config.json").write_text(json.dumps(described))
    return str(directory)


def adapter(directory: Path, i: int) -> list:
    return [f"adapter-{i}", i, write_adapter(directory / f"adapter-{i}", i)]


def mixed_batch(tmp_path: Path) -> list[dict]:
    """Without adapter, with one and with another, each greedy, sampled and as a chain, in one batch."""
    adapters = [None, *(adapter(tmp_path, i) for i in (1, 2))]
    return [
        {"prompt": prompt(30 + 10 * k, 200 * k), "params": {"max_tokens": 24, **params}, "adapter": adapter}
        for k, params in enumerate(PARAMS)
        for adapter in adapters
    ]


@pytest.fixture(scope="module")
def answered(tmp_path_factory) -> tuple[list, list]:
    """Batches, and what plain vLLM answers."""
    directory = tmp_path_factory.mktemp("adapters")
    batch = mixed_batch(directory)
    alone = [[request] for request in batch[:3]]
    # Four adapters on three slots: one has to give its slot away, and the first comes back.
    more = [[batch[1] | {"adapter": adapter(directory, i)}] for i in (3, 4)] + [[batch[1]]]
    batches = [batch, *alone, *more]
    return batches, run_script({"engine": PLAIN_ENGINE | LORA, "batches": batches}, directory)["outputs"]


def test_adapters(make_engine, spec, same, answered):
    batches, expected = answered
    with make_engine(spec(8), **LORA) as llm:
        same(generate(llm, batches), expected)
        assert spec_counters(llm)["accepted_tokens"] > 0
        # All are in memory, as max_cpu_loras allows.
        assert llm.llm_engine.list_loras() == {1, 2, 3, 4}
    # The adapters matter: one prompt, five texts.
    texts = [samples[0]["token_ids"] for samples in (*expected[0][:3], *(outputs[0] for outputs in expected[4:6]))]
    assert len({str(text) for text in texts}) == 5


@pytest.mark.once
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_ranks_with_half_of_each_adapter(spec, script, same, answered):
    batches, expected = answered
    engine = LORA | {"tensor_parallel_size": 2, "fully_sharded_loras": True, "kv_cache_memory_bytes": 32 << 20}
    result = script({"engine": engine | {"speculative_config": spec(8)}, "batches": batches[:1]}, multiprocessing=True)
    same(result["outputs"], expected[:1])
    assert result["counters"]["accepted_tokens"] > 0
