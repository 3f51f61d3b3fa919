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
def server(verifier: Path, draft: Path | None, log: Path, drafted: int = DRAFTED) -> Iterator[str]:
    """Serve a verifier, with a draft if there is one; yield the server's address."""
    words = ["--model", str(verifier), "--dtype", "float32", "--enforce-eager", "--max-model-len", "512"]
    if draft is not None:
        speculative = {**engine_options("eagle3", draft)["speculative_config"], "num_speculative_tokens": drafted}
        words += ["--speculative-config", json.dumps(speculative)]
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


def test_acceptance_and_expected_speed(served: Served, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Servers send as many tokens per round as replay says, at each width and load; each width gets a prediction."""
    verifier, export, widths = served.verifier, served.exports["eagle3"], [1, DRAFTED]
    words = ["--prompts", str(QUICKSTART / "validation.jsonl"), "--limit", "8", "--max_new_tokens", "32"]
    words += ["--proposal", f"greedy:speculative_tokens={DRAFTED}", "--baselines", "--concurrency", "1", "4"]
    with (
        server(verifier, export, tmp_path / "short", 1) as short,
        server(verifier, export, tmp_path / "long") as long,
        server(verifier, None, tmp_path / "plain") as plain,
    ):
        words += ["--endpoint", short, long, "--baseline", plain, "--output", str(tmp_path / "out")]
        assert main(["evaluate", str(served.runs["eagle3"]), *words]) == 0
    results = Results.read(tmp_path / "out" / "results.json")
    replayed, measured = results.contenders[0].all_sets.by_chain_length, results.served
    assert measured is not None and [one.draft_tokens for one in measured.servers] == [*widths, None]
    for drafted, one in zip(widths, measured.servers[:2], strict=True):
        assert one.engine == "vLLM"
        for load in one.measurements:
            assert load.responses == 8 and load.other_tokens == 0 and len(load.accept_rate_pos) == drafted
            assert load.acceptance_length == pytest.approx(1 + sum(load.accept_rate_pos))
            # Batches of other sizes change single tokens of a text.
            assert load.tokens_per_round == pytest.approx(replayed[drafted - 1], rel=0.05)
    assert [one.concurrency for one in measured.expectations] == [1, 4]
    for expected in measured.expectations:
        assert expected.fitted_to == widths and "replay" in expected.acceptance
        assert [one.acceptance_length for one in expected.lengths] == pytest.approx(replayed)
        assert [one.draft_tokens for one in expected.lengths if one.measured_speedup is not None] == widths
    assert "At 4 requests at a time: " in " ".join(capsys.readouterr().out.split())
