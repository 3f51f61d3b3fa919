from __future__ import annotations

import json
from pathlib import Path

import pytest

from specforge.__main__ import main

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart"


def prepare(output: Path, *more: str) -> int:
    source, verifier = str(QUICKSTART / "validation.jsonl"), str(QUICKSTART / "verifier")
    return main(["prepare", "rows", source, "--verifier", verifier, "--output", str(output), *more])


def test_rows_by_two_processes(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    flags = ["--workers", "2", "--max-length", "100", "--validation-share", "0.2", "--seed", "7", "--show", "1"]
    assert prepare(tmp_path / "rows", *flags) == 0
    shown = capfd.readouterr().out
    assert "⟦" in shown.split("Rows")[0] and "supervised share" in shown
    assert shown.strip().splitlines()[-1].strip().startswith("specforge fit --config FILE --verifier ")
    summary = json.loads((tmp_path / "rows" / "summary.json").read_text())
    assert list(summary["splits"]) == ["train", "validation"]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").rglob("*.arrow")}
    assert len(written) == 2
    assert prepare(tmp_path / "rows", *flags) == 0
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "rows").rglob("*.arrow")} == written


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "sources: none are given"),
        (["rows.jsonl"], "verifier: is required"),
        (["missing.jsonl", "--verifier", "x", "--output", "o"], "missing.jsonl does not exist"),
        (["rows.jsonl", "--max_length", "1"], "max_length"),
        (["rows.jsonl", "--verifer", "x"], "Did you mean 'verifier'"),
        (["rows.jsonl", "--verifier", "x", "--output", "taken"], "taken holds something else"),
    ],
)
def test_wrong_use_is_told_in_one_line(
    words: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("rows.jsonl").write_text('{"text": "one"}\n')
    Path("taken").mkdir()
    Path("taken", "letter.txt").write_text("dear")
    assert main(["prepare", "rows", *words]) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error
    assert Path("taken", "letter.txt").read_text() == "dear"
