"""``specforge verify --endpoint`` with a real vLLM server, which serves the verified export or another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from local_server import local_server
from safetensors.torch import load_file, save_file
from serving import ENGINE_ENVIRONMENT, Served, engine_options

from specforge.__main__ import main


@contextmanager
def server(verifier: Path, draft: Path, log: Path) -> Iterator[str]:
    """Serve a draft; yield the server's address."""
    speculative = json.dumps(engine_options("eagle3", draft)["speculative_config"])
    words = ["--model", str(verifier), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    words += ["--speculative-config", speculative]
    with local_server("vllm.entrypoints.openai.api_server", words, log, ENGINE_ENVIRONMENT) as url:
        yield url


def test_the_export_that_is_served(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    export = served.exports["eagle3"]
    with server(served.verifier, export, tmp_path / "log") as url:
        status = main(["verify", str(export), "--endpoint", url])
    assert status == 0, capsys.readouterr().out


def test_a_missing_vocabulary_map(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The costliest kind of fault: the server loads such a draft silently, and its text is right."""
    export, wrong = served.exports["eagle3"], tmp_path / "wrong"
    wrong.mkdir()
    shutil.copy(export / "config.json", wrong)
    tensors = load_file(export / "model.safetensors")
    save_file({name: one for name, one in tensors.items() if name != "d2t"}, wrong / "model.safetensors")
    with server(served.verifier, wrong, tmp_path / "log") as url:
        assert main(["verify", str(export), "--endpoint", url]) == 1
    assert "likely cause: nothing is accepted: d2t is missing or absolute" in capsys.readouterr().out
