"""Servers that answer in every wrong way: a run ends with its rows or with one message, and so does a measurement."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import pytest

from specforge.engines.answering import EndpointAnswerer, EndpointSettings
from specforge.engines.asking import Asking
from specforge.engines.counters import measure
from specforge.engines.responses import write_responses
from specforge.errors import SpecforgeError
from specforge.sampling import Sampling

SEEDS, TRIALS = 2, 25
VOCABULARY = 61
MESSAGE = {"role": "assistant", "content": "hello"}
CHOICE = {"index": 0, "finish_reason": "stop", "message": MESSAGE, "token_ids": [5, 6, 2]}
USAGE = {"prompt_tokens": 2, "completion_tokens": 3, "total_tokens": 5}
COMPLETION = {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [CHOICE]}
COMPLETION |= {"prompt_token_ids": [1, 7], "usage": USAGE}
MODELS = {"object": "list", "data": [{"id": "m", "object": "model"}]}
INFO = {"internal_states": [{"avg_spec_accept_length": 2.5}], "speculative_num_steps": 3}
COUNTERS = "vllm:spec_decode_num_drafts_total 10.0\nvllm:spec_decode_num_accepted_tokens_total 20.0\n"
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    10**9,
    10**30,
    0.5,
    "",
    "hi",
    "\x1b[31m",
    "a\ud800b",
    [],
    [1],
    [None],
    {},
    {"a": 1},
]
RAW = [b"", b"null", b"<html>busy</html>", b"\x00\xff", b"[]", b"{", b'{"a":' * 3000, b'"hi"', b"NaN"]


class Server:
    """Answers each path with what is set for it, a status and a body.

    Attributes:
        answers: By path.
        asked: Chats asked so far; the first is the probe, which is answered well.
    """

    def __init__(self) -> None:
        self.url = ""
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.asked = 0

    def answer(self, path: str) -> tuple[int, bytes]:
        """Return status and body."""
        self.asked += path == "/v1/chat/completions"
        if path == "/v1/chat/completions" and self.asked == 1:
            return 200, json.dumps(COMPLETION).encode()
        return self.answers.get(path, (404, b"{}"))


@contextmanager
def serving() -> Iterator[Server]:
    """Run a server on a free port of this machine."""
    served = Server()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, body = served.answer(self.path)
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_POST = do_GET

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    served.url = f"http://127.0.0.1:{server.server_port}"
    Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
    try:
        yield served
    finally:
        server.shutdown()
        server.server_close()


def changed(chance: random.Random, values: dict[str, Any]) -> bytes:
    """Change an answer in one place, or as a whole."""
    if chance.random() < 0.2:
        return chance.choice(RAW)
    values = json.loads(json.dumps(values))
    place: Any = values
    while True:
        key = chance.choice(list(place) if isinstance(place, dict) else range(len(place)))
        if isinstance(place[key], dict | list) and place[key] and chance.random() < 0.7:
            place = place[key]
            continue
        if chance.random() < 0.3:
            del place[key]
        else:
            place[key] = chance.choice(ODD)
        break
    content = json.dumps(values).encode()
    return content[: chance.randrange(len(content))] if chance.random() < 0.1 else content


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_run_ends_with_whole_rows_or_one_message(seed: int, tmp_path: Path) -> None:
    chance = random.Random(seed)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    kept = 0
    with serving() as server:
        for trial in range(TRIALS):
            server.asked = 0
            status = chance.choice([200] * 8 + [400, 429, 500])
            server.answers["/v1/chat/completions"] = status, changed(chance, COMPLETION)
            server.answers["/v1/models"] = 200, json.dumps(MODELS).encode()
            if trial % 5 == 0:
                server.answers["/v1/models"] = 200, changed(chance, MODELS)
            url = server.url.replace("//", "//someone:sesame@")
            settings = EndpointSettings(
                [f"{url}/v1"], concurrency=1, max_failures=2, retries=0, timeout=5.0, vocabulary=VOCABULARY
            )
            answerer = EndpointAnswerer(settings, Asking(Sampling(), 8, 0))
            output = tmp_path / f"{trial}"
            try:
                write_responses([str(prompts)], None, {}, output, answerer.answer, lambda _: ({}, {}))
            except SpecforgeError as error:
                message = str(error)
                assert message.isprintable() and "sesame" not in message and len(message) < 1000, message
                assert server.url in message or "prompts" in message or "--model" in message, message
                continue
            kept += 1
            for line in (output / "responses.jsonl").read_text(encoding="utf-8").splitlines():
                row = json.loads(line)
                ids = row.get("input_ids", [1, 2])
                assert len(ids) > 1 and all(type(one) is int and 0 <= one < VOCABULARY for one in ids)
                assert "input_ids" in row or row["messages"][-1]["content"].strip()
    assert 0 < kept < TRIALS


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_measurement_ends_with_a_number_or_one_message(seed: int) -> None:
    chance = random.Random(seed)
    with serving() as server:
        for trial in range(TRIALS // 2):
            choice = {"index": 0, "text": "", "finish_reason": "length"}
            server.answers["/v1/models"] = (
                200,
                changed(chance, MODELS) if trial % 4 == 0 else json.dumps(MODELS).encode(),
            )
            done = {"id": "x", "object": "text_completion", "choices": [choice]}
            server.answers["/v1/completions"] = (
                200,
                changed(chance, done) if trial % 4 == 1 else json.dumps(done).encode(),
            )
            server.answers.pop("/get_server_info", None)
            if trial % 2:
                server.answers["/get_server_info"] = 200, changed(chance, INFO)
            spoiled = COUNTERS.replace("20.0", chance.choice(["1e999", "1e", "-5", "..", "20.0"]))
            server.answers["/metrics"] = 200, chance.choice([spoiled.encode(), *RAW])
            try:
                measured = measure(server.url.replace("//", "//someone:sesame@"), [([1], 2)])
            except SpecforgeError as error:
                message = str(error)
                assert server.url in message and "sesame" not in message and message.isprintable(), message
            else:
                assert 0 < measured.acceptance_length < 1e6
