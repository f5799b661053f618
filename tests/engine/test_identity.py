# SPDX-License-Identifier: Apache-2.0
"""Output with kvspec equals plain decoding's: token ids, text and log-probabilities, on the real engine.

Each test starts an engine in this process and sends the same requests that the plain reference answered. What an engine
option changes (scheduling, cache pressure, tree shape) must not show in the output.
"""

from concurrent.futures import ThreadPoolExecutor

import pytest
import requests_mix
import torch
from engine_runner import PLAIN_ENGINE, generate, run_script, spec_counters
from requests_mix import ALL, BATCHES, CORE
from vllm.utils.network_utils import get_open_port

ONCE = {"marks": pytest.mark.once}


@pytest.mark.parametrize(
    ("keys", "names"),
    [
        pytest.param({"num_speculative_tokens": 8}, ALL, id="head-tree"),
        pytest.param(
            {"draft_noise": "none", "num_speculative_tokens": 32, "tree_width": 6}, CORE, id="head-uncoupled", **ONCE
        ),
        pytest.param({"tree": "chain", "num_speculative_tokens": 6}, CORE, id="head-chain", **ONCE),
        pytest.param(
            {"tree": [3, 1, 1], "num_speculative_tokens": 9}, (*CORE, "mixed"), id="head-fixed-widths", **ONCE
        ),
        pytest.param({"drafter": "random", "num_speculative_tokens": 12}, CORE, id="random-trees", **ONCE),
    ],
)
def test_every_feature(check, make_engine, spec, keys, names):
    with make_engine(spec(**keys)) as llm:
        check(llm, names)
        counters = spec_counters(llm)
    assert counters["drafts"] > 0
    # Otherwise nothing but the root was ever verified.
    assert counters["accepted_tokens"] > 0


def test_oracle_trees(oracle_file, make_engine, spec, check):
    """Right tokens on side branches: long, non-trivial accepted paths."""
    with make_engine(spec(14, drafter="oracle", oracle_file=oracle_file)) as llm:
        check(llm, ALL)
        counters = spec_counters(llm)
    assert counters["accepted_tokens"] / counters["drafts"] > 1.0


@pytest.mark.once
def test_triton_kernels(spec, script, reference):
    """The same engine on the Triton kernels, interpreted, instead of those compiled for the CPU: the head's and, by its
    grafts, those that draft without one. Few tokens: what a kernel computes has tests of its own."""
    batch, expected = BATCHES["logprobs"]()[:2], reference["logprobs"][:2]
    for one in batch:
        one["params"]["max_tokens"] = 6
    result = script({"engine": {"speculative_config": spec(6)}, "batches": [batch], "kernels": "triton"})
    assert result["kernels"] == "triton"
    found = [sample["token_ids"] for (sample,) in result["outputs"][0]]
    assert found == [sample["token_ids"][:6] for (sample,) in expected]


@pytest.mark.parametrize("drafter", [pytest.param("head", **ONCE), "oracle"])
def test_chunked_prefill(oracle_file, make_engine, spec, check, drafter):
    """A budget smaller than most prompts: prompt tails, decode rows and trimmed trees share steps."""
    keys = {"drafter": drafter, "oracle_file": oracle_file if drafter == "oracle" else None}
    with make_engine(spec(8, **keys), max_num_batched_tokens=48, max_num_seqs=5, enable_chunked_prefill=True) as llm:
        check(llm, (*CORE, "mixed") if drafter == "oracle" else CORE)


@pytest.mark.parametrize("drafter", ["head", pytest.param("oracle", **ONCE)])
def test_preemption(oracle_file, make_engine, spec, check, drafter):
    """22 blocks of 16 for up to 8 requests: some are dropped and prefilled again."""
    keys = {"drafter": drafter, "oracle_file": oracle_file if drafter == "oracle" else None}
    with make_engine(spec(8, **keys), num_gpu_blocks_override=22) as llm:
        check(llm, CORE)
        preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    assert preemptions > 0


def test_dynamic_number_of_nodes(make_engine, spec, check):
    """vLLM's own schedule: 8 nodes for up to 3 requests, the first 5 of them for more."""
    keys = {"num_speculative_tokens_per_batch_size": [(1, 3, 8), (4, 8, 5)]}
    with make_engine(spec(8, **keys)) as llm:
        check(llm, CORE)


