# SPDX-License-Identifier: Apache-2.0
"""Training rows: the forms texts come in, the loss mask of regenerated chats, interruption, and every refusal.

Most tests put a scripted writer in the target's place, so that what it "says" is known token by token.
"""

import io
import json
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from vllm_kvspec import prepare as prepare_module
from vllm_kvspec.cli import main
from vllm_kvspec.config import tokenizer_sha256
from vllm_kvspec.offline_engine import cpu_dtype
from vllm_kvspec.train.conversations import normalize
from vllm_kvspec.train.data import collate, cut_prompts, load_rows, load_texts
from vllm_kvspec.train.regeneration import Answer, Dialogue, PromptBar, Settings, plan_prompts, regenerate

WORDS = ["<eos>", "<pad>", "<user>", "<assistant>", "<system>", *"abcdefghij"]
END = 0
# Each message is followed by <eos>, which is also what ends an answer: the next prompt begins with all that was said.
TEMPLATE = (
    "{% for m in messages %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endfor %}"
    "{% if add_generation_prompt %}<assistant> {% endif %}"
)
# As templates of reasoning models do: earlier answers are shown without their first word.
FORGETFUL = TEMPLATE.replace(
    "{{ m['content'] }}",
    "{{ m['content'].split(' ', 1)[1] if m['role'] == 'assistant' else m['content'] }}",
)
MARKED = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}<assistant> {% generation %}{{ m['content'] }} <eos>"
    "{% endgeneration %} {% else %}<{{ m['role'] }}> {{ m['content'] }} <eos> {% endif %}{% endfor %}"
)


def make_tokenizer(template: str | None = TEMPLATE, words: list[str] = WORDS) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<eos>", pad_token="<pad>")
    fast.chat_template = template
    return fast


def write_target(path: Path, template: str | None = TEMPLATE) -> str:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=len(WORDS), max_position_embeddings=64, eos_token_id=END, pad_token_id=1,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(path)
    make_tokenizer(template).save_pretrained(path)
    return str(path)


@pytest.fixture(scope="module")
def target(tmp_path_factory) -> str:
    return write_target(tmp_path_factory.mktemp("target"))


