"""``verify --endpoint`` and ``evaluate --endpoint`` with a real vLLM server, which serves our export or another one."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from local_server import local_server
from safetensors.torch import load_file, save_file
from serving import DRAFTED, ENGINE_ENVIRONMENT, Served, engine_options
from wide_verifier import QUICKSTART

from specforge.__main__ import main
from specforge.evaluation.results import Results


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


def test_speed_and_acceptance_of_a_server(served: Served, tmp_path: Path) -> None:
    """A server accepts what the draft accepts in process, on the same prompts, at one request at a time and at four."""
    words = ["--prompts", str(QUICKSTART / "validation.jsonl"), "--limit", "8", "--max_new_tokens", "32"]
    words += ["--proposal", f"greedy:speculative_tokens={DRAFTED}", "--baselines", "--concurrency", "1", "4"]
    with server(served.verifier, served.exports["eagle3"], tmp_path / "log") as url:
        words += ["--endpoint", url, "--output", str(tmp_path / "out")]
        assert main(["evaluate", str(served.runs["eagle3"]), *words]) == 0
    results = Results.read(tmp_path / "out" / "results.json")
    assert results.served is not None
    (measured,) = results.served.servers
    assert measured.engine == "vLLM" and measured.draft_tokens == DRAFTED
    for one in measured.measurements:
        assert one.responses == 8 and one.other_tokens == 0 and len(one.accept_rate_pos) == DRAFTED
        assert one.acceptance_length == pytest.approx(1 + sum(one.accept_rate_pos))
        assert one.acceptance_length == pytest.approx(results.contenders[0].all_sets.acceptance_length, rel=0.1)
