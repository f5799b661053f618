# SPDX-License-Identifier: Apache-2.0
"""Everything we replace, override or rely on in vLLM has a test of what it does.

``compat.RUNNER_CONTRACT`` is checked at start and sees names and parameters, not meaning: vLLM 0.33 gave
``apply_grammar_bitmask`` other rows under the same signature. So each entry names a test that fails when the meaning
changes; on a new vLLM those tests are what says whether it fits.
"""

import ast
import contextlib
from pathlib import Path
from types import SimpleNamespace

import pytest
from vllm.v1.worker.gpu.eplb_utils import EPLBController
from vllm.v1.worker.gpu.model_runner import sort_batch_req_ids

from vllm_kvspec.engine.hooks import compat, patches
from vllm_kvspec.engine.worker import KVSpecWorker, Worker

HERE = Path(__file__).parent
IDENTITY = "test_identity.py::test_every_feature"
# Replaced without being in the contract: by whom -> its test.
REPLACED = {
    "patches._wrap_create_speculative_config": "test_config.py::test_defaults",
    "patches.offer_spec_method": "test_config.py::test_flags",
    "patches.allow_async_scheduling": "test_config.py::test_scheduling_is_asynchronous",
    "keys.KVSpecConfig.__post_init__": "test_config.py::test_every_key_of_vllm_is_honoured_or_refused",
    "keys.KVSpecConfig.draft_shares_target_positions": "test_config.py::test_the_head_does_not_shorten_the_target",
    "patches.serve_heads_by_their_name": "test_config.py::test_a_head_is_served_by_its_name",
    "patches.sample_with_min_p_and_logit_bias": IDENTITY,
    "patches.run_v2_without_triton": IDENTITY,
    "patches.rebind_kernels_beside_numba": "test_after_kvspec.py::test_plain_engine_between_two_of_kvspec",
    "cpu.worker.without_triton": IDENTITY,
    "cpu.kernels.install": "cpu_kernels/test_install.py::test_every_kernel_is_replaced_or_left_out",
    "cpu.worker.KVSpecCPUWorker.init_device": "test_after_kvspec.py::test_plain_engine_between_two_of_kvspec",
    "verify.attention_registry.cpu_backend": "test_after_kvspec.py::test_plain_engine_between_two_of_kvspec",
    "verify.decode_graphs.plan_decode_graphs": "test_faked_gpu.py::test_every_choice_has_a_cuda_graph",
}
# Attribute path in vLLM -> the test of what it does.
CONTRACT = {
    "init_speculator": IDENTITY,
    "GPUModelRunner.load_model": IDENTITY,
    "GPUModelRunner.initialize_kv_cache": "test_kv_cache.py::test_no_layer_of_ours",
    "GPUModelRunner.reload_weights": "test_weights.py::test_new_weights_of_the_target_reach_the_draft_vocabulary",
    "GPUModelRunner.capture_model": "test_cuda_graphs.py::test_a_replay_gives_what_an_eager_draft_gives",
    "GPUModelRunner.add_requests": IDENTITY,
    "GPUModelRunner.prepare_attn": "test_kv_cache.py::test_equals_a_plain_forward",
    "GPUModelRunner.prepare_dummy_attn": "test_cuda_graphs.py::test_a_replay_gives_what_an_eager_draft_gives",
    "GPUModelRunner.sample": "test_kv_cache.py::test_equals_a_plain_forward",
    "LoRAModelRunnerMixin._set_active_loras": "test_lora.py::test_adapters",
    "GPUModelRunner.execute_model": "test_budget.py::test_steps_are_timed_and_the_scheduler_gets_the_table",
    "GPUModelRunner.sample_tokens": "test_budget.py::test_steps_are_timed_and_the_scheduler_gets_the_table",
    "Worker._make_model_runner": "test_cuda_graphs.py::test_a_replay_gives_what_an_eager_draft_gives",
    "Worker.compile_or_warm_up_model": "test_contract.py::test_timed_steps_count_no_expert_load",
    "Worker.finish_weight_update": "test_weights.py::test_new_weights_of_the_target_reach_the_draft_vocabulary",
    "Scheduler.schedule": "test_recycle.py::test_only_requests_of_the_same_salt_learn_from_each_other",
    "Scheduler.update_from_output": "test_budget.py::test_steps_are_timed_and_the_scheduler_gets_the_table",
    "Scheduler.make_spec_decoding_stats": (
        "test_budget.py::test_text_is_that_of_plain_decoding_while_the_nodes_change"
    ),
    "RejectionSampler._verify": IDENTITY,
    "RejectionSampler._get_logprobs_tensors": "test_identity.py::test_oracle_trees",
    "DraftModelSpeculator.set_attn": IDENTITY,
    "CudaGraphManager._init_candidates": "test_faked_gpu.py::test_the_drafter_has_a_graph_for_every_choice",
    "CudaGraphManager.capture": "test_cuda_graphs.py::test_a_replay_gives_what_an_eager_draft_gives",
    "CudaGraphManager.dispatch": "test_faked_gpu.py::test_the_drafter_has_a_graph_for_every_choice",
    "FlashAttentionMetadataBuilder.build": "test_attention_cuda.py::test_rows",
    "FlashAttentionImpl.forward": "test_attention_cuda.py::test_rows",
    "TritonAttentionMetadataBuilder.build": "test_attention_cuda.py::test_rows",
    "TritonAttentionImpl.forward": "test_attention_cuda.py::test_rows",
    "Sampler.get_logprobs_dims": IDENTITY,
    "compute_topk_scores": IDENTITY,
    "sort_batch_req_ids": "test_contract.py::test_requests_with_drafts_lead",
    "gumbel_sample": "../kernels/test_gumbel_noise.py::test_vllm_samples_the_argmax_of_logits_plus_our_noise",
}