def write_jsonl(path: Path, rows: list[dict]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def chat(*contents: str) -> list[dict]:
    return [{"role": ("user", "assistant")[i % 2], "content": content} for i, content in enumerate(contents)]


def words(ids: list[int]) -> str:
    return " ".join(WORDS[i] for i in ids)


def scripted(*answers: str, finished: bool = True):
    """A writer that says ``answers`` in turn, and the list of all requests it will have seen."""
    left, seen = list(answers), []

    def write(requests):
        seen.extend(requests)
        ids = make_tokenizer()([left.pop(0) for _ in requests], add_special_tokens=False)["input_ids"]
        return [Answer(tokens + [END] * finished, finished) for tokens in ids]

    return write, seen


def dialogue(messages=None, text=None, template: str = TEMPLATE, **settings) -> Dialogue:
    return Dialogue({"messages": messages, "text": text}, 0, make_tokenizer(template), Settings(**settings))


@pytest.mark.parametrize(
    "row",
    [
        {"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]},
        {"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "a"}]},
        {"conversations": [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]},
        {"messages": [{"role": "system", "content": [{"text": "s"}]}, {"role": "user", "content": [{"text": "a"}]}]},
    ],
    ids=["messages", "sharegpt", "speculators", "parts"],
)
def test_chats_come_in_several_forms(row):
    wanted = [{"role": "system", "content": "s"}, {"role": "user", "content": "a"}]
    assert normalize(row) == {"text": None, "messages": wanted, "problem": None}


def test_spec_bench_turns_are_a_chat_that_waits_for_its_answers():
    row = normalize({"turns": ["a", "b"], "category": "c", "messages": None})
    assert row == {"text": None, "messages": chat("a", "", "b", ""), "problem": None}


def test_prompts_end_where_the_target_is_to_speak_and_long_chats_are_counted(caplog):
    tokenizer = make_tokenizer()
    chats = [chat("a", "b", "c", "d"), chat("e", "", "f", ""), chat("g"), chat("a b c d e f g h", "b")]
    rows = [{"messages": messages} for messages in chats]
    found = cut_prompts(rows, tokenizer, 3, 10, 0)
    said = ["<user> a <eos> <assistant> b <eos> <user> c <eos> <assistant>", "<user> e <eos> <assistant>"]
    assert sorted(map(words, found)) == [*said, "<user> g <eos> <assistant>"]
    with pytest.raises(ValueError, match="found 2; .* 2 of 4 chats have more than 9 tokens with the chat template"):
        cut_prompts(rows, tokenizer, 3, 9, 0)
    cut_prompts(rows, tokenizer, 2, 9, 0)
    assert "chats have more than 9 tokens with the chat template (up to 11) and are left out" in caplog.text


@pytest.mark.parametrize(
    ("row", "problem"),
    [
        ({"messages": [{"role": "tool", "content": "a"}]}, "role 'tool'"),
        ({"messages": [{"role": "user", "content": None}]}, "content that is not text"),
        ({"messages": [{"role": "user", "content": [{"image_url": "x"}]}]}, "content that is not text"),
        ({"messages": [{"role": "assistant", "content": "a"}]}, "no user turn"),
        ({"messages": [{"role": "system", "content": "a"}]}, "no user turn"),
        ({"messages": None, "text": " \n"}, "empty"),
    ],
)
def test_what_cannot_be_used_says_why(row, problem):
    assert normalize(row)["problem"] == problem


def test_files_of_all_kinds_are_read_together(tmp_path, caplog):
    rows = [{"text": "a b"}, {"messages": chat("a", "b")}, {"messages": [{"role": "tool", "content": "x"}]}]
    mixed = write_jsonl(tmp_path / "mixed.jsonl", rows)
    sharegpt = tmp_path / "sharegpt.json"
    sharegpt.write_text(json.dumps([{"id": "1", "conversations": [{"from": "human", "value": "c"}]}]))
    plain = tmp_path / "plain.txt"
    plain.write_text("d e\nf\n")
    texts = load_texts([mixed, str(sharegpt), str(plain)])
    assert [text["text"] for text in texts] == ["a b", None, None, "d e\nf\n"]
    assert [text["messages"] for text in texts] == [None, chat("a", "b"), chat("c"), None]
    assert "1 of 5 texts are left out: 1 role 'tool'" in caplog.text


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("t.jsonl", "", "found an empty file"),
        ("t.jsonl", '{"prompt": "a", "answer": "b"}\n', "messages, conversations, turns, text; .* has prompt, answer"),
        ("t.jsonl", '{"text": "a"}\n{"text": ', "must be a readable file"),
        ("t.jsonl", '{"messages": [{"role": "assistant", "content": "a"}]}\n', r"found none \(1 no user turn\)"),
        ("t.csv", "text\na\n", "must end in .jsonl, .json, .parquet, .txt"),
    ],
    ids=["empty", "unknown-keys", "half-written", "no-user-turn", "suffix"],
)
def test_unusable_files_are_refused(tmp_path, name, content, message):
    (tmp_path / name).write_text(content)
    with pytest.raises(ValueError, match=message):
        load_texts([str(tmp_path / name)])


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"no\.jsonl, found no such file"):
        load_texts([str(tmp_path / "no.jsonl")])


def test_every_answer_of_a_chat_is_written_anew_in_one_row():
    write, requests = scripted("c d", "g")
    one = dialogue(chat("a b", "j j j", "e f", "j"))
    regenerate([one], write)
    (row,) = one.rows
    assert words(requests[1].prompt) == "<user> a b <eos> <assistant> c d <eos> <user> e f <eos> <assistant>"
    assert words(row["input_ids"]) == words(requests[1].prompt) + " g <eos>"
    learned = [token for token, mask in zip(row["input_ids"], row["loss_mask"], strict=True) if mask]
    assert words(learned) == "c d <eos> g <eos>"
    assert row["loss_mask"] == [0] * 5 + [1] * 3 + [0] * 5 + [1] * 2


