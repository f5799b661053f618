# SPDX-License-Identifier: Apache-2.0
"""The drafter without an engine: every head that is served gives the candidates of its definition in torch.

The head is built from vLLM's layers and loads a checkpoint; the target is a small one of transformers, whose KV cache
is laid out in blocks. Nothing of vLLM's runner takes part.
"""

from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, Qwen3Config, Qwen3ForCausalLM
from vllm.config import VllmConfig, set_current_vllm_config
from vllm.distributed import cleanup_dist_env_and_memory, init_distributed_environment, initialize_model_parallel

from vllm_kvspec.engine.config.keys import TREE_BEAM
from vllm_kvspec.engine.draft import head_drafter
from vllm_kvspec.engine.draft.head import KVSpecDraftModel
from vllm_kvspec.engine.draft.head_drafter import Drafter
from vllm_kvspec.engine.draft.logits import DraftLogits
from vllm_kvspec.engine.draft.transition import DraftTransition
from vllm_kvspec.engine.target_kv import PagedLayer, empty_layer
from vllm_kvspec.kernels.reference import gumbel_noise
from vllm_kvspec.kernels.reference_draft_inputs import DraftRows
from vllm_kvspec.models import draft_head
from vllm_kvspec.models.attention import KVSpecAttention
from vllm_kvspec.models.drafting import draft_candidates
from vllm_kvspec.models.target import TargetView, head_logits, view_target
from vllm_kvspec.tree import RankingScales, depths, plan_levels, ranking_scale

pytestmark = pytest.mark.cpu

VOCAB, BLOCK, NODES, LENGTH, BLOCK_SIZE = 60, 4, 6, 40, 16
# Positions of the anchors of four requests that share one text.
BASES = [1, 15, 16, 33]
TEMPERATURES = torch.tensor([0.0, 0.7, 1.0, 0.0])
SEEDS = torch.tensor([3, 5, 7, 11])

HEADS = {
    "hybrid": dict(context="hybrid"),
    "kv": dict(context="kv"),
    "no-bias": dict(context="hybrid", transition_rank=0),
    "tied": dict(context="hybrid", transition="tied"),
    "tied-draft-vocabulary": dict(context="kv", transition="tied", draft_vocab_size=40),
    "tied-autoregressive": dict(context="hybrid", transition="tied", drafting="autoregressive"),
    "draft-vocabulary": dict(context="hybrid", draft_vocab_size=40),
    "kv-autoregressive": dict(context="kv", drafting="autoregressive"),
    "hybrid-autoregressive": dict(context="hybrid", drafting="autoregressive"),
    "all-but-block": dict(context="kv", drafting="autoregressive", transition_rank=0, draft_vocab_size=40),
}
# Targets whose layers are not all rotated and windowed alike, each with the layers that a head reads.
SHAPE = dict(
    hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
    head_dim=16, vocab_size=VOCAB, tie_word_embeddings=False, max_position_embeddings=128, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
WINDOWS = {"sliding_window": 9, "layer_types": ["sliding_attention", "full_attention"] * 2}
PER_TYPE = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
}
TARGETS = {
    "gemma3_text": WINDOWS | {"rope_parameters": PER_TYPE, "query_pre_attn_scalar": 16},
    # No rotary positions in full attention; pairs are neighbours.
    "cohere2": WINDOWS | {"logit_scale": 0.5},
    # Half of a head is rotated, in neighbouring pairs.
    "glm4": {"partial_rotary_factor": 0.5},
    "phi3": {"partial_rotary_factor": 0.5, "sliding_window": 12, "rope_parameters": {"rope_theta": 100.0}},
}


@pytest.fixture(scope="module", autouse=True)
def vllm_layers(tmp_path_factory):
    """One process of tensor parallelism, which vLLM's layers ask for."""
    file = tmp_path_factory.mktemp("distributed") / "init"
    with set_current_vllm_config(VllmConfig()):
        init_distributed_environment(1, 0, f"file://{file}", 0, "gloo")
        initialize_model_parallel(1)
        yield
    cleanup_dist_env_and_memory()


@pytest.fixture(scope="module")
def target() -> Qwen3ForCausalLM:
    torch.manual_seed(0)
    config = Qwen3Config(
        hidden_size=32, intermediate_size=48, num_hidden_layers=4, num_attention_heads=4, num_key_value_heads=2,
        head_dim=16, vocab_size=VOCAB, tie_word_embeddings=True, max_position_embeddings=128,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config).eval()
    # Logits with some spread, as a trained model has.
    model.lm_head.weight.data *= 20
    return model


