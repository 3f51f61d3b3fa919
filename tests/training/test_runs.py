"""The folders of runs, and how their checkpoints are found."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from specforge.errors import UsageError
from specforge.training.runs import check_name, resolve_checkpoint, run_of, runs


def checkpoint(output_dir: Path, version: int | str, name: str = "last") -> Path:
    """Create a small checkpoint of a run."""
    path = output_dir / f"version_{version}" / "checkpoints" / f"{name}.ckpt"
    path.parent.mkdir(parents=True, exist_ok=True)
    content = {"state_dict": {"weight": torch.zeros(1000)}, "loops": {}, "pytorch-lightning_version": "2"}
    torch.save(content, path)
    return path


def truncated(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:2000])


def flipped(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def emptied(path: Path) -> None:
    path.write_bytes(b"")


def foreign(path: Path) -> None:
    torch.save({"weight": torch.zeros(1000)}, path)


class TestRuns:
    def test_are_ordered_by_number(self, tmp_path):
        for number in (10, 2, 0, 9):
            checkpoint(tmp_path, number)
        assert [path.name for path in runs(tmp_path)] == ["version_0", "version_2", "version_9", "version_10"]

    def test_other_names_are_not_runs(self, tmp_path):
        for name in ("version_x", "version_", "version_1.old", "old_version_1", "draft"):
            (tmp_path / name).mkdir()
        assert runs(tmp_path) == []

    def test_no_folder(self, tmp_path):
        assert runs(tmp_path / "nowhere") == []

    def test_a_file_is_not_a_folder_of_runs(self, tmp_path):
        (tmp_path / "file").touch()
        assert runs(tmp_path / "file") == []


class TestResolve:
    @pytest.mark.parametrize("name", ["last", "best"])
    def test_newest_run_by_number(self, tmp_path, name):
        checkpoint(tmp_path, 2, name)
        newest = checkpoint(tmp_path, 10, name)
        assert resolve_checkpoint(name, tmp_path) == newest

    def test_runs_without_the_checkpoint_are_skipped(self, tmp_path):
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

    @pytest.mark.parametrize("requested", ["lst", "nowhere.ckpt", ""])
    def test_no_such_file(self, tmp_path, requested):
        with pytest.raises(UsageError) as caught:
            resolve_checkpoint(requested, tmp_path)
        assert "no such file" in str(caught.value) and "last, best" in str(caught.value)

    def test_a_folder_is_not_a_file(self, tmp_path):
        with pytest.raises(UsageError, match=r"is a folder; give a file, or one of: last, best, auto$"):
            resolve_checkpoint(str(tmp_path), tmp_path)

    def test_a_draft_is_not_a_checkpoint(self, tmp_path):
        path = checkpoint(tmp_path, 0)
        draft = path.parent.parent / "draft"
        draft.mkdir()
        (draft / "model.safetensors").touch()
        with pytest.raises(UsageError) as caught:
            resolve_checkpoint(str(draft), tmp_path)
        assert f"such as {path}" in str(caught.value) and f"--model.init_from {draft}" in str(caught.value)


DAMAGES = [truncated, flipped, emptied, foreign]


class TestDamaged:
    @pytest.mark.parametrize("damage", DAMAGES)
    def test_is_named_and_the_previous_one_is_found(self, tmp_path, caplog, damage):
        previous, newest = checkpoint(tmp_path, 1, "previous"), checkpoint(tmp_path, 1)
        assert resolve_checkpoint("last", tmp_path) == newest
        damage(newest)
        for requested in ("last", "auto"):
            caplog.clear()
            assert resolve_checkpoint(requested, tmp_path) == previous
            assert [str(newest) in record.message for record in caplog.records] == [True]

    @pytest.mark.parametrize("damage", DAMAGES)
    def test_is_refused_if_it_was_requested(self, tmp_path, damage):
        checkpoint(tmp_path, 1, "previous")
        newest = checkpoint(tmp_path, 1)
        damage(newest)
        with pytest.raises(UsageError, match="checkpoint") as caught:
            resolve_checkpoint(str(newest), tmp_path)
        assert str(newest) in str(caught.value)

    @pytest.mark.parametrize("name", ["last", "best"])
    def test_the_previous_runs_checkpoint_is_found_if_the_newest_run_has_none(self, tmp_path, caplog, name):
        found, newest = checkpoint(tmp_path, 1, name), checkpoint(tmp_path, 2, name)
        truncated(newest)
        assert resolve_checkpoint(name, tmp_path) == found
        assert str(newest) in caplog.text

    def test_all_are_named_if_none_is_complete(self, tmp_path, caplog):
        damaged = [checkpoint(tmp_path, number) for number in (1, 2)]
        for path in damaged:
            truncated(path)
        with pytest.raises(UsageError, match=r"no run in .* has a complete checkpoint 'last'"):
            resolve_checkpoint("last", tmp_path)
        assert all(str(path) in caplog.text for path in damaged)

    def test_leftovers_of_a_killed_save_are_not_a_checkpoint(self, tmp_path):
        complete = checkpoint(tmp_path, 1)
        complete.with_name(".last.ckpt.0a1b2c3d").write_bytes(b"half")
        assert resolve_checkpoint("last", tmp_path) == complete


def test_auto_starts_a_new_run_if_there_is_none(tmp_path):
    assert resolve_checkpoint("auto", tmp_path) is None
    checkpoint(tmp_path, 0, "best")
    assert resolve_checkpoint("auto", tmp_path) is None
    newest = checkpoint(tmp_path, 1)
    (tmp_path / "version_2").mkdir()
    assert resolve_checkpoint("auto", tmp_path) == newest


class TestRunOf:
    def test_new_run(self, tmp_path):
        assert run_of(None, tmp_path) is None

    def test_run_of_a_checkpoint(self, tmp_path):
        assert run_of(checkpoint(tmp_path, 3), tmp_path) == tmp_path / "version_3"

    def test_relative_paths(self, tmp_path, monkeypatch):
        checkpoint(tmp_path / "runs", 3)
        monkeypatch.chdir(tmp_path)
        relative = Path("runs/version_3/checkpoints/last.ckpt")
        assert run_of(relative, Path("runs")) == Path("runs/version_3")
        assert run_of(relative, tmp_path / "runs") == tmp_path / "runs" / "version_3"
        assert run_of(relative.absolute(), Path("runs")) == Path("runs/version_3")

    def test_checkpoint_of_another_output_folder_begins_a_new_run(self, tmp_path):
        assert run_of(checkpoint(tmp_path / "other", 3), tmp_path / "runs") is None

    def test_a_checkpoint_outside_the_runs_starts_a_new_run(self, tmp_path):
        checkpoint(tmp_path, 3)
        assert run_of(tmp_path / "last.ckpt", tmp_path) is None

    def test_a_run_with_a_name_is_known_by_its_configuration(self, tmp_path):
        path = checkpoint(tmp_path, 3).parent.parent.rename(tmp_path / "mine") / "checkpoints" / "last.ckpt"
        assert run_of(path, tmp_path) is None
        (tmp_path / "mine" / "config.yaml").touch()
        assert run_of(path, tmp_path) == tmp_path / "mine"
        assert resolve_checkpoint("last", tmp_path, "mine") == path
        with pytest.raises(UsageError, match="no run"):
            resolve_checkpoint("last", tmp_path)


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", ".hidden", "version_3", "x" * 201, "a b", "-x"])
def test_an_invalid_folder_name_is_refused(name):
    check_name("eagle3-lr_1e-4.v2")
    with pytest.raises(UsageError, match="run_name"):
        check_name(name)
