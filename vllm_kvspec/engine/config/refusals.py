# SPDX-License-Identifier: Apache-2.0
"""What kvspec cannot serve, refused at start: engine options, models, and heads that do not fit."""

from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, PreTrainedConfig
from vllm.config import ModelConfig, ParallelConfig
from vllm.platforms import current_platform
from vllm.utils.torch_utils import resolve_kv_cache_dtype_string

from vllm_kvspec.assistant import MODEL_TYPES
from vllm_kvspec.config import (
    KVSpecDraftConfig,
    check_fingerprint,
    target_fingerprint,
    tokenizer_sha256,
    unsupported_attention,
)

CUDA_WORKER = "vllm_kvspec.engine.worker.KVSpecWorker"
CPU_WORKER = "vllm_kvspec.engine.cpu.worker.KVSpecCPUWorker"
PLAIN_CACHE_DTYPES = ("auto", "float16", "bfloat16")
# Also with one scale per tensor: Triton compiles FP8 from this compute capability on.
CACHE_DTYPES = (*PLAIN_CACHE_DTYPES, "fp8", "fp8_e4m3")
FP8_CAPABILITY = 89


def refuse_engine_options(engine_args: Any, model: ModelConfig, parallel: ParallelConfig) -> None:
    """Raise ValueError for the first engine option that kvspec cannot serve with."""
    model_kind = (
        "multi-head latent attention"
        if model.use_mla
        else "encoder-decoder"
        if model.is_encoder_decoder
        else "hybrid or state-space layers"
        if model.is_hybrid or model.is_attention_free
        else "M-RoPE"
        if model.uses_mrope
        else "diffusion"
        if model.is_diffusion
        else "reference sliding-window attention"
        if model.rswa_window is not None
        else "images that attend to themselves in both directions (without them: --language-model-only)"
        if model.is_mm_prefix_lm
        else "no language model here (--mm-encoder-only, or an encoder that sends its outputs elsewhere)"
        if is_encoder_only(engine_args, model)
        else f"--runner {model.runner_type}"
        if model.runner_type != "generate"
        else unsupported_attention(model.hf_text_config)
    )
    if model_kind:
        raise ValueError(
            f"kvspec needs a decoder whose KV cache is plain attention; {model.model} has {model_kind}. "
            "Serve it without speculation or with another method."
        )
    cache_dtype = resolve_kv_cache_dtype_string(engine_args.kv_cache_dtype, model)
    cache_dtypes = CACHE_DTYPES if current_platform.has_device_capability(FP8_CAPABILITY) else PLAIN_CACHE_DTYPES
    options = [
        ("--pipeline-parallel-size", parallel.pipeline_parallel_size, parallel.pipeline_parallel_size > 1),
        (
            "--prefill-context-parallel-size",
            parallel.prefill_context_parallel_size,
            parallel.prefill_context_parallel_size > 1,
        ),
        (
            "--decode-context-parallel-size",
            parallel.decode_context_parallel_size,
            parallel.decode_context_parallel_size > 1,
        ),
        ("--enable-dbo", True, parallel.enable_dbo),
        # The same by another flag: vLLM would fall back to Model Runner V1.
        ("--ubatch-size", parallel.ubatch_size, parallel.use_ubatching),
        ("--enable-batch-sharded-sampling", True, parallel.enable_batch_sharded_sampling),
        ("--kv-transfer-config", "a connector", engine_args.kv_transfer_config is not None),
        # vLLM makes a connector of it.
        ("--kv-offloading-size", engine_args.kv_offloading_size, engine_args.kv_offloading_size is not None),
        ("--watermark-config", "a watermark", getattr(engine_args, "watermark_config", None) is not None),
        ("--kv-sharing-fast-prefill", True, engine_args.kv_sharing_fast_prefill),
        ("--kv-cache-dtype", cache_dtype, cache_dtype not in cache_dtypes),
        ("--worker-cls", parallel.worker_cls, parallel.worker_cls not in ("auto", CUDA_WORKER, CPU_WORKER)),
        ("--return-sampling-mask", True, getattr(model, "return_sampling_mask", False)),
        ("--enable-trace-replay", True, getattr(model, "enable_trace_replay", False)),
        # vLLM takes the first rows of a request for the accepted ones; on a tree they are not.
        ("--enable-return-routed-experts", True, engine_args.aux_output_config.enabled),
    ]
    for flag, value, set_by_user in options:
        if set_by_user:
            raise ValueError(
                f"kvspec does not support {flag}; found {value}. Leave the flag out, or serve without kvspec."
            )


def is_encoder_only(engine_args: Any, model: ModelConfig) -> bool:
    """Whether the engine is to run a multimodal model's encoder alone."""
    transfer = engine_args.ec_transfer_config
    flag = getattr(model.multimodal_config, "mm_encoder_only", False)
    return flag or (transfer is not None and transfer.is_encode_only)