def make_head(target, directory, **fields) -> draft_head.KVSpecDraftModel:
    torch.manual_seed(1)
    shape = dict(num_hidden_layers=2, draft_block_size=BLOCK, transition_rank=8)
    fields = shape | dict(greedy_scale=0.4, coupled_scale=0.7) | fields
    head = draft_head.KVSpecDraftModel(draft_head.head_config_for(target.config, **fields)).eval()
    for module in head.modules():
        # They start at zero, which would hide every mistake behind them.
        if isinstance(module, KVSpecAttention):
            torch.nn.init.normal_(module.o_proj.weight, std=0.2)
    if head.config.transition_rank:
        last = head.transition_hidden if head.config.has_tied_transition else head.transition_out
        torch.nn.init.normal_(last.weight, std=0.5)
    if head.draft_token_ids is not None:
        head.set_draft_vocabulary(torch.randperm(VOCAB)[: head.config.draft_vocab_size])
    head.save_pretrained(directory)
    return head


def load(config, tensors: dict[str, torch.Tensor]) -> KVSpecDraftModel:
    """What vLLM's model loader does with a head."""
    spec = SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=config))
    vllm_config = SimpleNamespace(speculative_config=spec, model_config=SimpleNamespace(max_model_len=LENGTH))
    model = KVSpecDraftModel(vllm_config=vllm_config)
    model.load_weights(tensors.items())
    for module in model.modules():
        if method := getattr(module, "quant_method", None):
            method.process_weights_after_loading(module)
    return model.eval()


def serve(head, target, directory, **keys) -> tuple[Drafter, DraftRows, torch.Tensor]:
    """The drafter over the target's KV in blocks, rows of four requests, and their text [1, S]."""
    torch.manual_seed(2)
    ids = torch.randint(VOCAB, (1, LENGTH))
    view = view_target(target, head.config, ids)
    spec = dict(tree="auto", tree_width=3, parents=None, draft_noise="coupled", num_speculative_tokens=NODES) | keys
    spec |= {"beam": 1 if spec["tree"] == "chain" else TREE_BEAM, "max_depth": lambda head: head.draft_block_size}
    served = load(head.config, load_file(directory / "model.safetensors"))
    fake = SimpleNamespace(
        embed_input_ids=target.get_input_embeddings(),
        compute_logits=partial(head_logits, target),
        lm_head=target.lm_head,
    )
    drafter = Drafter(SimpleNamespace(**spec), served, fake)
    drafter.bind(*in_blocks(view))
    state = None if head.config.context == "kv" else view.hidden[0, torch.tensor(BASES) - 1]
    base = torch.tensor(BASES, dtype=torch.int32)
    none = torch.zeros(len(BASES), dtype=torch.int32)
    return drafter, DraftRows(torch.arange(4), base, ids[0, base], TEMPERATURES, SEEDS, none, state), ids


