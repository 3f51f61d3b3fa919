"""examples/use_a_draft.py runs from its first cell to its picture, with any draft."""

from __future__ import annotations

import runpy
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = Path("configs") / "quickstart"


def test_every_cell_runs(draft_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    shutil.copytree(draft_folder, tmp_path / "runs" / "quickstart" / "version_0" / "draft")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("MPLBACKEND", "agg")
    cells = runpy.run_path(str(ROOT / "examples" / "use_a_draft.py"))
    assert cells["answer"] == "The way to the library is 60 km long. At 20 km per hour she needs 60 / 20 = 3 hours."
    assert "tokens per verifier forward pass" in capsys.readouterr().out
    assert (tmp_path / "acceptance.png").stat().st_size > 1000
