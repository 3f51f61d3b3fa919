"""A stand-in engine without a model, on loopback, with faults that real engines rarely show."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from loopback import QuietHandler, listening

MODEL = "stand-in"
Fault = Callable[[dict[str, Any]], "int | None"]


def reply_ids(body: dict[str, Any]) -> list[int]:
    """Return the reply: tokens that depend only on the chat and the seed, with 2 at the end."""
    length = sum(len(message["content"]) for message in body["messages"])
    return [*(10 + (body["seed"] + length + step) % 50 for step in range(3)), 2]


def prompt_ids(messages: list[dict[str, str]]) -> list[int]:
    """Return the prompt tokens: 1, the characters of a message and 3; a reply maps to the tokens it consists of."""
    tokens = []
    for message in messages:
        if message["role"] == "assistant":
            tokens += [*map(int, message["content"].split()), 2]
        else:
            tokens += [1, *(60 + ord(letter) % 40 for letter in message["content"]), 3]
    return tokens


class StandIn:
    """The engine.

    Attributes:
        requests: Bodies of all requests except probes (which request one token).
        fault: Returns the status with which a request fails, or None for success. 0 closes the connection.
        delay: Seconds until the response.
        raw: Returns a body that replaces the response; None for the correct one.
        drips: Whether the response never ends, sent byte by byte.
        token_ids: Whether it returns token ids, as vLLM does.
        refused_fields: Request fields that it refuses, as a strict engine does.
        keys: Authorization headers received.
        most_at_once: Maximum number of concurrent requests.
    """

    def __init__(self) -> None:
        self.requests: list[dict[str, Any]] = []
        self.fault: Fault = lambda body: None
        self.delay = 0.0
        self.raw: Callable[[dict[str, Any]], bytes | None] = lambda body: None
        self.drips = False
        self.token_ids = True
        self.finish = "stop"
        self.refused_fields: set[str] = set()
        self.keys: set[str | None] = set()
        self.models = [MODEL]
        self.most_at_once = self._at_once = 0
        self.probes = 0
        self.lock = threading.Lock()
        self.url = ""

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        if refused := self.refused_fields & set(body):
            return 422, {"detail": f"Unexpected fields in the request: {refused}"}
        if (status := self.fault(body)) is not None:
            return status, {"error": {"message": f"fault {status}"}}
        if body["model"] != MODEL:
            return 404, {"error": {"message": f"The model `{body['model']}` does not exist."}}
        ids = reply_ids(body)
        message = {"role": "assistant", "content": " ".join(map(str, ids[:-1]))}
        choice: dict[str, Any] = {"index": 0, "finish_reason": self.finish, "message": message}
        answer: dict[str, Any] = {"id": "x", "object": "chat.completion", "created": 0, "model": MODEL}
        if self.token_ids and body.get("return_token_ids"):
            choice["token_ids"], answer["prompt_token_ids"] = ids, prompt_ids(body["messages"])
        usage = {"prompt_tokens": 1, "completion_tokens": len(ids), "total_tokens": 1 + len(ids)}
        return 200, {**answer, "choices": [choice], "usage": usage}

    def complete(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        with self.lock:
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
            if body["max_tokens"] > 1:
                self.requests.append(body)
            else:
                self.probes += 1
        time.sleep(self.delay if body["max_tokens"] > 1 else 0)
        try:
            return self.answer(body)
        finally:
            with self.lock:
                self._at_once -= 1


@contextmanager
def serving() -> Iterator[StandIn]:
    """Run a stand-in on a free port."""
    engine = StandIn()

    class Handler(QuietHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": name, "object": "model"} for name in engine.models]})

        def do_POST(self) -> None:
            engine.keys.add(self.headers.get("Authorization"))
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            status, answer = engine.complete(body)
            raw = engine.raw(body)
            if engine.drips:
                self._drip()
            elif status:
                self._send(status, answer if raw is None else raw)
            else:
                self.close_connection = True

        def _drip(self) -> None:
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.end_headers()
            try:
                while engine.drips:
                    self.wfile.write(b" ")
                    self.wfile.flush()
                    time.sleep(0.02)
            except OSError:
                pass  # the client has disconnected
            self.close_connection = True

        def _send(self, status: int, answer: dict[str, Any] | bytes) -> None:
            content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
            try:
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content)
            except OSError:
                pass  # the client has disconnected

    with listening(Handler) as url:
        engine.url = f"{url}/v1"
        yield engine
