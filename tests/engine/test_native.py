# SPDX-License-Identifier: Apache-2.0
"""Plain vLLM in an environment made for kvspec is vLLM as it is: without a GPU its native engine, on Model Runner V1.
With the plugin loaded or not, with Triton's interpreter asked for or not, and with the text that kvspec must give."""

import json
import os
import subprocess
import sys

import engine_runner
import pytest
import requests_mix
import torch

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="on a GPU plain vLLM runs Model Runner V2 as well")

SCRIPT = """
import json, os, sys
import engine_runner

with engine_runner.quick_engines():
    if sys.argv[1] == "after-kvspec":
        spec = {"method": "kvspec", "model": engine_runner.HEAD, "num_speculative_tokens": 4, "budget": "fixed"}
        first = engine_runner.make_llm({"speculative_config": spec})
        engine_runner.generate(first, [json.loads(sys.argv[2])])
        engine_runner.close(first)
        del first
    llm = engine_runner.make_llm({"block_size": 32})
outputs = engine_runner.generate(llm, [json.loads(sys.argv[2])])
runner = engine_runner.model_runner(llm)
from vllm.engine.arg_utils import EngineArgs
print("FOUND" + json.dumps({
    "tokens": [samples[0]["token_ids"] for samples in outputs[0]],
    "runner": f"{type(runner).__module__}.{type(runner).__name__}",
    "plugin": hasattr(EngineArgs.create_speculative_config, "kvspec_original"),
}), flush=True)
os._exit(0)
"""


def run(mode: str = "plain", **environment: str) -> dict:
    batch = [requests_mix.greedy_batch()[i] for i in (1, 3, 5)]
    environment = {**os.environ, "PYTHONPATH": engine_runner.python_path(), **environment}
    environment["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode, json.dumps(batch)],
        env=environment, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    (line,) = (
        (line for line in done.stdout.splitlines() if line.startswith("FOUND")) if "FOUND" in done.stdout else [""]
    )
    assert line, (done.stdout + done.stderr)[-4000:]
    return json.loads(line.removeprefix("FOUND"))


@pytest.mark.parametrize(
    ("mode", "environment", "has_plugin"),
    [
        pytest.param("plain", {"TRITON_INTERPRET": "1"}, True, id="interpreter"),
        pytest.param("plain", {"VLLM_PLUGINS": "", "TRITON_INTERPRET": "0"}, False, id="no-plugin"),
        pytest.param("after-kvspec", {"TRITON_INTERPRET": "0"}, True, id="after-kvspec"),
    ],
)
def test_native(mode, environment, has_plugin, reference):
    found = run(mode, **environment)
    assert found["runner"] == "vllm.v1.worker.cpu_model_runner.CPUModelRunner"
    assert found["plugin"] == has_plugin
    # The reference is Model Runner V2's, as everywhere in these tests.
    assert found["tokens"] == [reference["greedy"][i][0]["token_ids"] for i in (1, 3, 5)]


def test_kvspec_without_model_runner_v2_is_refused(make_engine, spec, monkeypatch):
    monkeypatch.setenv("VLLM_USE_V2_MODEL_RUNNER", "0")
    with pytest.raises(ValueError, match="needs vLLM's Model Runner V2; it is off"), make_engine(spec(4)):
        pass
