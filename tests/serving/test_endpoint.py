"""``specforge verify --endpoint`` beside a real server: vLLM, with the export that is verified and with another one."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from serving import ENGINE_ENVIRONMENT, Served, speculation

from specforge.__main__ import main


@contextmanager
def server(verifier: Path, draft: Path, log: Path) -> Iterator[str]:
    """Serve a draft; yield the server's address."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--model", str(verifier), "--port", str(port), "--dtype", "float32", "--enforce-eager"]
    speculative = json.dumps(speculation(str(draft), "eagle3")["speculative_config"])
    words += ["--max-model-len", "512", "--speculative-config", speculative]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "vllm.entrypoints.openai.api_server", *words],
            env={**os.environ, **ENGINE_ENVIRONMENT},
            stdout=file,
            stderr=file,
        )
    try:
        while not _is_up(port):
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.2)
        yield f"http://127.0.0.1:{port}"
    finally:
        process.kill()
        process.wait()


def _is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
            return True
    except OSError:
        return False


def test_the_export_that_is_served(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = served.exports["eagle3"]
    with server(served.verifier, export, tmp_path / "log") as url:
        status = main(["verify", str(export), "--endpoint", url])
    assert status == 0, capsys.readouterr().out


def test_layer_ids_off_by_one(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The costliest fault: the server loads such a draft without complaint, and its text is right."""
    export, wrong = served.exports["eagle3"], tmp_path / "wrong"
    wrong.mkdir()
    for path in export.iterdir():
        (wrong / path.name).write_bytes(path.read_bytes())
    config = json.loads((wrong / "config.json").read_text())
    ids = "eagle_aux_hidden_state_layer_ids"
    config[ids] = [layer + 1 for layer in config[ids]]
    (wrong / "config.json").write_text(json.dumps(config))
    with server(served.verifier, wrong, tmp_path / "log") as url:
        assert main(["verify", str(export), "--endpoint", url]) == 1
    assert "likely cause: the draft reads what it was not trained on: layer ids off by one" in capsys.readouterr().out
