# SPDX-License-Identifier: Apache-2.0
"""The example scripts, run as a user runs them, on the tiny target and its head.

TARGET and DRAFT in the environment choose other checkpoints.
"""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
TARGET = os.environ.get("TARGET", str(EXAMPLES / "tiny" / "target"))
DRAFT = os.environ.get("DRAFT", str(EXAMPLES / "tiny" / "draft"))


def load_demo():
    spec = importlib.util.spec_from_file_location("kvspec_demo", EXAMPLES / "demo.py")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


demo = load_demo()


def run_script(*command: str, **environment: str) -> str:
    """Standard output of an example script; fails with its error output."""
    done = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, env={**demo.server_environment(), **environment}
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_requests_of_the_demo_cover_every_combination():
    requests = demo.load_requests(EXAMPLES / "prompts.jsonl", 12)
    assert len(requests) == 12
    assert len({(r.kind, r.stream, r.temperature) for r in requests[:8]}) == 8
    assert len({r.prompt or json.dumps(r.messages) for r in requests}) == 12


def test_requests_of_spec_bench_are_chats_of_every_category(tmp_path):
    rows = [{"category": c, "turns": [f"{c} {i}", "more"]} for c in ("code", "writing") for i in range(5)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    requests = demo.load_requests(tmp_path / "prompts.jsonl", 4)
    assert [request.messages for request in requests] == [
        [{"role": "user", "content": text}] for text in ("code 0", "writing 0", "code 1", "writing 1")
    ]
    assert {request.kind for request in requests} == {"chat"}
    assert [request.source for request in requests] == ["code", "writing"] * 2


def test_metrics_page_is_summed_over_engines():
    page = (
        "# HELP vllm:spec_decode_num_drafts_total x\n"
        'vllm:spec_decode_num_drafts_total{engine="0",model_name="t"} 3.0\n'
        'vllm:spec_decode_num_drafts_total{engine="1",model_name="t"} 4.0\n'
        'vllm:spec_decode_num_accepted_tokens_total{engine="0",model_name="t"} 14.0\n'
        'vllm:spec_decode_num_accepted_tokens_per_pos_total{engine="0",model_name="t",position="0"} 9.0\n'
        'vllm:generation_tokens_created{engine="0",model_name="t"} 1.7e+09\n'
        'vllm:iteration_tokens_total_count{engine="0",model_name="t"} 21.0\n'
    )
    metrics = demo.parse_metrics(page)
    assert metrics == {demo.DRAFTS: 7, demo.ACCEPTED: 14, (demo.ACCEPTED_AT_DEPTH, 1): 9, demo.ENGINE_STEPS: 21}
    assert demo.tau(metrics) == 3.0


def test_answers_without_tokens_are_not_called_identical():
    assert not demo.identical(demo.Reply("", [], 1.0), demo.Reply("", [], 1.0))
    assert not demo.identical(demo.Reply("a", [1], 1.0), demo.Reply("a", [2], 1.0))
    assert demo.identical(demo.Reply("a", [1], 1.0), demo.Reply("a", [1], 2.0))


@pytest.mark.parametrize(
    ("code", "message"),
    [("print('no such model'); raise SystemExit(3)", "status 3"), ("import time; time.sleep(60)", "did not answer")],
    ids=["stops", "hangs"],
)
def test_server_that_does_not_start_is_reported_and_ended(code, message):
    server = demo.Server([sys.executable, "-uc", code], timeout_s=2)
    with pytest.raises(RuntimeError, match=message) as error, server:
        pass
    assert not server.alive()
    if message == "status 3":
        assert "no such model" in str(error.value)


@pytest.fixture(scope="module")
def server():
    """``examples/serve.sh`` with a head of the tiny target, and trees in every step, however slow the machine is."""
    for directory in (TARGET, DRAFT):
        assert Path(directory, "config.json").exists(), f"{directory} is missing: run `make tiny`"
    environment = {"TARGET": TARGET, "DRAFT": DRAFT, "N": "8"}
    spec = {"method": "kvspec", "model": DRAFT, "num_speculative_tokens": 8, "budget": "fixed"}
    # The last one counts.
    flags = ["--per-request-spec-decode-metrics", "detailed", "--speculative-config", json.dumps(spec)]
    command = ["env", *(f"{k}={v}" for k, v in environment.items()), "bash", str(EXAMPLES / "serve.sh"), *flags]
    with demo.Server(command) as running:
        yield running
    assert not running.alive()


@pytest.mark.e2e
@pytest.mark.slow
def test_openai_client(server):
    before = server.metrics()
    printed = run_script(
        str(EXAMPLES / "openai_client.py"), "--base-url", f"{server.url}/v1", "--max-tokens", "12", "--seed", "1"
    )
    assert printed.count("prompt tokens, ") == 2
    after = server.metrics()
    assert after[demo.GENERATED] > before[demo.GENERATED]
    assert after[demo.DRAFTS] > before[demo.DRAFTS]
    # Fewer near an answer's end.
    assert 0 < after[demo.DRAFT_TOKENS] - before[demo.DRAFT_TOKENS] <= 8 * (after[demo.DRAFTS] - before[demo.DRAFTS])


@pytest.mark.e2e
@pytest.mark.slow
def test_streamed_answer_is_the_same_as_the_whole_one(server):
    (request,) = demo.load_requests(EXAMPLES / "prompts.jsonl", 1)
    whole = demo.send(server.client, request, 12)
    assert len(whole[1]) == 12
    streamed = demo.Request(**{**vars(request), "stream": True})
    assert demo.send(server.client, streamed, 12) == whole


@pytest.mark.e2e
@pytest.mark.slow
def test_acceptance_of_one_answer(server):
    """What the answer says of its steps, what /metrics counts, and its tokens are of one piece."""
    before = server.metrics()
    answer = server.client.completions.create(
        model="target", prompt="def add(a, b):", max_tokens=40, temperature=0, extra_body={"ignore_eos": True}
    )
    found = answer.model_extra["metrics"]["speculative_decoding"]
    accepted, drafted = found["per_step_accepted"], found["per_step_drafted"]
    delta = server.metrics() - before
    assert (delta[demo.DRAFTS], delta[demo.DRAFT_TOKENS], delta[demo.ACCEPTED]) == (
        len(drafted),
        sum(drafted),
        sum(accepted),
    )
    # A step adds what it accepts and one more; the last one may go past the end of the answer.
    beyond = delta[demo.ENGINE_STEPS] + sum(accepted) - 40
    assert 0 <= beyond <= accepted[-1]


@pytest.mark.e2e
@pytest.mark.slow
def test_bench_serve_prints_the_counters(server, tmp_path):
    """The acceptance block of ``vllm bench serve``, against what its requests added to /metrics."""
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps({"prompt": f"def f{i}(x):"}) + "\n" for i in range(3)))
    before = server.metrics()
    printed = run_script(
        *("-m", "vllm.entrypoints.cli.main", "bench", "serve", "--base-url", server.url, "--model", "target"),
        *("--tokenizer", TARGET, "--dataset-name", "custom", "--dataset-path", str(tmp_path / "prompts.jsonl")),
        *("--skip-chat-template", "--num-prompts", "3", "--custom-output-len", "24", "--max-concurrency", "1"),
        *("--temperature", "0", "--ignore-eos", "--save-result", "--result-dir", str(tmp_path)),
        *("--result-filename", "bench.json"),
    )
    delta = server.metrics() - before
    found = json.loads((tmp_path / "bench.json").read_text())
    assert (found["spec_decode_num_drafts"], found["spec_decode_draft_tokens"]) == (
        delta[demo.DRAFTS],
        delta[demo.DRAFT_TOKENS],
    )
    assert found["spec_decode_accepted_tokens"] == delta[demo.ACCEPTED]
    assert found["spec_decode_acceptance_length"] == pytest.approx(demo.tau(delta))
    rates = [delta[demo.ACCEPTED_AT_DEPTH, depth] / delta[demo.DRAFTS] for depth in range(1, 9)]
    assert found["spec_decode_per_position_acceptance_rates"] == pytest.approx(rates)
    assert "Acceptance length:" in printed