def test_a_template_that_rewrites_history_gives_a_row_per_answer():
    write, _ = scripted("c d", "g h")
    one = dialogue(chat("a", "j", "b"), template=FORGETFUL)
    regenerate([one], write)
    assert [words(row["input_ids"]) for row in one.rows] == [
        "<user> a <eos> <assistant> c d <eos>",
        "<user> a <eos> <assistant> d <eos> <user> b <eos> <assistant> g h <eos>",
    ]
    assert [sum(row["loss_mask"]) for row in one.rows] == [3, 3]
    assert all(row["loss_mask"][-3:] == [1, 1, 1] for row in one.rows)


def test_chats_of_different_length_are_asked_together():
    write, requests = scripted("c", "d", "e")
    both = [dialogue(chat("a")), dialogue(chat("b", "j", "f"))]
    regenerate(both, write)
    assert [words(one.rows[0]["input_ids"])[-7:] for one in both] == ["c <eos>", "e <eos>"]
    assert len(requests) == 3


def test_a_cut_answer_ends_its_chat():
    write, requests = scripted("c d", finished=False)
    one = dialogue(chat("a", "j", "b", "j"), max_new_tokens=2)
    regenerate([one], write)
    assert len(requests) == 1
    assert words(one.rows[0]["input_ids"]) == "<user> a <eos> <assistant> c d"


def test_rows_end_at_max_length():
    write, requests = scripted("c d")
    one = dialogue(chat("a b", "j", "e f g h i j"), max_length=10)
    regenerate([one], write)
    assert [request.max_new_tokens for request in requests] == [5]
    assert len(one.rows) == 1
    long = dialogue(chat("a b c d e f g"), max_length=10)
    regenerate([long], write)
    assert (long.rows, long.problem) == ([], "longer than max_length")


def test_a_text_starts_at_a_line_and_falls_back_to_its_start():
    firsts = set()
    for index in range(20):
        one = Dialogue(
            {"text": "a b c\nd e f\ng", "messages": None}, index, make_tokenizer(), Settings(prompt_length=3)
        )
        firsts.add(words(one.next_request().prompt))
    # From the last line on there are too few tokens.
    assert firsts == {"a b c", "d e f"}
    short = dialogue(text="a b", prompt_length=3)
    assert short.next_request() is None and short.problem == "shorter than prompt_length"


def test_requests_are_the_same_in_every_run_and_differ_in_seed():
    def requests():
        texts = {"text": "a b c\nd e f\n" * 9, "messages": None}
        settings = Settings(prompt_length=3, temperatures=(0.0, 0.5))
        return [Dialogue(texts, i, make_tokenizer(), settings).next_request() for i in range(8)]

    assert requests() == requests()
    assert len({request.seed for request in requests()}) == 8
    assert [request.temperature for request in requests()] == [0.0, 0.5] * 4


def test_draws_take_a_chat_once_and_long_texts_often():
    texts = Dataset.from_list([{"text": "a" * 900, "messages": None}, {"text": None, "messages": chat("b" * 99)}])
    plan = plan_prompts(texts, 20, seed=3)
    assert len(plan) == 20 and plan.count(1) == 1
    assert plan == plan_prompts(texts, 20, seed=3) != plan_prompts(texts, 20, seed=4)
    assert plan_prompts(texts, None, seed=3) == [0, 1]
    assert plan_prompts(texts.select([1]), 20, seed=3) == [0]


def test_the_bar_moves_with_every_answer():
    seen = []
    with PromptBar(total=5, initial=1, disable=False, file=io.StringIO()) as bar:
        bar.start_batch([dialogue(chat("a")), dialogue(chat("a", "b", "c", "d", "e"))])
        for _ in range(4):
            bar.answered()
            seen.append(bar.n)
        assert seen == [1.5, 2.0, 2.5, 3.0]
        # One answer more than turns does not reach into the next batch; fewer are made up for.
        bar.answered()
        assert bar.n == 3.0
        bar.start_batch([dialogue(chat("a", "b", "c"))])
        bar.answered()
        bar.finish(4)
        assert bar.n == 4
    assert " 4/5 [" in bar.fp.getvalue()


CHATS = [{"messages": chat(first)} for first in "abcdefg"]


