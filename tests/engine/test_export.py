# SPDX-License-Identifier: Apache-2.0
"""An exported head drafts in vLLM's own ``eagle3`` what it drafts here: the same logits at every step of every chain,
and as many accepted tokens as ``vllm-kvspec eval`` predicts."""

import json
from pathlib import Path

import pytest
import torch
from engine_runner import ROOT, TARGET, generate, run_script, spec_counters
from transformers import AutoModelForCausalLM, AutoTokenizer
from vllm.engine.arg_utils import EngineArgs
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM

from vllm_kvspec.engine.hooks.compat import installed_minor
from vllm_kvspec.eval.acceptance import evaluate, text_acceptance
from vllm_kvspec.eval.texts import Text, write_texts
from vllm_kvspec.export import export
from vllm_kvspec.models.draft_head import KVSpecDraftModel, head_config_for
from vllm_kvspec.models.drafting import draft_logits
from vllm_kvspec.models.target import view_target
from vllm_kvspec.train.data import collate
from vllm_kvspec.train.trainer import LossSettings, head_loss, init_from_target

MAX_TOKENS, BLOCK, STEPS = 28, 5, 60
# Layers in another order than engines give their states in, one twice; and an LM head of the checkpoint's own.
HEADS = {"whole": dict(aux_hidden_state_layer_ids=[5, 1, 5, 6]), "reduced": dict(draft_vocab_size=512)}


@pytest.fixture(scope="module")
def target():
    return AutoModelForCausalLM.from_pretrained(TARGET, dtype=torch.float32).eval().requires_grad_(False)


@pytest.fixture(scope="module")
def texts(target) -> list[Text]:
    """Greedy texts, so long that each place where an engine drafts has its whole block inside."""
    tokenizer = AutoTokenizer.from_pretrained(TARGET)
    rows = [json.loads(line) for line in (ROOT / "examples/prompts.jsonl").read_text().splitlines()]
    # The last is one token: the first chain's anchor sees no row before its own.
    prompts = [tokenizer(row["prompt"])["input_ids"][:64] for row in rows if row.get("prompt")]
    prompts = [*prompts[:4], prompts[0][:1]]
    length = MAX_TOKENS + BLOCK - 1
    texts = write_texts(target, tokenizer, prompts, max_new_tokens=length, temperature=0.0)
    texts = [text for text in texts if len(text.input_ids) == text.prompt_length + length]
    assert len(texts) >= 3 and texts[-1].prompt_length == 1
    return texts


def teach(head: KVSpecDraftModel, target, texts: list[Text]) -> None:
    """The very texts it will be asked for."""
    init_from_target(head, target)
    rows = [{"input_ids": text.input_ids, "loss_mask": [1] * len(text.input_ids), "temperature": 0.0} for text in texts]
    batch, settings = collate(rows), LossSettings(anchors_per_sequence=16)
    optimizer = torch.optim.AdamW(head.parameters(), lr=5e-3)
    for _ in range(STEPS):
        loss = head_loss(head, head.config, target, batch, settings)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()


@pytest.fixture(scope="module", params=HEADS)
def exported(target, texts, request, tmp_path_factory) -> tuple[str, KVSpecDraftModel, str]:
    """Which head, the head, and the directory that it was exported to."""
    fields = dict(context="hidden", fusion="eagle3", drafting="autoregressive", num_hidden_layers=1, transition_rank=0)
    config = head_config_for(
        target.config, AutoTokenizer.from_pretrained(TARGET), draft_block_size=BLOCK, **fields, **HEADS[request.param]
    )
    torch.manual_seed(0)
    head = KVSpecDraftModel(config)
    if config.draft_vocab_size < config.vocab_size:
        counts = torch.bincount(
            torch.tensor([i for text in texts for i in text.input_ids]), minlength=config.vocab_size
        )
        head.set_draft_vocabulary(counts.topk(config.draft_vocab_size).indices)
    teach(head, target, texts)
    directory = tmp_path_factory.mktemp(request.param)
    head.eval().save_pretrained(directory / "head")
    return request.param, head, str(export(str(directory / "head"), str(directory / "eagle3")))


