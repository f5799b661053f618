# SPDX-License-Identifier: Apache-2.0
"""One method's engine for ``bench_prompts.py``, in a process of its own: ``prompt_worker.py job.json out.jsonl``.

Each line on stdin is a part to run, each line of ``out.jsonl`` what came of it; the first says that the engine is up.
"""

import json
import sys
import time
from collections import deque
from pathlib import Path
from typing import Any

# A histogram with one observation per engine step.
STEPS = "vllm:iteration_tokens_total"


def engine_steps(llm) -> int:
    """Since the engine's start."""
    return sum(metric.count for metric in llm.get_metrics() if metric.name == STEPS)


def answers_to(engine, requests: list[tuple], at_once: int) -> list:
    """As a server has it: where one request is done the next one begins."""
    waiting, done = deque(enumerate(requests)), {}
    while len(done) < len(requests):
        while waiting and engine.get_num_unfinished_requests() < at_once:
            number, (prompt, params) = waiting.popleft()
            engine.add_request(str(number), prompt, params)
        done |= {int(output.request_id): output for output in engine.step() if output.finished}
    return [done[number] for number in range(len(requests))]


def measure(llm, prompts: list[dict], part: dict[str, Any], job: dict[str, Any]) -> dict[str, Any]:
    """The prompts ``part["prompts"]`` (their numbers), ``part["batch"]`` of them at a time: token ids, seconds, engine
    steps, tokens found in the prefix cache; where asked for, the mean log-probability of each text's tokens."""
    from vllm import SamplingParams

    # A salt of its own: a table that drafts from earlier answers must not have these.
    inputs = [prompts[i] | {"cache_salt": part["salt"]} for i in part["prompts"]]
    asked = {"max_tokens": job["max_tokens"], "logprobs": 0 if job["log_probs"] else None}
    params = [SamplingParams(temperature=part["temperature"], seed=i, **asked) for i in part["prompts"]]
    before, start = engine_steps(llm), time.perf_counter()
    outputs = answers_to(llm.llm_engine, list(zip(inputs, params, strict=True)), part["batch"])
    seconds = time.perf_counter() - start
    found = {
        "token_ids": [list(output.outputs[0].token_ids) for output in outputs],
        "seconds": seconds,
        "steps": engine_steps(llm) - before,
        "cached": sum(output.num_cached_tokens or 0 for output in outputs),
    }
    if job["log_probs"]:
        answers = [output.outputs[0] for output in outputs]
        found["log_probs"] = [answer.cumulative_logprob / len(answer.token_ids) for answer in answers]
    return found


def main() -> None:
    job = json.loads(Path(sys.argv[1]).read_text())
    from vllm import LLM, SamplingParams

    llm = LLM(**job["engine"])
    tokenizer = llm.get_tokenizer()
    chats = ([{"role": "user", "content": text}] for text in job["prompts"])
    texts = [tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False) for chat in chats]
    prompts = [{"prompt_token_ids": tokenizer(text, add_special_tokens=False)["input_ids"]} for text in texts]
    # What is compiled or packed at first use is not timed.
    warm_up = [prompt | {"cache_salt": "warm up"} for prompt in prompts[:2]]
    llm.generate(warm_up, SamplingParams(temperature=1.0, max_tokens=8, seed=0), use_tqdm=False)
    with Path(sys.argv[2]).open("w") as out:
        print(json.dumps({}), file=out, flush=True)
        for line in sys.stdin:
            print(json.dumps(measure(llm, prompts, json.loads(line), job)), file=out, flush=True)


if __name__ == "__main__":
    main()
