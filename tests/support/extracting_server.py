"""A server on loopback that extracts hidden states as vLLM's ExampleHiddenStatesConnector does, on the CPU.

It answers ``/v1/completions`` (and, given a tokenizer, ``/v1/chat/completions``) first and writes
``<request>.safetensors`` afterwards, while it holds a lock that exists before the answer. Layer id k is the state after
k layers, and the number of layers the output of the last layer before the final norm, whatever specforge calls them:
both come from transformers here.
"""

from __future__ import annotations

import fcntl
import json
import os
import socket
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Lock, Thread
from typing import Any, Self
from uuid import uuid4

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Written = dict[str, Tensor]
Write = Callable[[Written | None], None]
_ONE_PASS = Lock()  # servers may share a model, and with it its hooks


class ExtractingServer:
    """The server; a context manager that ends it.

    Args:
        model: The verifier.
        layers: ``eagle_aux_hidden_state_layer_ids``.
        folder: ``shared_storage_path``.
        tokenizer: Renders chats; None if the server has none.

    Attributes:
        name: Name of the served model.
        rows: Tokens of each request that was answered with success, in order.
        requests: Number of all requests.
        fault: Returns the status with which a request fails, or None for success; 0 closes the connection. Its argument
            is the number of the request, from 1.
        written: Changes what is written for a request; None writes nothing.
        delay: Seconds between the answer and the end of writing.
        lost: Whether the answer to a request is lost on its way: its states are written, and the connection is closed.
        extracts: Whether the answer refers to states.
        max_tokens: Length from which rows are refused.
        most_at_once: Maximum number of requests whose states were not yet written.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        layers: Sequence[int],
        folder: Path,
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        self.model, self.layers, self.folder, self.tokenizer = model, layers, folder, tokenizer
        self.name = "verifier"
        self.rows: list[list[int]] = []
        self.requests = 0
        self.fault: Callable[[int], int | None] = lambda number: None
        self.written: Callable[[int, Written], Written | None] = lambda number, tensors: tensors
        self.lost: Callable[[int], bool] = lambda number: False
        self.delay = 0.0
        self.extracts = True
        self.max_tokens = 10**6
        self.most_at_once = self._at_once = 0
        self._gate, self._port, self._connections = Lock(), 0, set[socket.socket]()
        self._server: ThreadingHTTPServer | None = None

    @property
    def url(self) -> str:
        """Base URL."""
        return f"http://127.0.0.1:{self._port}/v1"

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()

    def start(self) -> None:
        """Start, after ``kill`` at the same address."""
        self._server = _Server(("127.0.0.1", self._port), _handler(self))
        self._port = self._server.server_port
        # In a forked client the port would stay open.
        os.register_at_fork(after_in_child=self._server.socket.close)
        Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True).start()

    def kill(self) -> None:
        """End at once: connections are closed, and files that are being written are left out."""
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()
            for one in list(self._connections):
                with suppress(OSError):
                    one.shutdown(socket.SHUT_RDWR)

    def answer(self, body: dict[str, Any]) -> tuple[int, dict[str, Any]]:
        """Return status and body, and begin to write the states."""
        with self._gate:
            self.requests += 1
            number = self.requests
        if (status := self.fault(number)) is not None:
            return status, {"error": {"message": f"fault {status}"}}
        prompt = self._prompt(body)
        if len(prompt) + body["max_tokens"] > self.max_tokens:
            return 400, {"error": {"message": f"This model's maximum context length is {self.max_tokens} tokens."}}
        reply = self._reply(prompt, body["max_tokens"]) if "messages" in body else [0]
        keeps_reply = (body.get("kv_transfer_params") or {}).get("include_output_tokens", False)
        tokens = prompt + reply[:-1] if keeps_reply else prompt
        with self._gate:
            self.rows.append(tokens)
            tensors = {
                "token_ids": torch.tensor(tokens),
                "hidden_states": _states(self.model, tuple(tokens))[:, self.layers],
            }
            self._at_once += 1
            self.most_at_once = max(self.most_at_once, self._at_once)
        answer: dict[str, Any] = {"id": "x", "object": "text_completion", "created": 0, "model": self.name}
        answer["choices"] = [{"index": 0, "text": "", "finish_reason": "length"}]
        if self.tokenizer is not None and "messages" in body:
            text = self.tokenizer.decode(reply, skip_special_tokens=True)
            finish = "stop" if reply[-1] in self._stop_tokens else "length"
            message = {"role": "assistant", "content": text}
            answer["choices"] = [{"index": 0, "message": message, "finish_reason": finish, "token_ids": reply}]
            answer["prompt_token_ids"] = prompt
        if not self.extracts:
            return 200, answer
        # As vLLM does: its own id is random at the end only.
        name = f"cmpl-{body['request_id'] or uuid4().hex}-0-{uuid4().hex[:8]}"
        parameters, write = self.begin_writing(name, tensors)
        Thread(target=self._write, args=(number, tensors, write), daemon=True).start()
        if self.lost(number):
            return 0, {}
        return 200, {**answer, "kv_transfer_params": parameters}

    def begin_writing(self, name: str, tensors: Written) -> tuple[dict[str, Any], Write]:
        """Return the ``kv_transfer_params`` of a request, and what writes its states or, for None, does not."""
        path = self.folder / f"{name}.safetensors"
        lock = os.open(f"{path}.lock", os.O_CREAT | os.O_WRONLY)
        fcntl.flock(lock, fcntl.LOCK_EX)

        def write(changed: Written | None) -> None:
            if changed is not None:
                save_file(changed, path)
            # A forked client has a copy of the file: closing it would not release the lock.
            fcntl.flock(lock, fcntl.LOCK_UN)
            os.close(lock)

        return {"hidden_states_path": str(path)}, write

    def _prompt(self, body: dict[str, Any]) -> list[int]:
        if self.tokenizer is None or "messages" not in body:
            return list(body["prompt"])
        text = self.tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        return list(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _reply(self, prompt: list[int], longest: int) -> list[int]:
        """Return the verifier's greedy answer."""
        with _ONE_PASS, torch.no_grad():
            ids = torch.tensor([prompt])
            whole = self.model.generate(
                ids, attention_mask=torch.ones_like(ids), max_new_tokens=longest, do_sample=False
            )
        return whole[0, len(prompt) :].tolist()

    @property
    def _stop_tokens(self) -> list[int]:
        stop = self.model.generation_config.eos_token_id
        return stop if isinstance(stop, list) else [stop]

    def _write(self, number: int, tensors: Written, write: Write) -> None:
        server = self._server
        time.sleep(self.delay)
        changed = self.written(number, tensors)
        write(changed if server is not None and server is self._server else None)
        with self._gate:
            self._at_once -= 1


