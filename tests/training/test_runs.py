"""Where runs are and how their checkpoints are found."""

from __future__ import annotations

from pathlib import Path

import pytest

from specforge.errors import UsageError
from specforge.training.runs import resolve_checkpoint, runs, version_of


def checkpoint(output_dir: Path, version: int | str, name: str = "last") -> Path:
    """Create an empty checkpoint file of a run."""
    path = output_dir / f"version_{version}" / "checkpoints" / f"{name}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.touch()
    return path


class TestRuns:
    def test_are_ordered_by_number(self, tmp_path):
        for number in (10, 2, 0, 9):
            checkpoint(tmp_path, number)
        assert [path.name for path in runs(tmp_path)] == ["version_0", "version_2", "version_9", "version_10"]

    def test_other_names_are_no_runs(self, tmp_path):
        for name in ("version_x", "version_", "version_1.old", "old_version_1", "draft"):
            (tmp_path / name).mkdir()
        assert runs(tmp_path) == []

    def test_no_folder(self, tmp_path):
        assert runs(tmp_path / "nowhere") == []

    def test_a_file_is_no_folder_of_runs(self, tmp_path):
        (tmp_path / "file").touch()
        assert runs(tmp_path / "file") == []


class TestResolve:
    @pytest.mark.parametrize("name", ["last", "best"])
    def test_newest_run_by_number(self, tmp_path, name):
        checkpoint(tmp_path, 2, name)
        newest = checkpoint(tmp_path, 10, name)
        assert resolve_checkpoint(name, tmp_path) == newest

    def test_runs_without_the_checkpoint_are_passed_over(self, tmp_path):
        found = checkpoint(tmp_path, 1, "best")
        checkpoint(tmp_path, 2, "last")
        (tmp_path / "version_3").mkdir()
        assert resolve_checkpoint("best", tmp_path) == found

    def test_a_file(self, tmp_path):
        path = checkpoint(tmp_path, 0)
        assert resolve_checkpoint(str(path), tmp_path / "elsewhere") == path

    @pytest.mark.parametrize("name", ["last", "best"])
    def test_none(self, tmp_path, name):
        with pytest.raises(UsageError) as caught:
            resolve_checkpoint(name, tmp_path)
        assert repr(name) in str(caught.value) and str(tmp_path) in str(caught.value)

    @pytest.mark.parametrize("wanted", ["lst", "nowhere.ckpt", ""])
    def test_no_such_file(self, tmp_path, wanted):
        with pytest.raises(UsageError) as caught:
            resolve_checkpoint(wanted, tmp_path)
        assert "no such file" in str(caught.value) and "last, best" in str(caught.value)

    def test_a_folder_is_no_file(self, tmp_path):
        with pytest.raises(UsageError, match="no such file"):
            resolve_checkpoint(str(tmp_path), tmp_path)


class TestVersion:
    def test_new_run(self, tmp_path):
        assert version_of(None, tmp_path) is None

    def test_run_of_a_checkpoint(self, tmp_path):
        assert version_of(checkpoint(tmp_path, 3), tmp_path) == "version_3"

    def test_relative_paths(self, tmp_path, monkeypatch):
        checkpoint(tmp_path / "runs", 3)
        monkeypatch.chdir(tmp_path)
        relative = Path("runs/version_3/checkpoints/last.ckpt")
        assert version_of(relative, Path("runs")) == "version_3"
        assert version_of(relative, tmp_path / "runs") == "version_3"
        assert version_of(relative.absolute(), Path("runs")) == "version_3"

    def test_checkpoint_of_another_output_folder_begins_a_new_run(self, tmp_path):
        assert version_of(checkpoint(tmp_path / "other", 3), tmp_path / "runs") is None

    def test_checkpoint_beside_the_runs_begins_a_new_run(self, tmp_path):
        checkpoint(tmp_path, 3)
        assert version_of(tmp_path / "last.ckpt", tmp_path) is None
