# SPDX-License-Identifier: Apache-2.0
"""What kvspec's configuration comes to on a GPU, found out on a faked one: backends, CUDA graphs, and which batch gets
which graph."""

import json
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
from engine_runner import HEAD
from gemma4_pairs import write_assistant, write_target

from vllm_kvspec.engine.batch_sizes import FREE_ROWS, PADDING, PADDING_BEYOND, graph_batches

SCRIPT = Path(__file__).parent / "faked_gpu.py"


def kvspec(nodes: int, **keys) -> dict:
    return {"speculative_config": {"method": "kvspec", "model": HEAD, "num_speculative_tokens": nodes, **keys}}


# Name -> engine arguments.
ENGINES = {
    "plain": {},
    "default": kvspec(16),
    "plain, one sequence": {"max_num_seqs": 1},
    "one sequence": {"max_num_seqs": 1, **kvspec(16)},
    "few sequences": {"max_num_seqs": 6, **kvspec(6)},
    "largest trees": {"max_num_seqs": 256, **kvspec(63, tree_width=8)},
    "fixed": {"max_num_seqs": 64, **kvspec(16, budget="fixed")},
    "own schedule": {"max_num_seqs": 64, **kvspec(16, num_speculative_tokens_per_batch_size=[(1, 8, 16), (9, 64, 3)])},
    "no graphs": {"enforce_eager": True, **kvspec(16)},
    "no head": kvspec(16, model=None),
    # With LoRA vLLM wants room for every sequence's drafts.
    "adapters": {"max_num_seqs": 64, "enable_lora": True, "max_loras": 2, **kvspec(16)},
    "counted adapters": {
        "max_num_seqs": 64, "enable_lora": True, "max_loras": 5, "specialize_active_lora": True, **kvspec(16),
    },
    # Flags that say which sizes are captured.
    "own sizes": {"cudagraph_capture_sizes": [1, 3, 20, 40, 90], **kvspec(16)},
    "few rows": {"max_cudagraph_capture_size": 40, **kvspec(16)},
    "interactivity": {"performance_mode": "interactivity", **kvspec(16)},
    "level 3": {"optimization_level": 3, **kvspec(16)},
    "decode graphs": {"compilation_config": {"cudagraph_mode": "FULL_DECODE_ONLY"}, **kvspec(16)},
}  # fmt: skip
# Flags that leave no full graph of the target, so none of the drafter's either.
WITHOUT_FULL_GRAPHS = {
    "pieces": {"compilation_config": {"cudagraph_mode": "PIECEWISE"}, **kvspec(16)},
    "level 1": {"optimization_level": 1, **kvspec(16)},
    "level 0": {"optimization_level": 0, **kvspec(16)},
}
# An assistant on its target, whose heads are of two sizes.
ASSISTANT = "assistant"
# The engines above are on an H100.
OTHER_GPUS = ("H200", "A100", "B200")
FLAGS = {
    "default": {},
    "Triton": {"attention_backend": "TRITON_ATTN"},
    "FP8 cache": {"kv_cache_dtype": "fp8"},
    "long steps": {"max_num_seqs": 512, "max_num_batched_tokens": 32768, "enable_prefix_caching": False},
}
ELSEWHERE = {f"{flags} on {gpu}": {"gpu": gpu, **FLAGS[flags], **kvspec(16)} for gpu in OTHER_GPUS for flags in FLAGS}
ELSEWHERE |= {f"plain on {gpu}": {"gpu": gpu} for gpu in OTHER_GPUS}
REFUSED = "FP8 cache on A100"
AUTO = [name for name in ENGINES if name not in ("fixed", "own schedule", "no graphs") and not name.startswith("plain")]
AUTO += [ASSISTANT, *(name for name in ELSEWHERE if name != REFUSED and not name.startswith("plain"))]


