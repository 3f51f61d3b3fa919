"""Servers with every kind of wrong response: a run gives its rows or one message, a measurement a number or one."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from loopback import QuietHandler, listening

from specforge.engines.answering import EndpointAnswerer
from specforge.engines.generation import GenerationSettings
from specforge.engines.pool import EndpointSettings
from specforge.engines.probing import measure
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
    """Answers each path with a preset status and body.

    Attributes:
        answers: Status and body by path.
        requested: Number of chat requests so far; the first is the probe, which is answered correctly.
    """

    def __init__(self) -> None:
        self.url = ""
        self.answers: dict[str, tuple[int, bytes]] = {}
        self.requested = 0

    def answer(self, path: str) -> tuple[int, bytes]:
        """Return status and body."""
        self.requested += path == "/v1/chat/completions"
        if path == "/v1/chat/completions" and self.requested == 1:
            return 200, json.dumps(COMPLETION).encode()
        return self.answers.get(path, (404, b"{}"))


@contextmanager
def serving() -> Iterator[Server]:
    """Run a server on a free port of this machine."""
    served = Server()

    class Handler(QuietHandler):
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

    with listening(Handler) as url:
        served.url = url
        yield served


def changed(rng: random.Random, values: dict[str, Any]) -> bytes:
    """Change one value of a response, or replace it."""
    if rng.random() < 0.2:
        return rng.choice(RAW)
    values = json.loads(json.dumps(values))
    node: Any = values
    while True:
        key = rng.choice(list(node) if isinstance(node, dict) else range(len(node)))
        if isinstance(node[key], dict | list) and node[key] and rng.random() < 0.7:
            node = node[key]
            continue
        if rng.random() < 0.3:
            del node[key]
        else:
            node[key] = rng.choice(ODD)
        break
    content = json.dumps(values).encode()
    return content[: rng.randrange(len(content))] if rng.random() < 0.1 else content


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_run_gives_complete_rows_or_one_message(seed: int, tmp_path: Path) -> None:
    rng = random.Random(seed)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": "b"}\n')
    kept = 0
    with serving() as server:
        for trial in range(TRIALS):
            server.asked = 0
            status = rng.choice([200] * 8 + [400, 429, 500])
            server.answers["/v1/chat/completions"] = status, changed(rng, COMPLETION)
            server.answers["/v1/models"] = 200, json.dumps(MODELS).encode()
            if trial % 5 == 0:
                server.answers["/v1/models"] = 200, changed(rng, MODELS)
            url = server.url.replace("//", "//someone:sesame@")
            settings = EndpointSettings(
                [f"{url}/v1"], concurrency=1, max_failures=2, retries=0, timeout=5.0, vocabulary=VOCABULARY
            )
            answerer = EndpointAnswerer(settings, GenerationSettings(Sampling(), 8, 0))
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
                assert len(ids) > 1 and all(type(token) is int and 0 <= token < VOCABULARY for token in ids)
                assert "input_ids" in row or row["messages"][-1]["content"].strip()
    assert 0 < kept < TRIALS


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_measurement_gives_a_number_or_one_message(seed: int) -> None:
    rng = random.Random(seed)
    with serving() as server:
        for trial in range(TRIALS // 2):
            choice = {"index": 0, "text": "", "finish_reason": "length"}
            server.answers["/v1/models"] = (
                200,
                changed(rng, MODELS) if trial % 4 == 0 else json.dumps(MODELS).encode(),
            )
            done = {"id": "x", "object": "text_completion", "choices": [choice]}
            server.answers["/v1/completions"] = (
                200,
                changed(rng, done) if trial % 4 == 1 else json.dumps(done).encode(),
            )
            server.answers.pop("/get_server_info", None)
            if trial % 2:
                server.answers["/get_server_info"] = 200, changed(rng, INFO)
            spoiled = COUNTERS.replace("20.0", rng.choice(["1e999", "1e", "-5", "..", "20.0"]))
            server.answers["/metrics"] = 200, rng.choice([spoiled.encode(), *RAW])
            try:
                measured = measure(server.url.replace("//", "//someone:sesame@"), [([1], 2)])
            except SpecforgeError as error:
                message = str(error)
                assert server.url in message and "sesame" not in message and message.isprintable(), message
            else:
                assert 0 < measured.acceptance_length < 1e6
