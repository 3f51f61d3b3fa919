"""The page on training from Python is a program that runs."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
QUICKSTART = Path("configs") / "quickstart"


def test_its_listings_run_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / QUICKSTART).mkdir(parents=True)
    (tmp_path / QUICKSTART / "verifier").symlink_to(ROOT / QUICKSTART / "verifier")
    for name, number in (("train.jsonl", 40), ("validation.jsonl", 8)):
        rows = (ROOT / QUICKSTART / name).read_text(encoding="utf-8").splitlines(keepends=True)
        (tmp_path / QUICKSTART / name).write_text("".join(rows[:number]), encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SPECFORGE_CACHE", str(tmp_path / "cache"))
    page = (ROOT / "docs" / "python.md").read_text(encoding="utf-8")
    names: dict[str, object] = {}
    for listing in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(listing, names)
    run = tmp_path / "runs" / "lightning_logs" / "version_0"
    assert {"best.ckpt", "last.ckpt"} <= {path.name for path in (run / "checkpoints").iterdir()}
    assert (run / "draft" / "model.safetensors").is_file()
    [figures] = names["figures"]  # type: ignore[misc]
    assert figures["val/acceptance_length"] >= 1
