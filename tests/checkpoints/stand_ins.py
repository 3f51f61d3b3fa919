"""Local servers that imitate a serving engine and the hub."""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from loopback import QuietHandler, listening

Answer = Callable[[str, str, bytes], tuple[int, str]]


@contextmanager
def serving(answer: Answer) -> Iterator[str]:
    """Serve on a free port.

    Args:
        answer: Gets method, path and body; returns status and text.

    Yields:
        The address.
    """

    class Handler(QuietHandler):
        def _reply(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            status, text = answer(self.command, self.path.partition("?")[0], body)
            content = text.encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json" if text[:1] in ("{", "[") else "text/plain")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        do_GET = do_POST = do_HEAD = _reply

    with listening(Handler) as url:
        yield url


class Engine:
    """A completions server with the counters of vLLM or SGLang.

    Args:
        kind: ``"vllm"``, ``"sglang"``, or something else for a server without speculation.
        accepted: Number of rounds that accept at least k = 1, 2, ... tokens, out of ten per request.
    """

    def __init__(self, kind: str, accepted: list[int]) -> None:
        self.kind = kind
        self.accepted = accepted
        self.requests: list[dict[str, Any]] = []

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, str]:
        """Answer as an engine."""
        if path == "/v1/models":
            return 200, json.dumps({"object": "list", "data": [{"id": "served", "object": "model"}]})
        if path == "/v1/completions":
            self.requests.append(json.loads(body))
            choice = {"index": 0, "text": "", "finish_reason": "length", "logprobs": None}
            return 200, json.dumps(
                {"id": "1", "object": "text_completion", "created": 0, "model": "served", "choices": [choice]}
            )
        if path == "/metrics" and self.kind == "vllm":
            return 200, self._metrics()
        if path == "/metrics":
            return 200, "process_cpu_seconds_total 1.0\n"
        if path == "/get_server_info" and self.kind == "sglang":
            length = 1 + sum(self.accepted) / 10
            state = {"avg_spec_accept_length": length if self.requests else None, "last_gen_throughput": 3.0}
            return 200, json.dumps({"speculative_num_steps": len(self.accepted), "internal_states": [state]})
        return 404, "{}"

    def _metrics(self) -> str:
        """Return two engines' counters; one has served other requests before."""
        rounds = 10 * len(self.requests)
        lines = ["# HELP vllm:spec_decode_num_drafts_total Number of spec decoding drafts.", "vllm:other_total 5.0"]
        for name, count in (
            ("drafts", rounds),
            ("draft_tokens", rounds * len(self.accepted)),
            ("accepted_tokens", sum(self.accepted) * len(self.requests)),
        ):
            lines.append(f'vllm:spec_decode_num_{name}_total{{engine="0",model_name="served"}} {1000.0}')
            lines.append(f'vllm:spec_decode_num_{name}_total{{engine="1",model_name="served"}} {float(count)}')
            lines.append(f'vllm:spec_decode_num_{name}_created{{engine="1",model_name="served"}} 1.7e+09')
        for position, count in enumerate(self.accepted):
            labels = f'engine="1",model_name="served",position="{position}"'
            lines.append(
                f"vllm:spec_decode_num_accepted_tokens_per_pos_total{{{labels}}} {float(count * len(self.requests))}"
            )
        return "\n".join(lines) + "\n"


class Hub:
    """The hub's API for uploads of small files."""

    def __init__(self) -> None:
        self.created: list[dict[str, Any]] = []
        self.files: dict[str, bytes] = {}

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, str]:
        """Answer as the hub."""
        if path == "/api/repos/create":
            self.created.append(json.loads(body))
            return 200, json.dumps({"url": "https://huggingface.co/owner/name", "name": "owner/name", "id": "1"})
        if path == "/api/validate-yaml":
            return 200, json.dumps({"errors": [], "warnings": []})
        if "/preupload/" in path:
            files = [
                {"path": file["path"], "uploadMode": "regular", "shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return 200, json.dumps({"files": files})
        if "/commit/" in path:
            for line in body.decode().splitlines():
                entry = json.loads(line)
                if entry["key"] == "file":
                    self.files[entry["value"]["path"]] = base64.b64decode(entry["value"]["content"])
            return 200, json.dumps(
                {"success": True, "commitOid": "0" * 40, "commitUrl": "https://huggingface.co/owner/name/commit/0"}
            )
        return 200, json.dumps({"id": "owner/name", "sha": "0" * 40, "siblings": []})
