# SPDX-License-Identifier: Apache-2.0
"""Answers by servers: a made-up one that speaks vLLM's protocol and counts what it is asked. A real one:
``tests/examples/test_examples.py``."""

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from vllm_kvspec.train.regeneration import Answer, Request
from vllm_kvspec.train.server_writer import server_writer


class Server:
    """Answers a prompt with its tokens backwards, or as long as ``failures`` last with an error of the server's."""

    def __init__(self, max_model_len: int = 64, token_ids: bool = True, failures: int = 0):
        self.max_model_len, self.token_ids, self.failures = max_model_len, token_ids, failures
        self.asked: list[dict] = []
        self.active = self.most_active = 0
        self.lock = threading.Lock()

    def answer(self, body: dict) -> tuple[int, dict]:
        with self.lock:
            self.asked.append(body)
            self.active += 1
            self.most_active = max(self.most_active, self.active)
            failed, self.failures = self.failures > 0, self.failures - 1
        time.sleep(0.02)
        with self.lock:
            self.active -= 1
        if failed:
            return 503, {"error": {"message": "loading"}}
        tokens = body["prompt"][::-1][: body["max_tokens"]]
        choice = {"index": 0, "text": "", "finish_reason": "stop" if len(tokens) < body["max_tokens"] else "length"}
        if self.token_ids:
            choice["token_ids"] = tokens
        return 200, {"id": "x", "object": "text_completion", "created": 0, "model": "target", "choices": [choice]}


@contextmanager
def running(server: Server):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            self.reply(200, {"data": [{"id": "target", "object": "model", "max_model_len": server.max_model_len}]})

        def do_POST(self):
            self.reply(*server.answer(json.loads(self.rfile.read(int(self.headers["Content-Length"])))))

        def reply(self, status: int, body: dict) -> None:
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=http.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{http.server_port}/v1"
    finally:
        http.shutdown()
        http.server_close()


REQUESTS = [Request([i, 1, 2], max_new_tokens=4 - i % 2, temperature=0.5 * (i % 3), seed=i) for i in range(12)]


def test_two_servers_share_the_requests_and_no_server_has_too_many_at_once():
    first, second, bar = Server(), Server(), []
    with running(first) as one, running(second) as two:
        answers = server_writer([one, two], concurrency=2, max_length=64, answered=lambda: bar.append(1))(REQUESTS)
    assert answers == [Answer([2, 1, i], finished=i % 2 == 0) for i in range(12)]
    assert len(bar) == 12
    assert [len(server.asked) for server in (first, second)] == [6, 6]
    assert first.most_active + second.most_active <= 4
    asked = {body["prompt"][0]: body for server in (first, second) for body in server.asked}
    for i, body in asked.items():
        sampling = {key: body[key] for key in ("temperature", "seed", "top_p", "top_k", "max_tokens")}
        assert sampling == {"temperature": 0.5 * (i % 3), "seed": i, "top_p": 1, "top_k": 0, "max_tokens": 4 - i % 2}


def test_a_server_that_fails_for_a_moment_is_asked_again():
    server = Server(failures=2)
    with running(server) as url:
        assert server_writer([url], concurrency=1, max_length=64)(REQUESTS[:2]) == [
            Answer([2, 1, 0], finished=True),
            Answer([2, 1, 1], finished=False),
        ]
    assert len(server.asked) == 4


def test_what_no_rows_can_be_made_with():
    with running(Server(max_model_len=32)) as url, pytest.raises(ValueError, match="give --max_length 32"):
        server_writer([url], concurrency=1, max_length=64)
    with running(Server(token_ids=False)) as url, pytest.raises(ValueError, match="returns token ids"):
        server_writer([url], concurrency=1, max_length=64)(REQUESTS)


def test_no_server(monkeypatch):
    from vllm_kvspec.train import server_writer as module

    monkeypatch.setattr(module, "MAX_RETRIES", 0)
    with pytest.raises(ValueError, match="vllm serve TARGET"):
        server_writer(["http://127.0.0.1:9/v1"], concurrency=1, max_length=64)
