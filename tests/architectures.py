# SPDX-License-Identifier: Apache-2.0
"""Targets of every kind that vLLM serves, as small configurations with random weights, and what kvspec does with them.

``docs/models.md`` is made of this list (``make models``), and ``tests/engine/test_models.py`` runs it.
"""

from dataclasses import dataclass, field
from typing import Any

SHAPE = dict(
    vocab_size=512, hidden_size=64, intermediate_size=96, num_hidden_layers=4, max_position_embeddings=128,
    num_attention_heads=2, num_key_value_heads=1, tie_word_embeddings=False, initializer_range=0.1, pad_token_id=0,
    bos_token_id=1, eos_token_id=2,
)  # fmt: skip
HEAD_32 = dict(head_dim=32)
# Configurations name the same thing in several ways; each takes those it knows.
MOE = dict(
    num_experts=4, num_local_experts=4, n_routed_experts=4, moe_num_experts=4, num_experts_per_tok=2, moe_k=2,
    moe_topk=2, moe_intermediate_size=32, n_group=1, topk_group=1,
)  # fmt: skip
# Shorter than the texts.
WINDOW = dict(sliding_window=20)
INTERLEAVED = WINDOW | dict(layer_types=["sliding_attention", "full_attention"] * 2)
PER_TYPE_ROPE = dict(
    rope_parameters={
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
        "full_attention": {"rope_type": "linear", "rope_theta": 1000000.0, "factor": 8.0},
    }
)
# Heads of 32 within a window and of 64 in full attention, capped logits.
GEMMA4 = (
    HEAD_32
    | INTERLEAVED
    | dict(
        global_head_dim=64, final_logit_softcapping=5.0, tie_word_embeddings=True,
        hidden_size_per_layer_input=0, vocab_size_per_layer_input=0,
    )
)  # fmt: skip


@dataclass(frozen=True)
class Case:
    """An architecture, by the model type of transformers, or a ``kind`` of it. ``refusal``: words of the sentence that
    refuses it at start; without them its text must be that of plain decoding. ``plain_fails``: why vLLM itself does not
    run it on a CPU. ``torch_fields``: what transformers must be told to compute as vLLM does. ``versions``: of vLLM,
    where it was tried.
    """

    model_type: str
    families: str
    special: str
    fields: dict[str, Any] = field(default_factory=dict)
    refusal: str = ""
    plain_fails: str = ""
    torch_fields: dict[str, Any] = field(default_factory=dict)
    versions: str = "0.32, 0.33"
    kind: str = ""

    @property
    def name(self) -> str:
        return f"{self.model_type} {self.kind}".strip()

    @property
    def config(self) -> dict[str, Any]:
        return {**SHAPE, **self.fields}

    @property
    def is_served(self) -> bool:
        return not (self.refusal or self.plain_fails)