def refuse_short_steps(engine_args: Any, nodes: int) -> None:
    """Raise ValueError where a step's tokens cannot hold a tree of ``nodes`` nodes, which always has as many.

    vLLM's scheduler fills a request that comes with one token left to compute (all others cached) up to a whole tree.
    In a shorter step it would wait for ever, and cut to the threshold of long prompts it stops the engine.
    """
    limits = (
        ("--max-num-batched-tokens", engine_args.max_num_batched_tokens),
        ("--max-num-scheduled-tokens", engine_args.max_num_scheduled_tokens),
        # 0: none.
        ("--long-prefill-token-threshold", engine_args.long_prefill_token_threshold or None),
    )
    for flag, limit in limits:
        if limit is not None and limit <= nodes:
            raise ValueError(
                f"kvspec verifies {nodes + 1} rows a request, num_speculative_tokens and one; {flag} must be at least "
                f'that, found {limit}. Raise it, lower num_speculative_tokens, or leave "budget" at "auto".'
            )


def load_head_config(model: str | None, revision: str | None) -> PreTrainedConfig:
    """The config.json of a head or an assistant, with its weight files' headers checked when they are local. Raises
    ValueError."""
    if not model:
        raise ValueError('kvspec needs a draft head: give "model", a head\'s directory or repository; found none.')
    try:
        head = AutoConfig.from_pretrained(model, revision=revision)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"kvspec's model must be a draft head's directory or repository; {model!r} could not be read as one: "
            f"{error}"
        ) from error
    if not isinstance(head, KVSpecDraftConfig) and head.model_type not in MODEL_TYPES:
        raise ValueError(
            f"kvspec's model must be a draft head (model_type {KVSpecDraftConfig.model_type!r}) or an assistant of "
            f"Gemma 4; {model!r} is a {head.model_type!r} model. Train a head for your target with `vllm-kvspec train`."
        )
    if quantised := getattr(head, "quantization_config", None):
        raise ValueError(
            f"kvspec serves draft heads whose weights are as they were trained; {model!r} is quantised "
            f"({quantised.get('quant_method')}). Use the one that it was made from: the target may be quantised."
        )
    for path in sorted(Path(model).glob("*.safetensors")):
        check_safetensors(path)
    if Path(model).is_dir() and not any(Path(model).glob("*.safetensors")):
        raise ValueError(f"kvspec's draft head {model!r} has a config.json but no *.safetensors file. Copy it whole.")
    return head


def check_safetensors(path: Path) -> None:
    """Raise ValueError when the file's header or length is broken. Reads the header only."""
    try:
        with safe_open(path, framework="pt"):
            pass
    except SafetensorError as error:
        raise ValueError(
            f"The draft head's weights {path} are damaged or cut short ({error}). Copy the file again."
        ) from error


def check_servable(head: KVSpecDraftConfig) -> None:
    """Raise ValueError for heads that need more context than the target's KV cache as it lies there."""
    if head.has_own_context:
        do = (
            "Serve it by vLLM's own method: vllm-kvspec export --format eagle3"
            if head.is_eagle3
            else 'It can be evaluated, not served: train a head with context "kv" or "hybrid" and fusion "direct"'
        )
        raise ValueError(
            f"kvspec serves heads that read only the target's KV cache; {head.name_or_path} (context {head.context!r}, "
            f"fusion {head.fusion!r}) needs a context cache of its own. {do}."
        )
    if head.fusion != "direct":
        raise ValueError(
            f"kvspec serves heads whose layers each read one target layer as it lies in the cache; "
            f"{head.name_or_path} (fusion {head.fusion!r}) reads a mix of layers {head.target_kv_layer_ids}. It can be "
            'evaluated, not served: train a head with fusion "direct".'
        )


def check_head_fits(head: KVSpecDraftConfig, target: ModelConfig) -> None:
    """Raise ValueError when the head was trained for another target than ``target``."""
    found = target_fingerprint(target.hf_text_config, None)
    if not target.skip_tokenizer_init:
        from vllm.renderers.chat_utils import PROMPT_EMBEDS_PLACEHOLDER_TOKEN
        from vllm.tokenizers import cached_tokenizer_from_config

        # An earlier engine of this process may have put vLLM's placeholder for prompt embeddings among the tokens.
        tokenizer = cached_tokenizer_from_config(target)
        found["tokenizer_sha256"] = tokenizer_sha256(tokenizer, ignored=PROMPT_EMBEDS_PLACEHOLDER_TOKEN)
    found["name_or_path"] = target.model
    check_fingerprint(head, found)
