# SPDX-License-Identifier: Apache-2.0
"""``vllm-kvspec prepare`` with the real engine: rows are the target's own text, and an interruption leaves no trace."""

import json

import pytest
import torch
from engine_runner import TARGET, close, quick_engines
from transformers import AutoModelForCausalLM, AutoTokenizer

from vllm_kvspec import prepare as prepare_module
from vllm_kvspec.cli import main
from vllm_kvspec.train.data import load_rows

# Everything else as the command chooses it.
ENGINE = {"dtype": "float32"} | ({"kv_cache_memory_bytes": 32 << 20} if torch.cuda.is_available() else {})
TEXTS = [
    {"text": "import os\nimport sys\n\n\ndef main(argv):\n    for name in argv:\n        print(name)\n"},
    {"messages": [{"role": "user", "content": "What does copy.copy(x) do?"}]},
    {
        "conversations": [
            {"from": "human", "value": "What does glob.glob(path) do?"},
            {"from": "gpt", "value": "It lists files."},
            {"from": "human", "value": "And iglob?"},
        ]
    },
]


@pytest.fixture
def prepare(tmp_path, monkeypatch):
    """The command; ``interrupt_after``: batches before it is interrupted; ``engine_args`` beside ``ENGINE``.

    Engines are shut down at the end.
    """
    from vllm import LLM

    engines = []

    class RecordedLLM(LLM):
        def __init__(self, *args, **kwargs):
            super().__init__(*args, **kwargs)
            engines.append(self)

    def shut_down():
        while engines:
            close(engines.pop())

    monkeypatch.setattr("vllm.LLM", RecordedLLM)
    make_writer = prepare_module.engine_writer
    data = tmp_path / "texts.jsonl"

    def run(name: str, interrupt_after: int | None = None, texts: list[dict] = TEXTS, batch_size=1, **engine_args):
        data.write_text("".join(json.dumps(text) + "\n" for text in texts))

        def interrupted_writer(*args):
            write, batches = make_writer(*args), []

            def interrupted(requests):
                batches.append(requests)
                if len(batches) == interrupt_after:
                    raise KeyboardInterrupt
                return write(requests)

            return interrupted

        monkeypatch.setattr(prepare_module, "engine_writer", interrupted_writer)
        output = tmp_path / name
        arguments = f"--target_model {TARGET} --data_path {data} --output {output} --prompt_length 12"
        try:
            main(
                ["prepare", *arguments.split(), "--max_new_tokens", "8", "--max_length", "256"]
                + ["--temperatures", "0", "1", "--batch_size", str(batch_size)]
                + ["--engine_args", json.dumps(ENGINE | engine_args)]
            )
        finally:
            shut_down()
        return output

    with quick_engines():
        yield run


def test_rows_are_the_targets_own_and_survive_an_interruption(prepare):
    whole = prepare("whole.jsonl")
    with pytest.raises(SystemExit):
        prepare("rows.jsonl", interrupt_after=3)
    rows_file = prepare("rows.jsonl")
    assert rows_file.read_bytes() == whole.read_bytes()

    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    target = AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval()
    rows = [json.loads(line) for line in whole.read_text().splitlines()]
    assert [row["temperature"] for row in rows][:2] == [0.0, 1.0] and len(rows) >= 3
    assert tokenizer.decode(rows[0]["input_ids"]).startswith(("import", "\n", "def", "    "))
    asked = tokenizer.apply_chat_template(TEXTS[1]["messages"], add_generation_prompt=True, return_dict=False)
    assert rows[1]["input_ids"][: len(asked)] == asked
    for row in rows:
        own = [i for i, mask in enumerate(row["loss_mask"]) if mask]
        assert 0 < len(own) <= 24
        if row["temperature"] == 0:
            with torch.no_grad():
                said = target(torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
            assert [row["input_ids"][i] for i in own] == [said[i - 1] for i in own]
    assert len(load_rows([str(whole)], 4)) > 0


def test_sampled_prompts_that_fill_more_than_one_step_are_written(prepare):
    """Cut into chunks, the prompts of seeded requests end vLLM's CPU engine."""
    rows_file = prepare("rows.jsonl", texts=[TEXTS[0]] * 30, batch_size=30, max_num_batched_tokens=256)
    assert len(rows_file.read_text().splitlines()) == 30
