# SPDX-License-Identifier: Apache-2.0
"""Gemma 4 targets with their assistants as token trees: the text is that of plain decoding, the assistant's numbers are
transformers', and a chain of it is the one that vLLM's own ``mtp`` drafts."""

import json
import shutil
from pathlib import Path

import pytest
import requests_mix
import torch
from engine_runner import PLAIN_ENGINE, ROOT, generate, model_runner, quick_engines, run_script, spec_counters
from gemma4_pairs import KINDS, quantise, teach, write_assistant, write_target, write_with_images
from requests_mix import ALL, BATCHES, CORE
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, Gemma4AssistantForCausalLM
from transformers.models import gemma4
from transformers.utils import is_torchvision_available
from vllm.engine.arg_utils import EngineArgs

from vllm_kvspec import doctor
from vllm_kvspec.engine import ops
from vllm_kvspec.engine.budget.scheduler import create_budget
from vllm_kvspec.eval.acceptance import evaluate
from vllm_kvspec.eval.recycle import Run
from vllm_kvspec.eval.texts import write_texts
from vllm_kvspec.models.assistant_head import AssistantHead
from vllm_kvspec.tree import RankingScales

HERE = Path(__file__).parent
# Of teaching an assistant a few answers.
STEPS = 120
WINDOW = KINDS["dense"].config["sliding_window"]


@pytest.fixture(scope="module", autouse=True)
def less_waiting():
    with quick_engines():
        yield


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> dict[str, tuple[str, str]]:
    """(target, assistant) of each kind; the small kind's assistant, as the published ones', scores clusters."""
    root = tmp_path_factory.mktemp("pairs")
    targets = {kind: write_target(kind, root / kind) for kind in KINDS}
    return {
        kind: (target, write_assistant(target, root / f"{kind}-assistant", ordered=kind == "small"))
        for kind, target in targets.items()
    }


@pytest.fixture(scope="module")
def plain(pairs, tmp_path_factory) -> dict[str, dict[str, list]]:
    """What plain vLLM answers with each target to each batch."""
    batches = [make() for make in BATCHES.values()]
    jobs = [{"engine": {"model": target, **PLAIN_ENGINE}, "batches": batches} for target, _ in pairs.values()]
    outputs = run_script({"jobs": jobs}, tmp_path_factory.mktemp("plain"))["outputs"]
    return {kind: dict(zip(BATCHES, found, strict=True)) for kind, found in zip(pairs, outputs, strict=True)}


@pytest.fixture
def serve(pairs, make_engine, spec):
    """An engine for a kind; ``keys`` of the speculative config, engine options as keywords."""

    def start(kind: str, keys: dict, **engine):
        target, assistant = pairs[kind]
        return make_engine(spec(**{"model": assistant} | keys), **{"model": target} | engine)

    return start


@pytest.fixture
def check(plain, same):
    def run(llm, kind: str, names: tuple[str, ...]) -> None:
        same(generate(llm, [BATCHES[name]() for name in names]), [plain[kind][name] for name in names], kind)

    return run


@pytest.fixture(scope="module")
def oracle_files(plain, tmp_path_factory) -> dict[str, str]:
    root, files = tmp_path_factory.mktemp("oracle"), {}
    for kind, answers in plain.items():
        texts = [
            request["prompt"] + sample["token_ids"]
            for name, make in BATCHES.items()
            for request, samples in zip(make(), answers[name], strict=True)
            for sample in samples
        ]
        (root / kind).write_text(json.dumps(texts))
        files[kind] = str(root / kind)
    return files


