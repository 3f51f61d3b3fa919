"""Acceptance of servers, against a stand-in with their counters."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from threading import Event

import pytest
from stand_ins import Engine, serving

from specforge.__main__ import main
from specforge.checkpoints.verification.probe import Probe
from specforge.engines.probing import measure
from specforge.errors import SpecforgeError

# 25 tokens in ten rounds.
ACCEPTED = [8, 5, 2]


@pytest.fixture
def export(exported: Callable[..., Path], tmp_path: Path) -> Path:
    """An export that should accept 2.5 tokens per pass with chains of 3, and more with longer ones."""
    folder = tmp_path / "export"
    shutil.copytree(exported("eagle3/vllm"), folder)
    values = json.loads((folder / "specforge_probe.json").read_text())
    values["served"]["acceptance_length"] = {"1": 1.8, "2": 2.3, "3": 2.5, "4": 3.9}
    values["served"]["accept_rates"] = [0.8, 0.5, 0.2, 0.1]
    (folder / "specforge_probe.json").write_text(json.dumps(values))
    return folder


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_server_with_the_expected_acceptance(kind: str, export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    engine = Engine(kind, ACCEPTED)
    with serving(engine.answer) as address:
        assert main(["verify", str(export), "--endpoint", f"{address}/v1/"]) == 0
    shown = capsys.readouterr().out
    assert "2.500 tokens per verifier pass" in shown and "logits, the server" in shown
    texts = Probe.load(export).served.texts
    assert [request["prompt"] for request in engine.requests] == [text.tokens[: text.begin] for text in texts]
    assert all(request["temperature"] == 0 for request in engine.requests)
    assert [request["max_tokens"] for request in engine.requests] == [len(text.tokens) - text.begin for text in texts]


@pytest.mark.parametrize(
    ("accepted", "cause"),
    [
        ([0, 0, 0], "nothing is accepted: d2t is missing"),
        ([8, 2, 0], "the first token is as good as expected"),
        ([4, 2, 1], "layer ids off by one"),
        ([9, 9, 9], "serves another draft"),
    ],
)
def test_a_server_with_another_acceptance(
    accepted: list[int], cause: str, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with serving(Engine("vllm", accepted).answer) as address:
        assert main(["verify", str(export), "--endpoint", address]) == 1
    shown = capsys.readouterr().out
    assert "2.500 are expected" in shown and cause in shown


def test_only_the_probes_requests_are_counted(export: Path) -> None:
    """The stand-in starts with a thousand drafts of other requests."""
    with serving(Engine("vllm", ACCEPTED).answer) as address:
        measured = measure(address, Probe.load(export).served.prompts)
    assert (measured.acceptance_length, measured.chain) == (2.5, 3)
    assert measured.accept_rates == [0.8, 0.5, 0.2]


@pytest.mark.parametrize(
    ("engine", "message"),
    [
        (Engine("neither", []), "neither vLLM's /metrics nor SGLang's /get_server_info"),
        (Engine("sglang", []), "does it run with a draft"),
    ],
)
def test_a_server_without_counters(
    engine: Engine, message: str, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if engine.kind == "sglang":
        engine.answer = lambda method, path, body: (  # type: ignore[method-assign]
            (200, "{}") if path == "/get_server_info" else Engine.answer(engine, method, path, body)
        )
    with serving(engine.answer) as address:
        assert main(["verify", str(export), "--endpoint", address]) == 1
    assert message in capsys.readouterr().err


def test_a_server_that_never_drafts_is_reported(export: Path) -> None:
    engine = Engine("vllm", ACCEPTED)

    def never(method: str, path: str, body: bytes) -> tuple[int, str]:
        done = engine.answer(method, path, body)
        engine.requests.clear()
        return done

    with serving(never) as address, pytest.raises(SpecforgeError, match="answered without any draft"):
        measure(address, Probe.load(export).served.prompts)


def test_no_server_at_all(export: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with serving(Engine("vllm", ACCEPTED).answer) as address:
        pass
    assert main(["verify", str(export), "--endpoint", address]) == 1
    assert "is the server running there?" in capsys.readouterr().err


def test_an_export_without_expected_acceptance_is_rejected(
    exported: Callable[..., Path], capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["verify", str(exported("eagle3/vllm", "--skip_verifier")), "--endpoint", "http://localhost:1"]) == 2
    assert "--skip_verifier" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("path", "reply", "message"),
    [
        ("/metrics", "vllm:spec_decode_num_drafts_total 1e999", "drafts is 1e999, which is not a count"),
        ("/get_server_info", "<html>", "is not SGLang's"),
        ("/get_server_info", '{"internal_states": [{"avg_spec_accept_length": "much"}]}', "is not SGLang's"),
        ("/v1/models", "null", "does not answer the probe's prompts"),
        ("/v1/models", '{"data": []}', "it lists no model"),
        ("/v1/completions", "<html>", "does not answer the probe's prompts"),
    ],
)
def test_a_wrong_answer_is_one_message_without_the_password(
    path: str, reply: str, message: str, export: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    engine = Engine("vllm", ACCEPTED)
    with serving(lambda method, at, body: (200, reply) if at == path else engine.answer(method, at, body)) as address:
        assert main(["verify", str(export), "--endpoint", address.replace("//", "//me:sesame@")]) == 1
    shown = capsys.readouterr()
    assert message in shown.err and shown.err.count("\n") == 1 and "sesame" not in shown.out + shown.err


def test_a_server_that_does_not_answer_in_time_is_reported(
    export: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("specforge.engines.counters.SECONDS", 0.2)
    gone = Event()

    def late(method: str, path: str, body: bytes) -> tuple[int, str]:
        gone.wait(5)
        return 200, ""

    with serving(late) as address:
        assert main(["verify", str(export), "--endpoint", address]) == 1
        gone.set()
    assert "no complete response in 0.2 s" in capsys.readouterr().err