def test_vllm_drafts_what_was_predicted(exported, target, texts, make_engine, tmp_path, monkeypatch):
    """One head on the engine that vLLM serves with here, logits compared, the other on Model Runner V2, draft by draft
    (on a GPU the two are one)."""
    name, head, directory = exported
    predicted = evaluate(head, target, texts, [])[0]["chain"]
    engine = {
        "speculative_config": {"method": "eagle3", "model": directory, "num_speculative_tokens": BLOCK},
        "max_num_seqs": 1,
        "enable_prefix_caching": False,
    }
    params = {"max_tokens": MAX_TOKENS, "temperature": 0.0, "ignore_eos": True}
    batches = [[{"prompt": text.input_ids[: text.prompt_length], "params": params}] for text in texts]
    places = [anchors(head, target, text) for text in texts]
    if name == "reduced" and not torch.cuda.is_available():
        job = {"jobs": [{"engine": engine, "batches": batches}]}
        script = str(Path(__file__).with_name("mtp_reference.py"))
        (found,) = run_script(job, tmp_path, path=ROOT, script=script)["results"]
        outputs, counters, compare = found["outputs"], found["counters"], compare_drafts
        steps = iter(found["drafts"])
        # It drafts, or would, once more after a text's last token.
        drafted = [[next(steps) for _ in (*bases, None)][:-1] for bases in places]
        assert not list(steps)
    else:
        logits, drafted, outputs, compare = record_logits(monkeypatch), [], [], compare_logits
        with make_engine(engine.pop("speculative_config"), **engine, block_size=32) as llm:
            for batch in batches:
                logits.clear()
                outputs += generate(llm, [batch])
                drafted.append(list(logits))
            counters = spec_counters(llm)
    for text, bases, ((sample,),), drafts in zip(texts, places, outputs, drafted, strict=True):
        assert sample["token_ids"] == text.input_ids[text.prompt_length :][:MAX_TOKENS]
        compare(head, target, text, bases, drafts)
    print(f"{name}: {predicted.drafts:.0f} drafts, tau {predicted.tau:.3f}; engine {counters}")
    assert counters["drafts"] == predicted.drafts
    assert counters["accepted_tokens"] == pytest.approx((predicted.tau - 1) * predicted.drafts, abs=1e-6)
    # What was taught is accepted: chains of every length were compared.
    assert predicted.tau > 1.4


def record_logits(monkeypatch) -> list[torch.Tensor]:
    """The logits [V] of every token that is drafted from now on, one request at a time."""
    found: list[torch.Tensor] = []
    original = Eagle3LlamaForCausalLM.compute_logits

    def compute_logits(self, hidden_states):
        logits = original(self, hidden_states)
        found.append(logits[0].float().cpu())
        return logits

    monkeypatch.setattr(Eagle3LlamaForCausalLM, "compute_logits", compute_logits)
    return found


def anchors(head, target, text: Text) -> list[int]:
    """Where an engine drafts on its way through the text."""
    accepted = text_acceptance(head, target, text, [])["chain"]
    base, places = text.prompt_length, []
    while base < text.prompt_length + MAX_TOKENS - 1:
        places.append(base)
        base += 1 + int(accepted[base - text.prompt_length])
    return places


def compare_logits(head, target, text: Text, places: list[int], engine: list[torch.Tensor]) -> None:
    """``engine``: the logits [V] of each drafted token, against the head's own along the same chains."""
    engine = torch.stack(engine[: len(places) * BLOCK]).unflatten(0, (-1, BLOCK))
    ours = chain_logits(head, target, text, places, engine.argmax(-1))
    torch.testing.assert_close(engine, ours, atol=2e-4, rtol=1e-4)


def compare_drafts(head, target, text: Text, places: list[int], engine: list[list[list[int]]]) -> None:
    """``engine``: the chain of each draft, against what the head would draft after the tokens before."""
    drafts = torch.tensor(engine).squeeze(1)
    assert torch.equal(chain_logits(head, target, text, places, drafts).argmax(-1), drafts)


def chain_logits(head, target, text: Text, places: list[int], drafts: torch.Tensor) -> torch.Tensor:
    """The head's logits [drafts, BLOCK, V] at the anchors ``places``, along ``drafts`` [drafts, BLOCK]."""
    ids, base = torch.tensor([text.input_ids]), torch.tensor(places)
    paths = torch.cat((ids[0, base, None], drafts[:, :-1]), dim=1)
    with torch.no_grad():
        return draft_logits(head, target, view_target(target, head.config, ids), ids, base, paths)


@pytest.mark.skipif(installed_minor() >= (0, 33), reason="takes targets by the name of a repository only")
def test_it_is_served_by_its_name(exported):
    config = EngineArgs(model=exported[2], dtype="float32", max_model_len=256).create_engine_config()
    assert config.model_config.model == TARGET
    assert (config.speculative_config.method, config.speculative_config.num_speculative_tokens) == ("eagle3", BLOCK)