@pytest.fixture(scope="module")
def reports(tmp_path_factory) -> dict[str, dict]:
    target = write_target("small", tmp_path_factory.mktemp("gemma4") / "target")
    assistant = write_assistant(target, Path(target).with_name("assistant"), ordered=True)
    engines = ENGINES | WITHOUT_FULL_GRAPHS | ELSEWHERE | {ASSISTANT: {"model": target, **kvspec(16, model=assistant)}}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), json.dumps(list(engines.values()))],
        env={**os.environ, "TRITON_INTERPRET": "0"},
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return dict(zip(engines, json.loads(done.stdout.splitlines()[-1]), strict=True))


def rows_captured(report: dict) -> Counter:
    """Rows per request -> number of full graphs."""
    return Counter(rows for _, rows in report["full"])


def allowed(batch: int, rows: int) -> float:
    """The largest batch that may stand in for ``batch``."""
    return batch if batch <= 4 else batch * (PADDING if batch * rows <= FREE_ROWS else PADDING_BEYOND) + 1


def test_the_backend_is_our_tree_attention_over_the_gpus_own(reports):
    assert reports["default"]["stock_attention"] == "FLASH_ATTN"
    assert reports["default"]["mode"] == reports["plain"]["mode"] == "FULL_AND_PIECEWISE"


@pytest.mark.parametrize("gpu", OTHER_GPUS)
def test_other_gpus(gpu, reports):
    """FlashAttention where vLLM has it in front, with an FP8 cache where it can read one; else Triton."""
    default, plain = reports[f"default on {gpu}"], reports[f"plain on {gpu}"]
    assert default["stock_attention"] == ("TRITON_ATTN" if gpu == "B200" else "FLASH_ATTN")
    assert reports[f"Triton on {gpu}"]["stock_attention"] == "TRITON_ATTN"
    if gpu != "A100":
        assert reports[f"FP8 cache on {gpu}"]["stock_attention"] == default["stock_attention"]
    assert default["mode"] == plain["mode"] == "FULL_AND_PIECEWISE"
    assert len(default["piecewise"]) == len(plain["piecewise"])
    assert len(default["drafter"]) < 30 and {nodes for _, nodes in default["drafter"]} == {16, 8, 4, 2}


def test_an_fp8_cache_is_refused_where_triton_cannot_read_it(reports):
    assert "--kv-cache-dtype; found fp8" in reports[REFUSED]["refused"]


def test_an_assistant_has_graphs_of_every_width(reports):
    report = reports[ASSISTANT]
    # Heads of two sizes: what vLLM gives such a target.
    assert (report["stock_attention"], report["mode"]) == ("TRITON_ATTN", "FULL_AND_PIECEWISE")
    assert {nodes for _, nodes in report["drafter"]} == {16, 8, 4, 2}


@pytest.mark.parametrize("name", AUTO)
def test_every_choice_has_a_cuda_graph(name, reports):
    """Also plain steps, and also with one sequence. Few rows are padding."""
    report = reports[name]
    for nodes, batches in report["verified"].items():
        assert batches, nodes
        for batch, size in enumerate(batches, start=1):
            assert size is not None, (nodes, batch)
            if nodes != "0":
                assert batch <= size <= allowed(batch, int(nodes) + 1), (nodes, batch)


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("default", "plain"),
        ("one sequence", "plain, one sequence"),
        *((f"default on {gpu}", f"plain on {gpu}") for gpu in OTHER_GPUS),
    ],
)
def test_a_plain_step_is_padded_as_without_kvspec(name, plain, reports):
    assert reports[name]["verified"]["0"] == reports[plain]["verified"]["0"]


@pytest.mark.parametrize("name", AUTO)
def test_the_drafter_has_a_graph_for_every_choice(name, reports):
    report = reports[name]
    for nodes, batches in report["drafted"].items():
        for batch, size in enumerate(batches, start=1):
            assert size is not None and batch <= size <= allowed(batch, 1), (nodes, batch)


def test_a_draft_is_no_wider_than_its_batch_may_use(reports):
    """A graph drafts what the smallest of its batches may get, and no more: 512 rows hold 30 requests of 17 rows."""
    report = reports["default"]
    below = 0
    for batch, nodes in sorted(report["drafter"]):
        fits = [int(size) for size in report["verified"] if (below + 1) * (int(size) + 1) <= report["max_rows"]]
        assert nodes == max(fits), batch
        below = batch
    assert {nodes for _, nodes in report["drafter"]} == {16, 8, 4, 2}