@pytest.mark.e2e
@pytest.mark.slow
def test_listed_log_probabilities_over_http(server):
    """At every position those of the tokens that the request lists, beside the chosen one."""
    answer = server.client.completions.create(
        model=server.client.models.list().data[0].id,
        prompt="def add(a, b):",
        max_tokens=10,
        temperature=0,
        logprobs=3,
        extra_body={"logprob_token_ids": [100, 300, 500], "return_tokens_as_token_ids": True},
    )
    (choice,) = answer.choices
    assert len(choice.logprobs.tokens) == len(choice.logprobs.top_logprobs) == 10
    for chosen, listed in zip(choice.logprobs.tokens, choice.logprobs.top_logprobs, strict=True):
        assert listed.keys() == {chosen, "token_id:100", "token_id:300", "token_id:500"}


@pytest.mark.e2e
@pytest.mark.slow
def test_a_server_writes_training_rows(server, tmp_path):
    """Twice the same, and token by token what the server is asked for otherwise. It may draft meanwhile."""
    texts = [{"text": f"def f{i}(x):\n    return x + {i}\n"} for i in range(4)]
    (tmp_path / "texts.jsonl").write_text("".join(json.dumps(text) + "\n" for text in texts))
    written = []
    for name in ("one", "two"):
        run_script(
            *("-m", "vllm_kvspec.cli", "prepare", "--target_model", TARGET, "--data_path", f"{tmp_path}/texts.jsonl"),
            *("--base_url", f"{server.url}/v1", "--output", f"{tmp_path}/{name}.jsonl", "--prompt_length", "6"),
            *("--max_new_tokens", "12", "--max_length", "128"),
        )
        written.append([json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()])
    assert written[0] == written[1]
    assert len(written[0]) == 4
    assert json.loads((tmp_path / "one.jsonl.json").read_text())["settings"]["regenerate"] == "server"
    for row in written[0]:
        assert row["loss_mask"] == [0] * 6 + [1] * (len(row["input_ids"]) - 6)
    greedy = [row for row in written[0] if row["temperature"] == 0]
    answer = server.client.completions.create(
        model=server.client.models.list().data[0].id,
        prompt=greedy[0]["input_ids"][:6],
        max_tokens=12,
        temperature=0,
        extra_body={"return_token_ids": True},
    )
    assert answer.choices[0].token_ids == greedy[0]["input_ids"][6:]


@pytest.mark.e2e
@pytest.mark.slow
def test_offline_generate_with_and_without_speculation():
    script, common = (
        str(EXAMPLES / "offline_generate.py"),
        # On CPU, vLLM without speculation samples with other noise: greedy.
        ["--max-tokens", "16"],
    )
    # In one process: starts faster, and nothing here needs another.
    environment = {"VLLM_ENABLE_V1_MULTIPROCESSING": "0"}
    plain = run_script(script, "--no-spec", "--target", TARGET, *common, **environment)
    kvspec = run_script(
        script, "--target", TARGET, "--draft", DRAFT, "--num-speculative-tokens", "8", *common, **environment
    )
    texts = [[line for line in out.splitlines() if line.startswith('{"prompt"')] for out in (plain, kvspec)]
    assert len(texts[0]) == 3
    assert texts[0] == texts[1]
    assert "tau " in kvspec and "tau " not in plain