def in_blocks(view: TargetView) -> tuple[list[PagedLayer], list[torch.Tensor]]:
    """The keys and values of one text as four requests' paged KV, blocks in another order, NaN beyond the text."""
    blocks = -(-LENGTH // BLOCK_SIZE)
    order = torch.tensor([2, 0, 3])[:blocks]
    layers = []
    for keys_values, window in zip(view.kv, view.windows, strict=True):
        caches = []
        for tensor in keys_values:
            cache = torch.full((4, BLOCK_SIZE, *tensor[0].transpose(0, 1).shape[1:]), float("nan"))
            for i, block in enumerate(order):
                part = tensor[0].transpose(0, 1)[i * BLOCK_SIZE : (i + 1) * BLOCK_SIZE]
                cache[block, : len(part)] = part
            caches.append(cache)
        layers.append(PagedLayer(*caches, torch.ones(1), torch.ones(1), group=0, sliding_window=window))
    return layers, [order.int().repeat(len(BASES), 1)]


@pytest.fixture(params=HEADS)
def head(request, target, tmp_path):
    return make_head(target, tmp_path, **HEADS[request.param])


@pytest.mark.parametrize("coupled", [True, False])
def test_candidates_are_those_of_the_definition(head, target, tmp_path, coupled):
    check_candidates(head, target, tmp_path, coupled)


@pytest.mark.parametrize("drafting", ["block", "autoregressive"])
@pytest.mark.parametrize("transition", ["table", "tied"])
@pytest.mark.parametrize("model_type", TARGETS)
def test_candidates_on_a_target_with_layers_of_several_kinds(model_type, transition, drafting, tmp_path):
    torch.manual_seed(0)
    config = AutoConfig.for_model(model_type, **{**SHAPE, **TARGETS[model_type]})
    target = AutoModelForCausalLM.from_config(config).eval()
    target.lm_head.weight.data *= 20
    fields = dict(context="hybrid", drafting=drafting, transition=transition, target_kv_layer_ids=[2, 3])
    check_candidates(make_head(target, tmp_path, **fields), target, tmp_path, coupled=True)


@torch.no_grad()
def check_candidates(head: draft_head.KVSpecDraftModel, target: PreTrainedModel, directory: Path, coupled: bool):
    drafter, rows, ids = serve(head, target, directory, draft_noise="coupled" if coupled else "none")
    # All of the beam's levels; a tree of few nodes expands fewer.
    found = drafter.expansion(rows)(levels=plan_levels(BLOCK, 8, 3))
    scale = ranking_scale(TEMPERATURES, coupled, RankingScales.of(head.config))
    noise = None
    if coupled:
        positions = rows.base[:, None] + torch.arange(BLOCK)
        noise = gumbel_noise(SEEDS, TEMPERATURES, positions, rows.request, VOCAB)
    view = view_target(target, head.config, ids)
    expected = draft_candidates(head, target, view, ids, rows.base.long(), noise, scale, beam=8, width=3)
    torch.testing.assert_close(found.score, expected[0], atol=1e-4, rtol=1e-4)
    assert torch.equal(found.token, expected[1])
    assert torch.equal(found.parent, expected[2])


@torch.no_grad()
def test_a_row_does_not_depend_on_the_rows_beside_it(head, target, tmp_path):
    """What padding relies on: a padded batch gives a request the tree it gets alone."""
    drafter, rows, _ = serve(head, target, tmp_path)
    together = drafter.trees(rows, False)
    padded = DraftRows(*(None if c is None else torch.cat((c[:1], torch.zeros_like(c[:3]))) for c in rows))
    for tree, one in zip(together, drafter.trees(padded, False), strict=True):
        assert torch.equal(tree[:1], one[:1])


@torch.no_grad()
def test_a_small_tree_needs_no_deeper_level(head, target, tmp_path):
    """A chain of two is the beginning of the longest one."""
    keys = dict(tree="chain", parents=None)
    short, rows, _ = serve(head, target, tmp_path, num_speculative_tokens=2, **keys)
    full, _, _ = serve(head, target, tmp_path, num_speculative_tokens=BLOCK, **keys)
    assert len(short.levels) == 2
    assert torch.equal(short.trees(rows, False)[0], full.trees(rows, False)[0][:, :2])


@torch.no_grad()
def test_the_pass_that_measures_memory_needs_no_kv_cache(head, target, tmp_path):
    drafter, rows, _ = serve(head, target, tmp_path)
    drafter.bind([empty_layer(2, 16, torch.float32, torch.device("cpu"))] * 2, [torch.zeros(4, 1, dtype=torch.int32)])
    padding = DraftRows(*(None if c is None else torch.zeros_like(c) for c in rows))
    tokens, parent, *_ = drafter.trees(padding, False)
    assert ((tokens >= 0) & (tokens < VOCAB)).all()
    assert (parent[:, 1:] < torch.arange(1, NODES + 1)).all()


@torch.no_grad()
@pytest.mark.parametrize("drafting", ["block", "autoregressive"])
def test_fixed_shapes_with_chains(target, tmp_path, drafting):
    """Per request the fixed shape or a chain; siblings are the parent's best children in order."""
    head = make_head(target, tmp_path, drafting=drafting)
    parents = [0, 0, 1, 1, 2, 3]
    drafter, rows, _ = serve(head, target, tmp_path, parents=parents)
    rows.chain[1:3] = 1
    tokens, parent, depth, mask = drafter.trees(rows, True)
    assert parent.tolist() == [[0, *parents], [0, *range(NODES)], [0, *range(NODES)], [0, *parents]]
    assert depth[0].tolist() == depths(parents)
    free, _, _ = serve(head, target, tmp_path)
    best = free.expansion(rows)(levels=free.levels)
    assert torch.equal(tokens[0, :2], best.token[0, :2])
    children = best.token[0, best.parent[0] == 0]
    assert tokens[0, 2:4].tolist() == children[:2].tolist()
    assert tokens[1, 0] == best.token[1, 0]


def test_part_of_the_lm_head(target):
    """Rows are copied only where their product is the target's logits."""
    ids = torch.tensor([3, 5, 8])
    hidden = torch.randn(7, 32)
    weight = target.lm_head.weight
    plain = SimpleNamespace(lm_head=target.lm_head, compute_logits=lambda h: h @ weight.T)
    capped = SimpleNamespace(lm_head=target.lm_head, compute_logits=lambda h: 30 * torch.tanh(h @ weight.T / 30))
    quantised = SimpleNamespace(
        lm_head=SimpleNamespace(weight=weight.to(torch.float8_e4m3fn)), compute_logits=plain.compute_logits
    )
    for fake, is_copied in ((plain, True), (capped, False), (quantised, False)):
        head = torch.nn.Module()
        head.draft_ids, head.config, head.norm = ids, SimpleNamespace(vocab_size=VOCAB), torch.nn.LayerNorm(32)
        logits = DraftLogits(fake, head)
        assert (logits.project is not None) == is_copied
        torch.testing.assert_close(logits(hidden), fake.compute_logits(hidden)[:, ids])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (lambda tensors: tensors.pop("d2t"), "lacks 1 tensors, first d2t"),
        (lambda tensors: tensors.pop("layers.0.self_attn.k_proj.weight"), "first layers.0.self_attn.k_proj"),
        (lambda tensors: tensors["d2t"].add_(VOCAB), "d2t must map 40 draft tokens to target ids below 60"),
        (lambda tensors: tensors.update(fuse_proj=torch.zeros(1)), "has a tensor fuse_proj"),
    ],
    ids=["no-d2t", "no-weight", "d2t-out-of-range", "another-tensor"],
)
def test_refused_checkpoints(target, tmp_path, change, sentence):
    head = make_head(target, tmp_path, draft_vocab_size=40)
    tensors = load_file(tmp_path / "model.safetensors")
    change(tensors)
    with pytest.raises(ValueError, match=sentence):
        load(head.config, tensors)