@pytest.mark.parametrize(
    ("kind", "keys", "names"),
    [
        pytest.param("small", {}, ALL, id="small"),
        pytest.param("dense", {}, ALL, id="dense"),
        pytest.param("experts", {}, (*CORE, "mixed"), id="experts"),
        pytest.param(
            "small",
            {"tree": [3, 2, 1], "num_speculative_tokens": 15},
            (*CORE, "mixed"),
            id="small-fixed",
            marks=pytest.mark.once,
        ),
        pytest.param("dense", {"num_speculative_tokens": 40, "tree_depth": 9}, CORE, id="deep", marks=pytest.mark.once),
        pytest.param(
            "small", {"tree": "chain", "num_speculative_tokens": 5}, CORE, id="small-chain", marks=pytest.mark.once
        ),
        pytest.param("dense", {"drafter": "random"}, CORE, id="dense-random", marks=pytest.mark.once),
        pytest.param("small", {"drafter": "random"}, CORE, id="small-random", marks=pytest.mark.once),
    ],
)
def test_text_is_that_of_plain_decoding(serve, check, kind, keys, names):
    with serve(kind, keys) as llm:
        check(llm, kind, names)
        assert spec_counters(llm)["accepted_tokens"] > 0


@pytest.mark.once
@pytest.mark.parametrize("kind", KINDS)
def test_oracle_trees(serve, check, oracle_files, kind):
    """Long accepted paths through side branches: their rows move in every cache, in a shared one once."""
    with serve(kind, {"drafter": "oracle", "oracle_file": oracle_files[kind], "num_speculative_tokens": 14}) as llm:
        check(llm, kind, CORE)
        counters = spec_counters(llm)
    assert counters["accepted_tokens"] / counters["drafts"] > 1.0


@pytest.mark.once
@pytest.mark.parametrize("times", [0, 2])
def test_oracle_trees_can_fail(serve, plain, oracle_files, monkeypatch, times):
    """Rows that stay where they were, and rows that move once for every layer that reads them."""
    compact = ops.kv_compact
    monkeypatch.setattr(ops, "kv_compact", lambda *args: [compact(*args) for _ in range(times)])
    keys = {"drafter": "oracle", "oracle_file": oracle_files["small"], "num_speculative_tokens": 14}
    with serve("small", keys) as llm:
        assert generate(llm, [requests_mix.greedy_batch()])[0] != plain["small"]["greedy"]


@pytest.mark.once
@pytest.mark.parametrize("kind", ["small", "dense"])
def test_chunked_prefill_and_preemption(serve, check, kind):
    options = {"max_num_batched_tokens": 48, "max_num_seqs": 5, "enable_chunked_prefill": True}
    with serve(kind, {"num_speculative_tokens": 8}, num_gpu_blocks_override=40, **options) as llm:
        check(llm, kind, CORE)
        preemptions = sum(m.value for m in llm.get_metrics() if m.name == "vllm:num_preemptions")
    assert preemptions > 0


@pytest.mark.once
def test_two_ranks(serve, check):
    """The scored clusters and the KV head are whole on both; what lies in halves gives the same drafts."""
    counters = []
    for ranks in (1, 2):
        options = {"tensor_parallel_size": ranks, "kv_cache_memory_bytes": 32 << 20}
        with serve("small", {"num_speculative_tokens": 12}, **options) as llm:
            check(llm, "small", ("sampled",))
            counters.append(spec_counters(llm))
    assert counters[0] == counters[1] and counters[0]["accepted_tokens"] > 0


