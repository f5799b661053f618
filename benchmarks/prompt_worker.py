# SPDX-License-Identifier: Apache-2.0
"""One method of ``bench_prompts.py`` in a process of its own: ``prompt_worker.py job.json out.jsonl``."""

import json
import sys
import time
from pathlib import Path
from typing import Any

# A histogram with one observation per engine step.
STEPS = "vllm:iteration_tokens_total"


def engine_steps(llm) -> int:
    """Since the engine's start."""
    return sum(metric.count for metric in llm.get_metrics() if metric.name == STEPS)


def measure(llm, prompts: list[dict], temperature: float, batch: int, job: dict[str, Any]) -> dict[str, Any]:
    """All prompts, ``batch`` at a time: token ids, seconds of each part, and alone the tokens per step of each prompt;
    where asked for, the mean log-probability of each text's tokens.

    Parts are the categories, or alone the prompts. Seconds are those of the fastest round. Tokens per step are those of
    the first and of the last round: with prefix caching the last one finds its prompts in the cache.
    """
    from vllm import SamplingParams

    logprobs = 0 if job.get("log_probs") else None
    params = [
        SamplingParams(temperature=temperature, max_tokens=job["max_tokens"], seed=i, logprobs=logprobs)
        for i in range(len(prompts))
    ]
    # The engine takes as many at a time as it may; fewer are given to it in parts.
    names = job["categories"] if batch > 1 else range(len(prompts))
    parts = [[i for i, name in enumerate(names) if name == part] for part in dict.fromkeys(names)]
    token_ids: list[list[int]] = [[]] * len(prompts)
    log_probs = [0.0] * len(prompts)
    seconds, taus = [float("inf")] * len(parts), []
    for _ in range(job["rounds"]):
        taus.append([])
        for number, part in enumerate(parts):
            before, start = engine_steps(llm), time.perf_counter()
            outputs = llm.generate([prompts[i] for i in part], [params[i] for i in part], use_tqdm=False)
            seconds[number] = min(seconds[number], time.perf_counter() - start)
            for i, output in zip(part, outputs, strict=True):
                token_ids[i] = list(output.outputs[0].token_ids)
                if logprobs is not None:
                    log_probs[i] = output.outputs[0].cumulative_logprob / len(token_ids[i])
            # The prompt's step gives one token.
            taus[-1].append((len(token_ids[part[0]]) - 1) / max(1, engine_steps(llm) - before - 1))
    return {
        "temperature": temperature,
        "batch": batch,
        "token_ids": token_ids,
        "taus": taus[0] if batch == 1 else None,
        "taus_again": taus[-1] if batch == 1 and job["rounds"] > 1 else None,
        "log_probs": None if logprobs is None else log_probs,
        "parts": parts,
        "seconds": seconds,
    }


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    llm = LLM(**job["engine"])
    tokenizer = llm.get_tokenizer()
    chats = ([{"role": "user", "content": text}] for text in job["prompts"])
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    prompts = [{"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts]
    # What is compiled or packed at first use is not timed.
    llm.generate(prompts[:2], SamplingParams(temperature=1.0, max_tokens=8, seed=0), use_tqdm=False)
    with Path(sys.argv[2]).open("w") as out:
        for temperature in job["temperatures"]:
            for batch in job["batch"]:
                print(json.dumps(measure(llm, prompts, temperature, batch, job)), file=out, flush=True)


if __name__ == "__main__":
    main()