@pytest.fixture
def prepare(target, tmp_path, monkeypatch):
    """The command on CHATS with a writer that repeats the prompt's second token; ``stop_at``: batch to interrupt."""
    data = write_jsonl(tmp_path / "chats.jsonl", CHATS)
    calls = []

    def run(output: str = "rows.jsonl", stop_at: int | None = None, **changes) -> Path:
        def write(requests):
            calls.append(len(requests))
            if stop_at is not None and len(calls) == stop_at:
                raise KeyboardInterrupt
            return [Answer([r.prompt[1], r.seed % 10 + 5, END], True) for r in requests]

        calls.clear()
        monkeypatch.setattr(prepare_module, "_make_writer", lambda *_: write)
        options = {"target_model": target, "data_path": data, "batch_size": 2, **changes}
        arguments = [part for key, value in options.items() for part in (f"--{key}", *str(value).split())]
        main(["prepare", "--output", str(tmp_path / output), *arguments])
        return tmp_path / output

    run.calls = calls
    return run


def sidecar(path: Path) -> dict:
    return json.loads(Path(f"{path}.json").read_text())


def test_rows_and_record(prepare, target):
    path = prepare(temperatures="0 0.7")
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    assert [words(row["input_ids"][:4]) for row in rows] == [f"<user> {a} <eos> <assistant>" for a in "abcdefg"]
    assert [row["temperature"] for row in rows] == [0.0, 0.7, 0.0, 0.7, 0.0, 0.7, 0.0]
    record = sidecar(path)
    assert record["progress"]["prompts"] == record["prompts"] == 7
    assert record["progress"]["learned_tokens"] == sum(sum(row["loss_mask"]) for row in rows) == 21
    assert record["progress"]["bytes"] == path.stat().st_size
    assert record["settings"]["max_length"] == 64
    assert record["command"].startswith("vllm-kvspec prepare --output")
    assert record["target"]["tokenizer_sha256"] == tokenizer_sha256(AutoTokenizer.from_pretrained(target))


@pytest.mark.parametrize("left_behind", [b"", b'{"input_ids": [2, 5', 99 * b'{"input_ids": [2], "loss_mask": [1]}\n'])
def test_an_interrupted_run_goes_on(prepare, tmp_path, left_behind):
    whole = prepare("whole.jsonl").read_bytes()
    path = tmp_path / "rows.jsonl"
    with pytest.raises(SystemExit, match="the same command goes on"):
        prepare(stop_at=3)
    assert len(path.read_bytes().splitlines()) == sidecar(path)["progress"]["rows"] == 4
    # A batch that was cut off while it was written: recorded nowhere, so it is written again.
    with path.open("ab") as file:
        file.write(left_behind)
    prepare()
    assert prepare.calls == [2, 1]
    assert path.read_bytes() == whole
    assert sidecar(path)["progress"] == sidecar(tmp_path / "whole.jsonl")["progress"]


def test_a_finished_file_is_left_alone(prepare):
    path = prepare()
    before = path.read_bytes(), path.stat().st_mtime_ns
    prepare()
    assert prepare.calls == []
    assert (path.read_bytes(), path.stat().st_mtime_ns) == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"seed": 1}, "settings seed 0 there, 1 here"),
        ({"temperatures": "0 0.5"}, "settings temperatures"),
        ({"engine_args": '{"dtype":"float32"}'}, "settings engine_args"),
        ({"num_prompts": 3}, "prompts 7 there, 3 here"),
    ],
)
def test_rows_made_otherwise_are_not_touched(prepare, change, message):
    path = prepare()
    before = path.read_bytes()
    with pytest.raises(ValueError, match=message):
        prepare(**change)
    assert path.read_bytes() == before


def test_other_texts_or_weights_are_noticed(prepare, tmp_path):
    prepare()
    with pytest.raises(ValueError, match="data .*sha256"):
        prepare(data_path=write_jsonl(tmp_path / "other.jsonl", CHATS[::-1]))
    other = write_target(tmp_path / "retrained")
    with pytest.raises(ValueError, match="weights "):
        prepare(target_model=other)