def test_prefix_cache_second_turn(make_engine, spec, same, reference):
    """The second turn's prompt ends in blocks that tree decoding wrote.

    Its greedy texts keep 0.02 between the two best logits: with a tail from 1700 on, one has a step of 2e-6, which
    float32 decides by how many rows are computed together.
    """
    first = requests_mix.greedy_batch()
    turns = [
        {
            "prompt": request["prompt"] + outputs[0]["token_ids"] + requests_mix.prompt(5, 1710),
            "params": request["params"],
        }
        for request, outputs in zip(first, reference["greedy"], strict=True)
    ]
    with make_engine(None, **PLAIN_ENGINE) as llm:
        expected = generate(llm, [turns])
    with make_engine(spec()) as llm:
        same(generate(llm, [first]), [reference["greedy"]])
        before = _prefix_hits(llm)
        found = generate(llm, [turns])
        hits = _prefix_hits(llm) - before
    same(found, expected)
    assert hits > 0


def _prefix_hits(llm) -> int:
    return sum(m.value for m in llm.get_metrics() if m.name == "vllm:prefix_cache_hits")


def test_abort_in_the_middle(reference, make_engine, spec):
    """Aborting one request leaves the others' text alone, and its row to a newcomer."""
    from engine_runner import sampling_params

    batch = requests_mix.greedy_batch()
    with make_engine(spec()) as llm:
        engine = llm.llm_engine
        for i, request in enumerate(batch):
            engine.add_request(str(i), {"prompt_token_ids": request["prompt"]}, sampling_params(request["params"]))
        for _ in range(4):
            engine.step()
        engine.abort_request(["3"])
        newcomer = batch[3]
        engine.add_request("new", {"prompt_token_ids": newcomer["prompt"]}, sampling_params(newcomer["params"]))
        done = {}
        while engine.has_unfinished_requests():
            for output in engine.step():
                if output.finished:
                    done[output.request_id.split("-")[0]] = list(output.outputs[0].token_ids)
    expected = {str(i): samples[0]["token_ids"] for i, samples in enumerate(reference["greedy"]) if i != 3}
    expected["new"] = reference["greedy"][3][0]["token_ids"]
    assert {k: v for k, v in done.items() if k in expected} == expected


def test_async_scheduling(reference, oracle_file, spec, script, same):
    """The scheduler runs a step ahead, as on a server in a process of its own; drafts never leave the device."""
    keys = {"drafter": "oracle", "oracle_file": oracle_file}
    batches = [BATCHES[name]() for name in CORE]
    job = {"engine": {"speculative_config": spec(8, **keys)}, "batches": batches, "async_scheduling": True}
    result = script(job, multiprocessing=True)
    assert result["async_scheduling"] is True
    same(result["outputs"], [reference[name] for name in CORE])


def test_tensor_parallel(reference, spec, script, same):
    """Two ranks over gloo, each with half of the heads and of the KV. Both grow the same trees, grafts from tables of
    their own among them, and time the same steps at start: one that timed a batch more would wait for the other
    forever."""
    names = ("greedy", "sampled", "greedy")
    ranks = {"tensor_parallel_size": 2, "distributed_executor_backend": "mp", "kv_cache_memory_bytes": 32 << 20}
    job = {"engine": {"speculative_config": spec(8, budget="auto"), **ranks}}
    # In a process of its own, which is ended when ranks wait.
    result = script(job | {"batches": [BATCHES[name]() for name in names]})
    same(result["outputs"], [reference[name] for name in names])
    assert result["counters"]["accepted_tokens"] > 0


@pytest.mark.once
@pytest.mark.skipif(torch.cuda.is_available() and torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_data_parallel(reference, spec, same, tmp_path):
    """Two ranks, started as torchrun would, that agree on the shape of every step. The second one's requests end early;
    it then goes along with steps of none."""
    port, names = str(get_open_port()), ("greedy", "logprobs")

    def run(rank: int) -> dict:
        (tmp_path / str(rank)).mkdir()
        job = {
            "engine": {
                # "auto" becomes "fixed".
                "speculative_config": spec(8, budget="auto"),
                "data_parallel_size": 2,
                "distributed_executor_backend": "external_launcher",
                "kv_cache_memory_bytes": 32 << 20,
            },
            "batches": [BATCHES[names[rank]]()],
        }
        launched = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
        return run_script(
            job, tmp_path / str(rank), environment=launched | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        )

    with ThreadPoolExecutor(2) as pool:
        results = list(pool.map(run, (0, 1)))
    for result, name in zip(results, names, strict=True):
        same(result["outputs"], [reference[name]])
        assert result["counters"]["accepted_tokens"] > 0