CASES = [
    Case("llama", "Llama 2 and 3, Yi, SmolLM 1 and 2", "dense, grouped queries"),
    Case("qwen2", "Qwen 1.5 to 2.5", "biases in attention, tied embeddings", fields=dict(tie_word_embeddings=True)),
    Case("qwen3", "Qwen 3", "normed queries and keys", fields=HEAD_32),
    Case("mistral", "Mistral 7B", "sliding window in every layer", fields=WINDOW),
    Case("ministral3", "Ministral 3", "YaRN, queries scaled by position"),
    Case(
        "gemma",
        "Gemma",
        "scaled embeddings, norms of 1 + weight, tied",
        fields=HEAD_32 | dict(tie_word_embeddings=True),
    ),
    Case(
        "gemma2",
        "Gemma 2",
        "soft-capped attention and logits",
        fields=HEAD_32 | INTERLEAVED | dict(tie_word_embeddings=True),
    ),
    Case(
        "gemma3_text",
        "Gemma 3 (text)",
        "interleaved windows, RoPE per layer type, scaled embeddings",
        fields=HEAD_32 | INTERLEAVED | PER_TYPE_ROPE | dict(query_pre_attn_scalar=24),
    ),
    Case("olmo", "OLMo", "norms without weights"),
    Case("olmo2", "OLMo 2", "norms after attention and MLP"),
    Case("olmo3", "OLMo 3", "interleaved windows, RoPE per layer type", fields=INTERLEAVED | PER_TYPE_ROPE),
    Case(
        "cohere",
        "Command R",
        "parallel attention and MLP, RoPE of neighbouring pairs, scaled logits",
        dict(tie_word_embeddings=True),
    ),
    Case(
        "cohere2",
        "Command R7B, Command A",
        "interleaved windows, no RoPE in full attention",
        fields=INTERLEAVED | dict(tie_word_embeddings=True),
        # vLLM's window is one wider, as the model was trained.
        torch_fields=dict(sliding_window=21),
    ),
    Case(
        "granite",
        "Granite 3",
        "scaled embeddings, attention, residuals and logits",
        fields=dict(embedding_multiplier=3.0, logits_scaling=4.0, residual_multiplier=0.5, attention_multiplier=0.25),
    ),
    Case("phi", "Phi 1.5 and 2", "partial RoPE, parallel attention and MLP, bias of the LM head"),
    Case("phi3", "Phi 3 and 4", "partial RoPE, window", fields=WINDOW | dict(partial_rotary_factor=0.5)),
    Case("glm4", "GLM 4", "partial RoPE of neighbouring pairs, four norms a layer", fields=HEAD_32),
    Case("stablelm", "StableLM 2", "partial RoPE, LayerNorm"),
    Case(
        "gpt_neox", "Pythia, GPT-NeoX", "partial RoPE, parallel attention and MLP", fields=dict(num_key_value_heads=2)
    ),
    Case("falcon", "Falcon 7B", "one key head, parallel attention and MLP"),
    Case("starcoder2", "StarCoder 2", "LayerNorm, biases, no gate in the MLP"),
    Case("smollm3", "SmolLM 3", "no RoPE in every fourth layer", fields=dict(no_rope_layers=[1, 0, 1, 0])),
    Case("exaone4", "EXAONE 4", "interleaved windows, no RoPE in full attention", fields=INTERLEAVED),
    Case("ernie4_5", "ERNIE 4.5", "RoPE of neighbouring pairs", fields=HEAD_32),
    Case("nemotron", "Nemotron 4, Minitron", "LayerNorm of 1 + weight, partial RoPE, squared ReLU"),
    Case("apertus", "Apertus", "xIELU, no gate in the MLP"),
    Case("seed_oss", "Seed-OSS", "biases in attention", fields=HEAD_32),
    Case("hunyuan_v1_dense", "Hunyuan dense", "queries and keys normed after RoPE", fields=HEAD_32),
    Case("mixtral", "Mixtral", "mixture of experts", fields=MOE),
    Case(
        "qwen2_moe",
        "Qwen 1.5 and 2 MoE",
        "mixture of experts, one shared",
        fields=MOE | dict(shared_expert_intermediate_size=32),
    ),
    Case("qwen3_moe", "Qwen 3 MoE", "mixture of experts, normed queries and keys", fields=MOE | HEAD_32),
    Case("olmoe", "OLMoE", "mixture of experts", fields=MOE),
    Case("granitemoe", "Granite 3 MoE", "mixture of experts, scaled as Granite", fields=MOE),
    Case(
        "glm4_moe",
        "GLM 4.5 to 4.7",
        "mixture of experts, partial RoPE",
        fields=MOE | HEAD_32 | dict(first_k_dense_replace=1),
    ),
    Case("ernie4_5_moe", "ERNIE 4.5 MoE", "mixture of experts, RoPE of neighbouring pairs", fields=MOE | HEAD_32),
    Case(
        "exaone_moe",
        "K-EXAONE",
        "mixture of experts, interleaved windows, no RoPE in full attention",
        fields=MOE | INTERLEAVED,
    ),
    Case(
        "afmoe",
        "Trinity",
        "mixture of experts, gated attention, no RoPE in full attention",
        fields=MOE
        | INTERLEAVED
        | HEAD_32
        | dict(num_dense_layers=1, score_func="sigmoid", route_norm=True, route_scale=1.0),
    ),
    Case(
        "phimoe",
        "Phi 3.5 MoE",
        "mixture of experts, LayerNorm",
        fields=MOE,
        plain_fails="its code in transformers and vLLM's backend for that disagree",
    ),
    Case(
        "minimax_m2",
        "MiniMax M2",
        "mixture of experts, partial RoPE",
        fields=MOE | HEAD_32,
        plain_fails="vLLM's CPU kernels route experts by softmax only",
    ),
    Case(
        "gpt_oss",
        "gpt-oss",
        "attention sinks, mixture of experts",
        fields=MOE | INTERLEAVED | HEAD_32,
    ),
    Case(
        "gpt2",
        "GPT-2",
        "learned positions",
        fields=dict(n_embd=64, n_layer=4, n_head=2, n_positions=128),
        refusal="no rotary positions",
    ),
    Case(
        "opt",
        "OPT",
        "learned positions",
        fields=dict(ffn_dim=96, word_embed_proj_dim=64),
        refusal="no rotary positions",
    ),
    Case("bloom", "BLOOM", "ALiBi", refusal="ALiBi positions"),
    Case(
        "deepseek_v3",
        "DeepSeek V3 and R1, Kimi K2",
        "latent attention",
        fields=MOE,
        refusal="multi-head latent attention",
    ),
    Case("llama4_text", "Llama 4", "chunked attention", fields=MOE | HEAD_32, refusal="plain K and V"),
    Case(
        "gemma3n_text",
        "Gemma 3n",
        "layers that share one KV cache",
        HEAD_32
        | INTERLEAVED
        | dict(
            num_kv_shared_layers=2,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=512,
            laurel_rank=8,
            activation_sparsity_pattern=[0.0] * 4,
        ),
        plain_fails="it does not find the weights of a checkpoint of text alone",
    ),
    Case(
        "gemma4_text",
        "Gemma 4 E2B and E4B (text)",
        "heads of two sizes, layers that share one KV cache, embeddings per layer",
        GEMMA4
        | dict(
            num_kv_shared_layers=2,
            use_double_wide_mlp=True,
            hidden_size_per_layer_input=16,
            vocab_size_per_layer_input=512,
        ),
        kind="small",
    ),
    Case(
        "gemma4_text",
        "Gemma 4 12B and 31B (text)",
        "heads of two sizes and numbers, values equal to keys in full attention",
        GEMMA4 | dict(num_key_value_heads=2, attention_k_eq_v=True, num_global_key_value_heads=1),
        kind="dense",
    ),
    Case(
        "gemma4_text",
        "Gemma 4 26B-A4B (text)",
        "heads of two sizes, mixture of experts",
        GEMMA4
        | MOE
        | dict(attention_k_eq_v=True, num_global_key_value_heads=1, enable_moe_block=True, top_k_experts=2),
        kind="experts",
    ),
    Case(
        "qwen3_next",
        "Qwen 3 Next",
        "linear attention in most layers",
        fields=MOE | HEAD_32,
        refusal="hybrid or state-space layers",
    ),
    Case("mamba2", "Mamba 2", "no attention", dict(num_heads=4, head_dim=32), refusal="hybrid or state-space layers"),
]
