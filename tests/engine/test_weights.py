# SPDX-License-Identifier: Apache-2.0
"""Weights that go away and come back: sleep at level 2, and new weights for the target while it serves."""

import gc
from fnmatch import fnmatch
from functools import partial
from gc import collect
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from engine_runner import TARGET, generate, model_runner, spec_counters
from gemma4_pairs import write_assistant, write_target
from heads import write_head
from requests_mix import BATCHES
from safetensors.torch import load_file
from torch.nn.functional import linear
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vllm_kvspec.engine import ops
from vllm_kvspec.engine.cpu.worker import KVSpecCPUWorker


@pytest.fixture(scope="module")
def reduced_head(tmp_path_factory) -> str:
    """The bundled head, scoring every second token only."""
    return write_head(tmp_path_factory.mktemp("reduced"), draft_vocab_size=2048)


class Allocations(TorchDispatchMode):
    """Addresses of the storages of all tensors that come out of operations."""

    def __init__(self):
        super().__init__()
        self.addresses: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.addresses |= {t.untyped_storage().data_ptr() for t in tree_leaves(result) if torch.is_tensor(t)}
        return result


@pytest.fixture
def loaded(monkeypatch) -> dict[int, torch.Tensor]:
    """By address, every tensor that loading has allocated and that still lives after it: what vLLM allocates in the
    pool that sleep discards. (``Worker.load_model``; what libraries have packed for themselves is out of sight.)"""
    alive: dict[int, torch.Tensor] = {}
    original = KVSpecCPUWorker.load_model

    def load_model(self, *args, **kwargs):
        with Allocations() as allocations:
            original(self, *args, **kwargs)
        # The module's own does nothing while an engine starts (``quick_engines``).
        collect()
        for thing in gc.get_objects():
            if (
                type(thing) in (torch.Tensor, torch.nn.Parameter)
                and thing.layout == torch.strided
                and thing.device.type == "cpu"
            ):
                storage = thing.untyped_storage()
                # vLLM's CPU layers keep pointers to their packed weights, as tensors of one int64.
                if storage.data_ptr() in allocations.addresses and storage.nbytes() > 8:
                    alive[storage.data_ptr()] = torch.empty(0, dtype=torch.uint8).set_(storage)

    monkeypatch.setattr(KVSpecCPUWorker, "load_model", load_model)
    return alive


def sleep_and_wake(worker, loaded: dict[int, torch.Tensor]) -> None:
    """``Worker.sleep(2)`` and ``wake_up()`` without a GPU: all of the pool becomes garbage, vLLM's own lists say what
    is restored. The target's weights are loaded again by the user."""
    target, head = worker.model_runner.model, worker.get_draft_model()
    patterns = worker.model_config.sleep_preserve_parameter_names
    parameters = worker._get_sleep_parameters(target)
    kept = [p for name, p in parameters.items() if any(fnmatch(name, pattern) for pattern in patterns)]
    saved = [(t, t.detach().clone()) for t in (*kept, *target.buffers(), *head.buffers(), *target.parameters())]
    for tensor in loaded.values():
        tensor.fill_(0xFF)
    with torch.no_grad():
        for tensor, value in saved:
            tensor.copy_(value)


@pytest.fixture
def unpacked(monkeypatch) -> None:
    """The head's products read the weights where they are, as on a GPU."""
    monkeypatch.setattr(ops, "fixed_linear", lambda weight: partial(linear, weight=weight))


@pytest.mark.usefixtures("unpacked")
@pytest.mark.parametrize(
    "keys",
    [{"tree": [3, 2, 1], "num_speculative_tokens": 15}, {"model": "reduced", "graft": False}, {}],
    ids=["fixed-tree", "draft-vocabulary", "default"],
)
def test_sleep_at_level_2(make_engine, spec, same, reference, reduced_head, loaded, keys):
    """Same text, and as many accepted tokens as before; more with grafts, whose table still knows the texts."""
    grafts = not keys
    if keys.get("model"):
        keys = keys | {"model": reduced_head}
    keys = {"num_speculative_tokens": 8} | keys
    with make_engine(spec(**keys), enable_prefix_caching=False) as llm:
        accepted = []
        for _ in range(2):
            before = spec_counters(llm)["accepted_tokens"]
            same(generate(llm, [BATCHES["greedy"]()]), [reference["greedy"]])
            accepted.append(spec_counters(llm)["accepted_tokens"] - before)
            llm.collective_rpc(lambda worker: sleep_and_wake(worker, loaded))
    assert len(loaded) > 20
    assert accepted[1] > accepted[0] > 0 if grafts else accepted[0] == accepted[1] > 0


@pytest.mark.once
@pytest.mark.usefixtures("unpacked")
def test_an_assistant_sleeps_at_level_2(make_engine, spec, loaded, tmp_path):
    """Same text and same drafts, also of the buffers that its checkpoint brings."""
    target = write_target("small", tmp_path / "target")
    keys = {"model": write_assistant(target, tmp_path / "assistant", ordered=True), "tree": [3, 2, 1]}
    with make_engine(spec(15, **keys), model=target, enable_prefix_caching=False) as llm:
        drafter = model_runner(llm).speculator
        propose, drafts = drafter.propose, []
        drafter.propose = lambda *args, **kwargs: record(propose(*args, **kwargs), drafts)
        found = []
        for _ in range(2):
            found.append((generate(llm, [BATCHES["greedy"]()]), drafts.copy()))
            drafts.clear()
            llm.collective_rpc(lambda worker: sleep_and_wake(worker, loaded))
    assert len(found[0][1]) > 20 and found[0] == found[1]


def record(drafted: torch.Tensor, drafts: list) -> torch.Tensor:
    drafts.append(drafted.tolist())
    return drafted


def reload(worker) -> None:
    """``collective_rpc("reload_weights")`` with the LM head, which is the embedding, doubled."""
    tensors = load_file(Path(TARGET) / "model.safetensors")
    tensors["model.embed_tokens.weight"] *= 2
    worker.model_runner.reload_weights(weights_iterator=iter(tensors.items()))


def transfer(wrapper) -> None:
    """The end of a weight transfer; its engines need a GPU, and have written the weights in place by then."""
    worker = wrapper.worker
    with torch.no_grad():
        worker.model_runner.model.lm_head.weight.mul_(2)
    nothing = SimpleNamespace(
        finish_weight_update=lambda: None, reset_weight_update_target=lambda: None, shutdown=lambda: None
    )
    worker.weight_transfer_engine, worker._weight_update_active = nothing, True
    worker.finish_weight_update()


@pytest.mark.parametrize("update", [reload, transfer])
def test_new_weights_of_the_target_reach_the_draft_vocabulary(make_engine, spec, reduced_head, update):
    """A head with a part of the vocabulary has copied its rows of the LM head; CUDA graphs read them where they are."""

    def rows_before_and_after(worker) -> tuple[torch.Tensor, torch.Tensor, bool]:
        logits = worker.model_runner.speculator.drafter.logits
        before, address = logits.rows.clone(), logits.rows.data_ptr()
        update(worker)
        hidden = torch.randn(3, before.shape[1])
        torch.testing.assert_close(logits(hidden), hidden @ logits.rows.T, atol=1e-4, rtol=1e-4)
        return before, logits.rows, logits.rows.data_ptr() == address

    with make_engine(spec(8, model=reduced_head)) as llm:
        before, after, same_place = llm.collective_rpc(rows_before_and_after)[0]
    assert torch.equal(after, 2 * before) and same_place