def test_files_that_are_not_ours_are_not_touched(prepare, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text("precious\n")
    with pytest.raises(ValueError, match="without its record"):
        prepare()
    assert path.read_text() == "precious\n"
    path.unlink()
    with path.with_name("cut.jsonl").open("wb") as file:
        file.write(prepare("cut.jsonl.tmp").read_bytes()[:20])
    (tmp_path / "cut.jsonl.json").write_text((tmp_path / "cut.jsonl.tmp.json").read_text())
    with pytest.raises(ValueError, match="must have at least the .* found 20"):
        prepare("cut.jsonl")


@pytest.mark.parametrize(
    ("rows", "options", "message"),
    [
        ([{"messages": chat("a b c d e f")}], {"max_length": 8}, "1 longer than max_length"),
        ([{"text": "a b c"}], {"prompt_length": 4}, "1 shorter than prompt_length"),
        ([{"text": "a"}], {"max_new_tokens": 0}, "max_new_tokens must be at least 1, found 0"),
        ([{"text": "a"}], {"temperatures": "-1"}, "temperatures must be 0 or more"),
    ],
)
def test_nothing_is_written_when_nothing_can_be(prepare, tmp_path, rows, options, message):
    data = write_jsonl(tmp_path / "bad.jsonl", rows)
    with pytest.raises(ValueError, match=message):
        prepare("bad_rows.jsonl", data_path=data, **options)
    assert prepare.calls == []
    assert not list(tmp_path.glob("bad_rows*"))


def test_what_is_left_out_is_counted(prepare, tmp_path, caplog):
    rows = [{"messages": chat("a b c d e f")}, {"text": "a"}, {"text": "a b"}, {"messages": chat("a")}]
    data = write_jsonl(tmp_path / "some.jsonl", rows)
    path = prepare(data_path=data, max_length=8, prompt_length=2)
    assert sidecar(path)["progress"]["left_out"] == {"longer than max_length": 1, "shorter than prompt_length": 1}
    assert sidecar(path)["progress"]["rows"] == 2
    assert "Of 4 prompts left out: 1 longer than max_length" in caplog.text


def test_chats_need_a_template(prepare, tmp_path):
    with pytest.raises(ValueError, match="Chats need a chat template"):
        prepare(target_model=write_target(tmp_path / "base", template=None))


def test_given_answers_are_marked_by_the_template(tmp_path):
    target = write_target(tmp_path / "marked", MARKED)
    rows = [{"messages": chat("a b", "c d", "e", "f")}, {"messages": chat("a")}, {"text": "g h i"}]
    data, output = write_jsonl(tmp_path / "given.jsonl", rows), tmp_path / "rows.jsonl"
    main(f"prepare --target_model {target} --data_path {data} --output {output} --regenerate none".split())
    written = [json.loads(line) for line in output.read_text().splitlines()]
    learned = [
        words([token for token, mask in zip(row["input_ids"], row["loss_mask"], strict=True) if mask])
        for row in written
    ]
    assert learned == ["c d <eos> f <eos>", "h i"]
    assert sidecar(output)["progress"]["left_out"] == {"without an assistant turn": 1}


def test_given_answers_without_such_a_template_are_refused(target, tmp_path):
    data = write_jsonl(tmp_path / "given.jsonl", [{"messages": chat("a", "b")}])
    command = f"prepare --target_model {target} --data_path {data} --output {tmp_path}/rows.jsonl --regenerate none"
    with pytest.raises(ValueError, match="--regenerate engine"):
        main(command.split())


def test_transformers_writes_what_the_target_says(target, tmp_path):
    rows = [{"text": "a b c d e f g h i j"}, {"messages": chat("a b", "j", "c")}, {"text": "j i h g f e d c b a"}]
    data, output = write_jsonl(tmp_path / "texts.jsonl", rows), tmp_path / "rows.jsonl"
    main(
        f"prepare --target_model {target} --data_path {data} --output {output} --regenerate transformers "
        "--prompt_length 8 --max_new_tokens 6 --temperatures 0 1".split()
    )
    model = Qwen3ForCausalLM.from_pretrained(target)
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert [row["temperature"] for row in written] == [0.0, 1.0, 0.0]
    for row in written[::2]:
        with torch.no_grad():
            said = model(torch.tensor([row["input_ids"]])).logits[0].argmax(-1).tolist()
        own = [i for i, mask in enumerate(row["loss_mask"]) if mask]
        assert own == list(range(8, len(row["input_ids"])))
        assert [row["input_ids"][i] for i in own] == [said[i - 1] for i in own]


def row(ids: list[int], mask: list[int], **more) -> dict:
    return {"input_ids": ids, "loss_mask": mask, **more}


def test_rows_without_a_usable_stretch_are_dropped_and_counted(tmp_path, caplog):
    rows = [
        row([5, 6, 7, 8], [0, 1, 1, 1], temperature=0.5),
        row([5, 6, 7, 8, 9], [1, 1, 0, 1, 1], temperature=0.0),
        row([5] * 9, [1] * 9, temperature=0.0),
    ]
    found = load_rows([write_jsonl(tmp_path / "rows.jsonl", rows)], 3, max_length=8)
    assert list(found) == rows[:1]
    assert "2 of 3 training rows are left out: 1 have no 3 consecutive tokens" in caplog.text
    assert "1 are longer than the 8 tokens of the context" in caplog.text
    with pytest.raises(ValueError, match="at least one usable row; of the 3"):
        load_rows([str(tmp_path / "rows.jsonl")], 4, max_length=8)


def test_rows_of_other_tools_have_temperature_1(tmp_path):
    rows = [row([5, 6, 7], [0, 1, 1], seq_len=3), row([8], [1], seq_len=1)]
    batch = collate(list(load_rows([write_jsonl(tmp_path / "rows.jsonl", rows)], 1)))
    assert batch["input_ids"].tolist() == [[5, 6, 7], [8, 0, 0]]
    assert batch["loss_mask"].tolist() == [[False, True, True], [True, False, False]]
    assert batch["lengths"].tolist() == [3, 1]
    assert batch["temperatures"].tolist() == [1.0, 1.0]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "found an empty file"),
        ('{"input_ids": [5], "loss_mask": [1]}\n{"input_ids": [5, 6', "must be a whole row, found 19 bytes"),
        ('{"input_ids": [5], "prompt_length": 0}\n', "has no loss_mask but .*prompt_length"),
        ('{"input_ids": [5, 6], "loss_mask": [1]}\n', "row 0 has 2 and 1"),
        ('{"input_ids": [5], "loss_mask": [1]}\nnonsense\n{"a": 1}\n', "could not be read"),
    ],
    ids=["empty", "half-written", "other-form", "unequal", "not-json"],
)
def test_files_that_are_no_rows_are_refused(tmp_path, content, message):
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(ValueError, match=message):
        load_rows([str(tmp_path / "rows.jsonl")], 1)


