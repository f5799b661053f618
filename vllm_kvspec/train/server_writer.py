# SPDX-License-Identifier: Apache-2.0
"""Answers for training rows from running OpenAI-compatible servers, so that many machines can share the work."""

import itertools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed

from vllm_kvspec.train.regeneration import Answer, Request, Writer

# Of one request: a server that restarts is waited for, with growing pauses.
MAX_RETRIES = 6


def server_writer(
    base_urls: Sequence[str],
    concurrency: int,
    max_length: int,
    answered: Callable[[], None] = lambda: None,
) -> Writer:
    """Answers by the servers at ``base_urls`` (".../v1"), in turn, ``concurrency`` requests at a time to each.

    A server must be vLLM's, which takes and returns token ids, and serve the target for rows of ``max_length`` tokens.
    ``answered`` is called for each answer; the key, if servers want one, is OPENAI_API_KEY of the environment. Raises
    ValueError for a server that cannot be reached, has less room, or returns no token ids.
    """
    from openai import OpenAI, OpenAIError

    api_key = os.environ.get("OPENAI_API_KEY", "none")
    clients = [OpenAI(base_url=url, api_key=api_key, max_retries=MAX_RETRIES, timeout=None) for url in base_urls]
    try:
        models = [client.models.list().data[0] for client in clients]
    except OpenAIError as error:
        raise ValueError(
            f"base_url must be that of running OpenAI-compatible servers; {', '.join(base_urls)}: {error}. Start one "
            'with `vllm serve TARGET`, and give for example "http://localhost:8000/v1".'
        ) from error

    names = [model.id for model in models]
    room = min(getattr(model, "max_model_len", None) or max_length for model in models)
    if room < max_length:
        raise ValueError(
            f"The servers must have room for rows of max_length {max_length} tokens, found {room}; give --max_length "
            f"{room}, or start them with a larger --max-model-len."
        )

    def ask(server: int, request: Request) -> Answer:
        completion = clients[server].completions.create(
            model=names[server],
            prompt=request.prompt,
            max_tokens=request.max_new_tokens,
            temperature=request.temperature,
            seed=request.seed,
            # Whatever generation_config.json says: the distribution must be the one that the head is taught.
            top_p=1.0,
            extra_body={"return_token_ids": True, "top_k": 0, "min_p": 0.0, "repetition_penalty": 1.0},
        )
        (said,) = completion.choices
        tokens = getattr(said, "token_ids", None)
        if tokens is None:
            raise ValueError(
                f"base_url must be that of a server that returns token ids; found none from {base_urls[server]}. Use "
                "vLLM's."
            )
        return Answer(list(tokens), finished=said.finish_reason == "stop")

    def write(requests: list[Request]) -> list[Answer]:
        servers = itertools.cycle(range(len(clients)))
        with ThreadPoolExecutor(concurrency * len(clients)) as pool:
            asked = [pool.submit(ask, server, request) for server, request in zip(servers, requests, strict=False)]
            try:
                for answer in as_completed(asked):
                    answer.result()
                    answered()
            except BaseException:
                pool.shutdown(wait=False, cancel_futures=True)
                raise
        return [answer.result() for answer in asked]

    return write
