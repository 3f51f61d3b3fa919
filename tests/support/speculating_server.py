"""A server without a model that streams as vLLM does when it speculates, with vLLM's counters, on loopback."""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from loopback import QuietHandler, listening

MODEL = "served"


class SpeculatingServer:
    """The server. Prompts with "code" in them accept all drafted tokens every time, others every second time.

    Attributes:
        draft_tokens: Number of tokens drafted per round; 0 without speculation.
        fixed_seconds: Time of a round besides its drafted tokens.
        token_seconds: Time of each drafted token.
        requests: Bodies of all requests.
        most_at_once: Maximum number of concurrent requests.
        metrics: Replaces the page of counters.
        broken: Replaces the events of a response.
        refused_fields: Request fields that it refuses.
        has_usage: Whether it counts tokens.
        strays: Tokens that it generates for others with each request.
    """

    def __init__(self, draft_tokens: int) -> None:
        self.draft_tokens = draft_tokens
        self.fixed_seconds = self.token_seconds = 0.0
        self.requests: list[dict[str, Any]] = []
        self.most_at_once = self._at_once = 0
        self.metrics: str | None = None
        self.broken: list[str] | None = None
        self.refused_fields: set[str] = set()
        self.has_usage = True
        self.strays = 0
        self.models = [MODEL]
        self.url = ""
        self._counts: Counter[str] = Counter()
        self._lock = threading.Lock()

    def page(self) -> str:
        """Return the counters."""
        with self._lock:
            lines = [f'vllm:generation_tokens_total{{engine="0"}} {self._counts["generated"]}']
            if self.draft_tokens:
                for name in ("drafts", "draft_tokens", "accepted_tokens"):
                    lines.append(f'vllm:spec_decode_num_{name}_total{{engine="0"}} {self._counts[name]}')
                for position in range(self.draft_tokens):
                    name = f'accepted_tokens_per_pos_total{{engine="0",position="{position}"}}'
                    lines.append(f"vllm:spec_decode_num_{name} {self._counts[f'at {position}']}")
        return "\n".join(lines) + "\n"

    def events(self, body: dict[str, Any]) -> Iterator[dict[str, Any]]:
        """Yield the events of a response, which has as many tokens as it may have."""
        is_chat = "messages" in body
        asked = str(body["messages"][-1]["content"] if is_chat else body["prompt"])
        left = body["max_tokens"] - 1
        if is_chat:
            yield {"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]}
        yield self._event(is_chat, 1)
        number = 0
        while left > 0:
            time.sleep(self.fixed_seconds + self.token_seconds * self.draft_tokens)
            accepts = self.draft_tokens if "code" in asked or number % 2 == 0 else 0
            accepted, number = min(accepts, left - 1), number + 1
            left -= accepted + 1
            with self._lock:
                self._counts.update(drafts=1, draft_tokens=self.draft_tokens, accepted_tokens=accepted)
                self._counts.update({f"at {position}": 1 for position in range(accepted)})
            yield self._event(is_chat, accepted + 1)
        with self._lock:
            self._counts["generated"] += body["max_tokens"] + self.strays
        if self.has_usage:
            yield {"choices": [], "usage": {"completion_tokens": body["max_tokens"]}}

    def _event(self, is_chat: bool, tokens: int) -> dict[str, Any]:
        text = " word" * tokens
        return {"choices": [{"index": 0, "delta": {"content": text}} if is_chat else {"index": 0, "text": text}]}

    @contextmanager
    def answering(self, body: dict[str, Any]) -> Iterator[None]:
        """Count a request."""
        with self._lock:
            self.requests.append(body)
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            yield
        finally:
            with self._lock:
                self._at_once -= 1


@contextmanager
def speculating(draft_tokens: int) -> Iterator[SpeculatingServer]:
    """Run a server on a free port."""
    served = SpeculatingServer(draft_tokens)

    class Handler(QuietHandler):
        def do_GET(self) -> None:
            if self.path == "/v1/models":
                data = [{"id": name, "object": "model"} for name in served.models]
                self._send(200, json.dumps({"object": "list", "data": data}), "application/json")
            elif self.path == "/metrics":
                self._send(200, served.page() if served.metrics is None else served.metrics, "text/plain")
            else:
                self._send(404, "{}", "application/json")

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if refused := served.refused_fields & set(body):
                message = f"extra fields {sorted(refused)}"
                self._send(400, json.dumps({"error": {"message": message}}), "application/json")
                return
            self.send_response(200)
            self.send_header("Content-Type", "text/event-stream")
            self.end_headers()
            with served.answering(body):
                if served.broken is None:
                    for event in served.events(body):
                        self._write(json.dumps(event))
                    self._write("[DONE]")
                else:
                    for line in served.broken:
                        self._write(line)

        def _write(self, event: str) -> None:
            self.wfile.write(f"data: {event}\n\n".encode())
            self.wfile.flush()

        def _send(self, status: int, text: str, kind: str) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode())

    with listening(Handler) as url:
        served.url = url
        yield served