@torch.no_grad()
@pytest.mark.parametrize("kind", KINDS)
def test_the_assistant_is_that_of_transformers(pairs, serve, kind):
    """Scores and next states of every level's rows, within the window and beyond it."""
    target, assistant = (
        cls.from_pretrained(path, dtype=torch.float32).eval()
        for cls, path in zip((AutoModelForCausalLM, Gemma4AssistantForCausalLM), pairs[kind], strict=True)
    )
    calls = []
    with serve(kind, {}) as llm:
        head = speculator_of(llm).model
        forward = head.forward

        def recorded(embeds, state, base, *rest):
            hidden, following = forward(embeds, state, base, *rest)
            calls.append((embeds.clone(), state.clone(), int(base[0]), following.clone(), *head.logits(hidden)))
            return hidden, following

        head.forward = recorded
        request = requests_mix.request(5, 0, temperature=0.0)
        text = request["prompt"] + generate(llm, [[request]])[0][0][0]["token_ids"]
    shared = target.model(torch.tensor([text]), use_cache=False, return_shared_kv_states=True).shared_kv_states
    windows = {"full_attention": lambda base: 0, "sliding_attention": lambda base: max(0, base - WINDOW)}
    compared = [call for call in calls if call[2] < len(text)]
    assert max(call[0].shape[1] for call in compared) == 8 and max(call[2] for call in compared) > 30
    for embeds, state, base, following, logits, tokens in compared:
        for row in range(embeds.shape[1]):
            wanted = assistant(
                inputs_embeds=torch.cat((embeds[:, row : row + 1], state[:, row : row + 1]), dim=-1),
                position_ids=torch.tensor([[base - 1]]),
                # Its mask shows one key more than the window; its cache holds none more.
                shared_kv_states={
                    kind: tuple(x[:, :, windows[kind](base) : base] for x in kv) for kind, kv in shared.items()
                },
            )
            close = dict(atol=2e-3, rtol=2e-3)
            torch.testing.assert_close(following[:, row], wanted.last_hidden_state[:, 0], **close)
            scored = wanted.logits[0, 0] if tokens is None else wanted.logits[0, 0, tokens[0, row]]
            torch.testing.assert_close(logits[0, row], scored, **close)
            if tokens is not None:
                # All the others have one score, below.
                assert len(tokens[0, row].unique()) == len(scored)
                assert (wanted.logits[0, 0] > wanted.logits.min()).sum() == len(scored)


@pytest.mark.parametrize("kind", ["small", "dense"])
def test_the_text_of_a_model_with_images(pairs, serve, check, tmp_path, monkeypatch, kind):
    """``Gemma4ForConditionalGeneration`` without its images; the small ones could come with them."""
    if not is_torchvision_available():
        # vLLM's module of the model imports it, and what it needs; text needs neither.
        monkeypatch.setitem(vars(gemma4), "Gemma4Processor", object)
    model = write_with_images(kind, pairs[kind][0], tmp_path / "target")
    if kind == "dense":
        with pytest.raises(ValueError, match="both directions .without them: --language-model-only"):
            configured(model, pairs[kind][1])
    with serve(kind, {}, model=model, language_model_only=True) as llm:
        check(llm, kind, CORE)
        assert spec_counters(llm)["accepted_tokens"] > 0


def speculator_of(llm):
    return model_runner(llm).speculator


def vllm_chains(pairs: list[tuple[str, str]], directory: Path) -> list[dict]:
    """What vLLM's own ``mtp`` drafts and answers, four tokens a step (``mtp_reference.py``), pair by pair."""
    mtp, batches = {"method": "mtp", "num_speculative_tokens": 4}, [requests_mix.greedy_batch()]
    jobs = [
        {"engine": {"model": target, "speculative_config": mtp | {"model": assistant}}, "batches": batches}
        for target, assistant in pairs
    ]
    return run_script({"jobs": jobs}, directory, path=ROOT, script=str(HERE / "mtp_reference.py"))["results"]


@pytest.fixture(scope="module")
def chains(pairs, selected, tmp_path_factory) -> dict[str, tuple[str, dict]]:
    """Target and vLLM's chains of each chosen pair, all in one process."""
    root = tmp_path_factory.mktemp("chains")
    targets = {
        name: pairs[name][0] if name in pairs else quantise(pairs["dense"][0], root / name) for name in selected("pair")
    }
    found = vllm_chains([(target, pairs[name.split()[0]][1]) for name, target in targets.items()], root)
    return dict(zip(targets, zip(targets.values(), found, strict=True), strict=True))