def test_weights_may_be_updated_in_chunks(target, tmp_path):
    """As by vLLM's layerwise reload. What was made of the old weights goes."""
    head = make_head(target, tmp_path)
    tensors = load_file(tmp_path / "model.safetensors")
    spec = SimpleNamespace(draft_model_config=SimpleNamespace(hf_config=head.config))
    config = SimpleNamespace(speculative_config=spec, model_config=SimpleNamespace(max_model_len=LENGTH))
    model = KVSpecDraftModel(vllm_config=config)
    model.load_weights(tensors.items())
    transition = DraftTransition(None, model)
    before = transition.factors[1](torch.eye(8))
    changed = {name: tensor + 1 for name, tensor in tensors.items() if name.startswith(("transition_out", "norm"))}
    for name, tensor in changed.items():
        assert model.load_weights([(name, tensor)]) == {name}
    assert torch.equal(model.norm.weight, changed["norm.weight"])
    transition.refresh()
    torch.testing.assert_close(transition.factors[1](torch.eye(8)), before + 1)


@torch.no_grad()
@pytest.mark.parametrize("drafts", [{}, {"draft_vocab_size": 40}])
def test_new_weights_reach_a_tied_transition_where_it_is(target, tmp_path, drafts):
    """A CUDA graph reads the tables at their addresses."""
    head = make_head(target, tmp_path, transition="tied", **drafts)
    drafter, rows, _ = serve(head, target, tmp_path)
    tables = drafter.head.transition_rows, drafter.head.transition_columns
    before = [table.clone() for table in tables]
    drafter.head.transition_token.weight.data *= 2
    drafter.head.transition_hidden.weight.data *= 4
    drafter.weights_changed()
    assert tables[0] is drafter.head.transition_rows and tables[1] is drafter.head.transition_columns
    torch.testing.assert_close(tables[0], 2 * before[0])
    torch.testing.assert_close(tables[1], 4 * before[1])


@pytest.mark.parametrize("rows", [1, 2])
def test_repeated_rows_lie_one_after_another(rows):
    """Kernels step from one to the next, also where a single request has several paths."""
    repeated = head_drafter._repeat(torch.arange(rows), 3)
    assert repeated.tolist() == [row for row in range(rows) for _ in range(3)] and repeated.stride() == (1,)