@cache
def _states(model: PreTrainedModel, tokens: tuple[int, ...]) -> Tensor:
    """Return the states [T, N + 1, H] after 0 to N layers."""
    last: list[Tensor] = []
    with _ONE_PASS, torch.no_grad():
        hook = model.get_decoder().norm.register_forward_pre_hook(lambda _, inputs: last.append(inputs[0]))
        outputs = model(torch.tensor([tokens]), output_hidden_states=True, use_cache=False)
        hook.remove()
    # The last of transformers' states is after the final norm.
    return torch.stack([*outputs.hidden_states[:-1], last[0]], dim=2)[0]


class _Server(ThreadingHTTPServer):
    request_queue_size = 128
    daemon_threads = True

    def handle_error(self, *_: Any) -> None:
        """Say nothing about clients that have gone."""


def _handler(server: ExtractingServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def setup(self) -> None:
            super().setup()
            server._connections.add(self.connection)

        def finish(self) -> None:
            server._connections.discard(self.connection)
            super().finish()

        def do_GET(self) -> None:
            self._send(200, {"object": "list", "data": [{"id": server.name, "object": "model"}]})

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            chats = "/v1/chat/completions" if server.tokenizer else None
            if self.path not in ("/v1/completions", chats):
                self._send(404, {"error": {"message": "Not Found"}})
                return
            body["request_id"] = self.headers["X-Request-Id"]
            status, answer = server.answer(body)
            if status:
                self._send(status, answer)
            else:
                self.close_connection = True

        def _send(self, status: int, answer: dict[str, Any]) -> None:
            content = json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            pass

    return Handler