@pytest.mark.parametrize(
    "pair",
    [
        "small",
        pytest.param("dense", marks=pytest.mark.once),
        pytest.param("experts", marks=pytest.mark.once),
        "dense int8",
    ],
)
def test_a_chain_is_the_one_that_vllm_drafts(chains, serve, pair):
    """Every drafted token of every step, with vLLM's own speculator and model on the same attention."""
    target, expected = chains[pair]
    batches, drafts, gaps = [requests_mix.greedy_batch()], [], []
    flags = {"quantization": "compressed-tensors"} if pair.endswith("int8") else {}
    with serve(pair.split()[0], {"tree": "chain", "num_speculative_tokens": 4}, model=target, **flags) as llm:
        speculator = speculator_of(llm)
        propose, logits = speculator.propose, speculator.drafter.logits

        def recorded(*args, **kwargs):
            tokens = propose(*args, **kwargs)
            drafts.append(tokens.tolist())
            return tokens

        speculator.propose = recorded
        speculator.drafter.logits = lambda hidden: with_gaps(logits(hidden), gaps)
        outputs = generate(llm, batches)
    assert outputs == expected["outputs"]
    assert len(drafts) > 30 and None not in expected["drafts"][:-1]
    for step, (ours, theirs) in enumerate(zip(drafts, expected["drafts"], strict=True)):
        if theirs is None:
            # The step ended every request; from 0.33 on vLLM then asks its own drafters for nothing.
            continue
        for row, (mine, other) in enumerate(zip(ours, theirs, strict=True)):
            level = next((i for i in range(4) if mine[i] != other[i]), None)
            # But for ties of two tokens.
            assert level is None or gaps[4 * step + level][row] < 1e-4, (step, row, level)


@pytest.fixture(scope="module")
def learned(pairs, plain, tmp_path_factory) -> tuple[str, str]:
    """A target, and an assistant that has read its answers."""
    target, assistant = pairs["dense"]
    assistant = shutil.copytree(assistant, tmp_path_factory.mktemp("learned") / "assistant")
    answers = zip(requests_mix.greedy_batch(), plain["dense"]["greedy"], strict=True)
    texts = [request["prompt"] + samples[0]["token_ids"] for request, samples in answers]
    teach(target, str(assistant), [text for text in texts if len(text) > 48], steps=STEPS)
    return target, str(assistant)


@pytest.mark.once
def test_an_assistant_that_has_learned(learned, plain, make_engine, spec, same, tmp_path):
    """As many tokens are accepted of its chain as of vLLM's, of its trees more, and of both as many as `eval`
    foresees."""
    target, assistant = learned
    batches, answers = [requests_mix.greedy_batch()], [plain["dense"]["greedy"]]
    expected = vllm_chains([learned], tmp_path)[0]["counters"]
    # Every draft of 32 tokens' decoding lies inside.
    head, texts = texts_for_eval(*learned, depth=4, length=32 + 4 - 1, temperature=0.0)
    foreseen, accepted = evaluate(head, head.target[0], texts, [16])[0], {}
    for name, keys in {
        "chain": {"tree": "chain", "num_speculative_tokens": 4},
        "16": {"num_speculative_tokens": 16, "tree_depth": 4},
    }.items():
        with make_engine(spec(**{"model": assistant} | keys), model=target) as llm:
            same(generate(llm, batches), answers, name)
            accepted[name] = spec_counters(llm)
        assert accepted[name]["drafts"] == foreseen[name].drafts
        assert accepted[name]["accepted_tokens"] == pytest.approx((foreseen[name].tau - 1) * foreseen[name].drafts)
    assert accepted["chain"] == expected and expected["accepted_tokens"] > 10
    assert accepted["16"]["accepted_tokens"] > expected["accepted_tokens"]


