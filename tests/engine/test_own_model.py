# SPDX-License-Identifier: Apache-2.0
"""A head for a target of one's own: the README's three commands on a target of another architecture and shape."""

import json
import subprocess
import sys

import own_model_target
from engine_runner import PLAIN_ENGINE, generate, spec_counters
from transformers import AutoTokenizer

TARGET_STEPS, HEAD_STEPS = 60, 60


def kvspec(*words: object) -> str:
    """Output of a ``vllm-kvspec`` command; fails with its error output."""
    done = subprocess.run(
        [sys.executable, "-m", "vllm_kvspec.cli", *map(str, words)], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-4000:]
    return done.stdout


def test_prepare_train_eval_serve(tmp_path, make_engine, script, same):
    texts = own_model_target.write_texts(tmp_path)
    target = own_model_target.write_target(tmp_path / "target", texts, TARGET_STEPS)
    rows, head = tmp_path / "rows.jsonl", tmp_path / "head"
    kvspec(
        "prepare", "--target_model", target, "--data_path", texts, "--output", rows, "--num_prompts", 96,
        "--prompt_length", 32, "--max_new_tokens", 48,
    )  # fmt: skip
    kvspec(
        "train", "--target_model", target, "--data_path", rows, "--output_dir", head, "--num_layers", 2,
        "--draft_block_size", 4, "--transition_rank", 16, "--max_steps", HEAD_STEPS,
        "--per_device_train_batch_size", 8, "--anchors_per_sequence", 12, "--learning_rate", 3e-3, "--save_strategy",
        "no",
    )  # fmt: skip
    report = tmp_path / "eval.json"
    kvspec(
        "eval", "--target_model", target, "--draft_model", head, "--data_path", texts, "--num_prompts", 4,
        "--prompt_length", 32, "--max_new_tokens", 40, "--num_nodes", 8, "--temperatures", 0, "--no_bottlenecks",
        "--no_graft", "--output", report,
    )  # fmt: skip
    assert report.exists()

    tokenizer = AutoTokenizer.from_pretrained(target)
    words = [json.loads(line)["text"] for line in texts.read_text().splitlines()[:4]]
    prompts = [tokenizer(text)["input_ids"][20:52] for text in words]
    params = [{"max_tokens": 40, "temperature": t, "seed": i, "ignore_eos": True} for i, t in enumerate((0, 0, 1, 1))]
    batch = [{"prompt": prompt, "params": chosen} for prompt, chosen in zip(prompts, params, strict=True)]
    expected = script({"engine": {"model": str(target), **PLAIN_ENGINE}, "batches": [batch]})["outputs"]
    spec = {"method": "kvspec", "model": str(head), "num_speculative_tokens": 8, "budget": "fixed", "graft": False}
    with make_engine(spec, model=str(target)) as llm:
        same(generate(llm, [batch]), expected, "trained head")
        counters = spec_counters(llm)
    # An untrained head reaches about 1.1 here, this one more than 1.5.
    assert 1 + counters["accepted_tokens"] / counters["drafts"] > 1.3
