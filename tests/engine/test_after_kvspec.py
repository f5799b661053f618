# SPDX-License-Identifier: Apache-2.0
"""Engines in one process do not see each other: after kvspec, plain vLLM is plain vLLM, and then kvspec works again."""

import requests_mix
from engine_runner import PLAIN_ENGINE, generate


def attention_classes(llm) -> set[str]:
    layers = llm.llm_engine.vllm_config.compilation_config.static_forward_context.values()
    return {f"{type(layer.impl).__module__}.{type(layer.impl).__name__}" for layer in layers}


def test_plain_engine_between_two_of_kvspec(reference, make_engine, spec, same):
    batch, expected = requests_mix.greedy_batch()[:4], reference["greedy"][:4]
    for speculative_config, keys in [(spec(4), {}), (None, PLAIN_ENGINE), (spec(4), {})]:
        with make_engine(speculative_config, **keys) as llm:
            ours = [name.startswith("vllm_kvspec.") for name in attention_classes(llm)]
            assert ours == [speculative_config is not None]
            same(generate(llm, [batch]), [expected])