def test_every_entry_has_a_behaviour_test():
    assert set(CONTRACT) == {path for _, path in compat.RUNNER_CONTRACT}
    functions = {f"patches.{name}" for name in ("_wrap_create_speculative_config", *vars(patches))}
    assert {name for name in REPLACED if name.startswith("patches.")} <= functions


@pytest.mark.parametrize("test", sorted({*CONTRACT.values(), *REPLACED.values()}))
def test_the_named_test_exists(test):
    file, name = test.split("::")
    tree = ast.parse((HERE / file).read_text())
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_requests_with_drafts_lead():
    """``TreeMetadataBuilder`` gives the tree kernel a batch's leading requests."""
    num_tokens = {"prompt": 30, "decode": 1, "short": 3, "tree": 5, "tree-like prompt": 5}
    drafts = {"tree": [1, 2, 3, 4], "short": [1, 2], "decode": []}
    order = sort_batch_req_ids(num_tokens, drafts, 5)
    assert set(order[:2]) == {"tree", "short"}
    assert sorted(order) == sorted(num_tokens)


def test_timed_steps_count_no_expert_load(monkeypatch):
    """0.33 warms up inside ``eplb.suppress()``; the steps that we time are warm-up too."""
    log = []

    @contextlib.contextmanager
    def suppress():
        log.append("suppressed")
        yield
        log.append("counted")

    monkeypatch.setattr(Worker, "compile_or_warm_up_model", lambda self: log.append("warm-up"))
    worker = object.__new__(KVSpecWorker)
    worker.vllm_config = SimpleNamespace(speculative_config=SimpleNamespace(budget="auto", budget_costs=None))
    worker.model_runner = SimpleNamespace(
        eplb=SimpleNamespace(suppress=suppress), measure_step_costs=lambda: log.append("timed")
    )
    worker.compile_or_warm_up_model()
    assert log == ["warm-up", "suppressed", "timed", "counted"]
    assert hasattr(EPLBController, "suppress") is (compat.installed_minor() >= (0, 33))
    worker.model_runner.eplb = SimpleNamespace()
    worker.compile_or_warm_up_model()
    assert log[-1] == "timed"
