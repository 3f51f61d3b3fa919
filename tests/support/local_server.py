"""A server on this machine for the duration of a test."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def local_server(module: str, words: list[str], log: Path, environment: Mapping[str, str]) -> Iterator[str]:
    """Run ``python -m module`` on a free port; yield its URL once it is healthy.

    Args:
        module: A server that takes ``--port`` and answers at ``/health``.
        words: Further arguments.
        log: File for its output.
        environment: Additional environment variables.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with log.open("w") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *words, "--port", str(port)],
            env={**os.environ, **environment},
            stdout=file,
            stderr=file,
            process_group=0,
        )
    try:
        while not _is_up(port):
            assert process.poll() is None, log.read_text()[-3000:]
            time.sleep(0.1)
        yield f"http://127.0.0.1:{port}"
    finally:
        # With the processes that it has started: vLLM's engines outlive a killed server.
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _is_up(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=1):
            return True
    except OSError:
        return False