@pytest.mark.once
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_grafts_on_an_assistants_trees(learned, make_engine, spec, temperature):
    """Beyond the window too: the text is right, and what is accepted of either is what `eval` foresees."""
    head, texts = texts_for_eval(*learned, depth=4, length=32 + 16, temperature=temperature)
    run = Run(head.target[0], 16, chain=False, temperature=temperature, head=head)
    batch = requests_mix.greedy_batch()
    for request, text in zip(batch, texts, strict=True):
        run.read(text, last_anchor=text.prompt_length + 30)
        request["params"] |= {"temperature": temperature, "seed": text.seed}
    keys = {"model": learned[1], "tree_depth": 4, "graft": True}
    with make_engine(spec(16, **keys), model=learned[0], max_num_seqs=1, enable_prefix_caching=False) as llm:
        answers, counters = generate(llm, [batch])[0], spec_counters(llm)
    assert [a[0]["token_ids"] for a in answers] == [text.input_ids[text.prompt_length :][:32] for text in texts]
    assert counters["drafts"] == sum(map(len, run.accepted))
    assert counters["accepted_tokens"] == sum(map(sum, run.accepted)) == sum(run.sources.values())
    # What is sampled from random weights never comes again.
    assert ({"head"} if temperature else {"head", "two tokens", "own text"}) <= set(run.sources)


def texts_for_eval(target: str, assistant: str, *, depth: int, length: int, temperature: float):
    """The assistant as `eval` runs it, and ``length`` tokens of the target's after each greedy prompt."""
    model = AutoModelForCausalLM.from_pretrained(target, dtype=torch.float32).eval()
    model.generation_config.eos_token_id = None
    head = Gemma4AssistantForCausalLM.from_pretrained(assistant, dtype=torch.float32).eval()
    prompts = [request["prompt"] for request in requests_mix.greedy_batch()]
    options = {"max_new_tokens": length, "temperature": temperature}
    return AssistantHead(head, model, depth), write_texts(
        model, AutoTokenizer.from_pretrained(target), prompts, **options
    )


def with_gaps(scored, gaps: list):
    best = scored[0][:, 0].topk(2).values
    gaps.append((best[:, 0] - best[:, 1]).tolist())
    return scored


def configured(target: str, assistant: str, **keys):
    arguments = EngineArgs(
        model=target, dtype="float32", speculative_config={"method": "kvspec", "model": assistant, **keys}
    )
    return arguments.create_engine_config().speculative_config


@pytest.mark.parametrize(
    ("keys", "nodes", "depth"),
    [
        ({}, 12, 6),
        ({"tree_depth": 4}, 8, 4),
        ({"num_speculative_tokens": 40, "tree_depth": 9}, 40, 9),
        ({"tree": "chain"}, 6, 6),
        ({"tree": "chain", "num_speculative_tokens": 30}, 30, 30),
        ({"tree": [1, 1, 1, 1, 1, 1, 1, 2]}, 9, 8),
    ],
)
def test_depth_is_asked_for(pairs, keys, nodes, depth):
    config = configured(*pairs["dense"], **keys)
    assert (config.num_speculative_tokens, config.max_depth(config.draft_model_config.hf_config)) == (nodes, depth)


@pytest.mark.parametrize(
    ("keys", "words"),
    [({"tree": "chain", "tree_depth": 3}, 'tree_depth is for tree "auto"'), ({"tree_depth": 0}, "at least 1")],
)
def test_depths_that_no_tree_has(pairs, keys, words):
    with pytest.raises(ValueError, match=words):
        configured(*pairs["dense"], **keys)


def test_the_budget_counts_a_pass_for_every_level(pairs):
    """Until steps are timed, by shapes; the clusters of the small kind's assistant are few of the vocabulary's rows."""
    costs = {}
    for kind in ("small", "dense"):
        target, assistant = pairs[kind]
        keys = {"method": "kvspec", "model": assistant}
        config = EngineArgs(model=target, dtype="float32", speculative_config=keys).create_engine_config()
        assert config.speculative_config.node_sizes == [0, 2, 4, 8, 12]
        costs[kind] = create_budget(config).costs
        passes = [costs[kind].draft_seconds(1, 100, nodes) / costs[kind].draft_seconds(1, 100, 1) for nodes in (2, 8)]
        assert passes == pytest.approx([2, 6])
    assert costs["small"].head.weight_bytes < costs["dense"].head.weight_bytes / 2