def test_graphs_are_few(reports):
    """vLLM's own list for these five query lengths has 272 full graphs and 72 piecewise ones."""
    plain, ours = reports["plain"], reports["default"]
    assert (len(plain["full"]), len(plain["piecewise"])) == (51, 51)
    assert rows_captured(ours)[1] == 51
    assert rows_captured(ours).total() - 51 < 75
    assert len(ours["piecewise"]) == 51
    assert len(ours["drafter"]) < 22
    assert rows_captured(reports["one sequence"]) == {1: 1, 3: 1, 5: 1, 9: 1, 17: 1}


# Without an adapter and with any number of them; without, with 1, 2, up to 4 and more.
@pytest.mark.parametrize(("name", "cases"), [("adapters", 2), ("counted adapters", 5)])
def test_batches_with_adapters_have_the_same_graphs(name, cases, reports):
    report = reports[name]
    assert len(report["adapted"]) == ENGINES[name]["max_loras"]
    assert all(graphs == report["verified"] for graphs in report["adapted"])
    assert set(Counter(map(tuple, report["full"])).values()) == {cases}


def test_sizes_that_were_asked_for(reports):
    """A plain step is padded to one of them, and the largest bounds a step of trees."""
    sizes = ENGINES["own sizes"]["cudagraph_capture_sizes"]
    verified = reports["own sizes"]["verified"]
    assert verified["0"] == [min(size for size in sizes if size >= batch) for batch in range(1, 91)]
    assert len(verified["16"]) == 90 // 17 and reports["own sizes"]["max_rows"] == 90
    assert len(reports["few rows"]["verified"]["16"]) == 40 // 17 and reports["few rows"]["max_rows"] == 40
    assert reports["interactivity"]["verified"]["0"][:33] == [*range(1, 33), 40]


@pytest.mark.parametrize("name", ["level 3", "decode graphs"])
def test_the_same_full_graphs(name, reports):
    assert all(reports[name][graphs] == reports["default"][graphs] for graphs in ("full", "drafter", "verified"))
    assert bool(reports[name]["piecewise"]) == (name == "level 3")


@pytest.mark.parametrize("name", WITHOUT_FULL_GRAPHS)
def test_no_full_graphs(name, reports):
    """Steps of trees run as prompts do, and drafts without a graph."""
    report = reports[name]
    assert not report["full"] and not report["drafter"]
    graphs = {graph for batches in (*report["verified"].values(), *report["drafted"].values()) for graph in batches}
    # No batch is listed where nothing at all is captured.
    assert graphs == (set() if name == "level 0" else {None})
    assert report["piecewise"] == ([] if name == "level 0" else reports["default"]["piecewise"])


def test_the_largest_graphs_are_captured_first(reports):
    tokens = [batch * rows for batch, rows in reports["default"]["full"]]
    assert tokens == sorted(tokens, reverse=True)
    assert reports["default"]["drafter"] == sorted(reports["default"]["drafter"], reverse=True)


def test_without_the_choice_the_graphs_are_those_that_were_asked_for(reports):
    assert set(rows_captured(reports["fixed"])) == {17}
    assert set(rows_captured(reports["own schedule"])) == {4, 17}
    # With a schedule of the user's, whose batches are not bound by rows, every draft must fill the largest tree.
    assert {nodes for name in ("fixed", "own schedule") for _, nodes in reports[name]["drafter"]} == {16}
    assert not reports["no graphs"]["full"] and not reports["no graphs"]["drafter"]


@pytest.mark.parametrize("rows", [1, 3, 17, 64])
@pytest.mark.parametrize("largest", [1, 5, 30, 170])
def test_padding(largest, rows):
    sizes = graph_batches(largest, rows)
    assert sizes == sorted(sizes) and sizes[0] == 1 and sizes[-1] == largest
    for batch in range(1, largest + 1):
        size = min(size for size in sizes if size >= batch)
        assert size <= allowed(batch, rows), batch
