"""The check for GPUs runs: its small way on a CPU. Its other parts are runs of commands, which have tests."""

from __future__ import annotations

import json
from pathlib import Path

import gpu_check
import pytest


def test_steps_are_timed_beside_the_simulated_ones(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    simulated, output = tmp_path / "simulated.json", tmp_path / "found.json"
    simulated.write_text(json.dumps({"stored 128": 0.25}))
    words = ["kernels", "steps", "--device=cpu", "--small", f"--simulated={simulated}", f"--output={output}"]
    assert gpu_check.main(words) == 0
    printed = capsys.readouterr().out
    rows = [line.split("|")[1:-1] for line in printed.splitlines() if line.startswith("  | ")][1:]
    assert [row[:2] for row in rows] == [[f" {states} ", f" {n} "] for states in ("stored", "live") for n in (64, 128)]
    assert [row[3].strip() for row in rows] == ["-", "250.0", "-", "-"]
    found = json.loads(output.read_text())
    assert found["failures"] == [] and found["live 128: seconds"] > 0


def test_a_failed_check_is_named_and_the_rest_still_runs(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(_: gpu_check.Check) -> None:
        raise ValueError("no such kernel")

    def near(check: gpu_check.Check) -> None:
        check.near("loss", 1.5, 1.0, 1e-3)

    monkeypatch.setattr(gpu_check, "PARTS", {"kernels": broken, "steps": near})
    assert gpu_check.main(["--device=cpu"]) == 1
    printed = capsys.readouterr().out
    assert (
        "no such kernel" in printed and "FAILED loss: 1.5, expected 1 within" in printed and "2 failure(s)" in printed
    )