def test_fewer_nodes_are_fewer_passes(serve, check):
    """What the budget times at start, and what it then chooses from."""
    with serve("dense", {"budget": "auto"}) as llm:
        speculator, counts = speculator_of(llm), {}
        check(llm, "dense", ("greedy",))
        head = speculator.drafter.head
        forward, passes = head.forward, []
        head.forward = lambda *args: passes.append(1) or forward(*args)
        for nodes in (2, 5, 16):
            speculator.draft(1, False, nodes)
            counts[nodes] = len(passes)
            passes.clear()
    assert counts == {2: 2, 5: 5, 16: 6}


def test_an_assistant_of_another_target(pairs, tmp_path):
    with pytest.raises(ValueError, match="4 heads of 32 in layer 0, which reads 1 KV heads of 16"):
        configured(write_target("small", tmp_path / "other", head_dim=16), pairs["small"][1])
    with pytest.raises(ValueError, match="backbone_hidden_size 64 where the target has 32"):
        configured(write_target("dense", tmp_path / "narrow", hidden_size=32), pairs["dense"][1])


def test_keys_of_an_assistants_config(pairs, tmp_path):
    """How its trees are ranked, ours unless it says so; that it is quantised."""
    target, assistant = pairs["small"]
    changed = shutil.copytree(assistant, tmp_path / "assistant")
    config = json.loads((changed / "config.json").read_text())
    (changed / "config.json").write_text(json.dumps(config | {"coupled_scale": 0.7}))
    for path, expected in ((assistant, (0.35, 0.5)), (changed, (0.35, 0.7))):
        assert RankingScales.of(configured(target, str(path)).head_config) == expected
    (changed / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    with pytest.raises(ValueError, match=r"is quantised \(fp8\). Use the one that it was made from"):
        configured(target, str(changed))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            lambda tensors: tensors.pop("model.layers.1.mlp.up_proj.weight"),
            "lacks 1 tensors, first layers.1.mlp.gate_up",
        ),
        (lambda tensors: tensors.update(extra=torch.zeros(1)), "has a tensor extra"),
    ],
)
def test_a_checkpoint_that_is_no_assistants(pairs, make_engine, spec, tmp_path, change, words):
    target, assistant = pairs["dense"]
    broken = shutil.copytree(assistant, tmp_path / "assistant")
    tensors = load_file(broken / "model.safetensors")
    change(tensors)
    save_file(tensors, broken / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=words), make_engine(spec(model=str(broken)), model=target):
        pass


@pytest.mark.once
def test_suppressed_tokens_are_not_drafted(pairs, make_engine, spec, tmp_path):
    """generation_config.json lists tokens that an assistant must not propose; here all but ten."""
    target, assistant = pairs["small"]
    quiet = shutil.copytree(assistant, tmp_path / "assistant")
    allowed, vocab_size = range(100, 110), AutoConfig.from_pretrained(target).vocab_size
    ids = [token for token in range(vocab_size) if token not in allowed]
    (quiet / "generation_config.json").write_text(json.dumps({"suppress_tokens": ids}))
    with make_engine(spec(4, model=str(quiet)), model=target) as llm:
        scored = []
        drafter = speculator_of(llm).drafter
        logits = drafter.logits

        def recorded(hidden):
            scored.append(logits(hidden))
            return scored[-1]

        drafter.logits = recorded
        generate(llm, [[requests_mix.request(5, 0, temperature=0.0)]])
    drafted = {token for found, tokens in scored for token in tokens[found.isfinite()].tolist()}
    assert drafted and drafted <= set(allowed)


def test_the_doctor_knows_assistants(pairs, tmp_path):
    found = {finding.name: finding for finding in doctor.findings(*pairs["small"])}
    assert found["target"].found == "Gemma4ForCausalLM: 6 layers, 1 KV heads of 32 or 64"
    assert "assistant of 4 layers, scores the best 4 of 64 clusters" in found["head"].found
    assert found["head fits target"].found == "its sizes are the target's; it reads layers 1, 1, 1, 2"
    assert found["vLLM accepts the pair"].ok
    other = write_target("small", tmp_path / "other", head_dim=16)
    assert "another target" in {f.name: f for f in doctor.findings(other, pairs["small"][1])}["head fits target"].found