def test_rows_of_another_tokenizer_are_refused(prepare, target):
    path = str(prepare())
    mine = tokenizer_sha256(AutoTokenizer.from_pretrained(target))
    other = tokenizer_sha256(make_tokenizer(words=[*WORDS[:5], *"jihgfedcba"]))
    assert len(load_rows([path], 1, tokenizer_sha256=mine)) == 7
    with pytest.raises(ValueError, match="whose tokenizer is another. Prepare the rows with this target"):
        load_rows([path], 1, tokenizer_sha256=other)


def test_unfinished_rows_are_announced(prepare, tmp_path, caplog):
    with pytest.raises(SystemExit):
        prepare(stop_at=2)
    load_rows([str(tmp_path / "rows.jsonl")], 1)
    assert "2 of 7 prompts" in caplog.text


@pytest.mark.skipif(torch.cuda.is_available(), reason="with a GPU nothing is chosen for the user")
@pytest.mark.parametrize(
    ("units", "chosen"),
    [
        ({"avx512_bf16": True, "amx_bf16": False}, None),
        ({"avx512_bf16": False, "avx2": True}, "float32"),
        ({}, "float32"),
    ],
)
def test_a_cpu_without_bfloat16_instructions_prepares_in_float32(monkeypatch, units, chosen):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: units)
    assert cpu_dtype().get("dtype") == chosen
