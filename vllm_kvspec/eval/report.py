# SPDX-License-Identifier: Apache-2.0
"""The eval command: acceptance of a head over held-out prompts at several temperatures, as a table and as json."""

from dataclasses import asdict

import torch

from vllm_kvspec.config import check_fingerprint, target_fingerprint
from vllm_kvspec.eval.acceptance import Acceptance, evaluate, repeated_share, write_texts
from vllm_kvspec.models.draft_head import KVSpecDraftModel
from vllm_kvspec.train.data import cut_prompts, load_texts
from vllm_kvspec.train.run import load_target


def measure(
    target_model: str,
    draft_model: str,
    data_path: list[str],
    *,
    num_prompts: int,
    prompt_length: int,
    max_new_tokens: int,
    temperatures: list[float],
    num_nodes: list[int],
    beam: int,
    width: int,
    seed: int,
) -> dict:
    """Print one table and return the numbers with the conditions they were measured under (float32, torch)."""
    target, tokenizer = load_target(target_model)
    head = KVSpecDraftModel.from_pretrained(draft_model, dtype=torch.float32).eval()
    check_fingerprint(head.config, target_fingerprint(target.config.get_text_config(), tokenizer))
    prompts = cut_prompts(load_texts(data_path), tokenizer, num_prompts, prompt_length, seed)
    block = head.config.draft_block_size
    runs = []
    for temperature in temperatures:
        texts = write_texts(target, tokenizer, prompts, max_new_tokens=max_new_tokens, temperature=temperature)
        # The last `block` tokens cannot be anchors, so a shorter continuation measures nothing.
        texts = [text for text in texts if len(text.input_ids) - text.prompt_length > block]
        for coupled in (True, False) if temperature > 0 else (False,):
            options = {"temperature": temperature, "coupled": coupled, "beam": beam, "width": width}
            found, less_repetitive = evaluate(head, target, texts, num_nodes, **options)
            shares = [repeated_share(text) for text in texts]
            runs.append(
                {
                    "temperature": temperature,
                    "coupled": coupled,
                    "texts": len(texts),
                    "repeated_8gram_share": round(sum(shares) / len(shares), 3),
                    "trees": {name: _rounded(acceptance) for name, acceptance in found.items()},
                    "less_repetitive_half": {name: _rounded(half) for name, half in less_repetitive.items()},
                }
            )
            _print_run(runs[-1])
    conditions = {
        "num_prompts": num_prompts,
        "prompt_length": prompt_length,
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "beam": beam,
        "width": width,
        "draft_block_size": block,
        "dtype": "float32",
    }
    return {"conditions": conditions, "runs": runs}


def _rounded(acceptance: Acceptance) -> dict:
    fields = asdict(acceptance)
    fields["conditional"] = [round(value, 3) for value in fields["conditional"]]
    return {key: round(value, 3) if isinstance(value, float) else value for key, value in fields.items()}


def _print_run(run: dict) -> None:
    mode = "" if run["temperature"] == 0 else ", coupled" if run["coupled"] else ", uncoupled"
    print(f"T={run['temperature']}{mode}: {run['texts']} texts, repeated 8-grams {run['repeated_8gram_share']}")
    for part in ("trees", "less_repetitive_half"):
        taus = "  ".join(f"{name} {tree['tau']:.2f}" for name, tree in run[part].items())
        print(f"  tau, {part.replace('_', ' ')}: {taus}")
    print(f"  a_k of the chain: {' '.join(f'{a:.2f}' for a in run['trees']['chain']['conditional'])}", flush=True)
