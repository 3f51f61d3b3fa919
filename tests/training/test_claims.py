"""A run's folder belongs to one process at a time; others get a message."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from specforge.errors import UsageError
from specforge.training.claims import LOCK, RANKS, claim, claimed, is_live

HELD = ExitStack()


@pytest.fixture(autouse=True)
def _first_process(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in RANKS:
        monkeypatch.delenv(name, raising=False)
    yield
    HELD.close()


@pytest.fixture
def children() -> Iterator[Callable[[Callable[[], None]], int]]:
    """Start processes that do something and then wait; they are killed at the end of the test."""
    started = []

    def start(work: Callable[[], None]) -> int:
        ready, write = os.pipe()
        child = os.fork()
        if child == 0:
            try:
                work()
                os.write(write, b".")
                signal.pause()
            finally:
                os._exit(1)
        os.close(write)
        assert os.read(ready, 1) == b"."
        os.close(ready)
        started.append(child)
        return child

    yield start
    for child in started:
        kill(child)


def kill(child: int) -> None:
    try:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    except (ProcessLookupError, ChildProcessError):
        pass


def begin(output_dir: Path, name: str | None = None, wanted: str | None = None, checkpoint: Path | None = None) -> str:
    """Claim a folder until the end of the test or process; return its name."""
    return claim(HELD, output_dir, name, wanted, checkpoint).name


def saved(run: Path) -> Path:
    checkpoint = run / "checkpoints" / "last.ckpt"
    checkpoint.parent.mkdir(parents=True, exist_ok=True)
    checkpoint.touch()
    return checkpoint


def test_runs_started_together_get_one_folder_each(tmp_path, children):
    for _ in range(3):
        children(lambda: begin(tmp_path) and None)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["version_0", "version_1", "version_2"]
    assert all(is_live(path) for path in tmp_path.iterdir())


def test_a_killed_process_frees_its_run_even_if_its_children_survive(tmp_path, children):
    below = tmp_path / "below"

    def with_a_child() -> None:
        begin(tmp_path)
        loader = os.fork()  # like processes that load batches
        if loader == 0:
            signal.pause()
        below.write_text(str(loader))

    child = children(with_a_child)
    run = tmp_path / "version_0"
    try:
        assert is_live(run)
        kill(child)
        assert (run / LOCK).exists() and not is_live(run)
        assert begin(tmp_path, wanted="last", checkpoint=saved(run)) == "version_0"
    finally:
        os.kill(int(below.read_text()), signal.SIGKILL)


@pytest.mark.parametrize("wanted", ["last", "auto", "FILE"])
def test_a_live_run_is_not_resumed(tmp_path, children, wanted):
    checkpoint = saved(tmp_path / "version_0")
    children(lambda: begin(tmp_path, checkpoint=checkpoint) and None)
    with pytest.raises(UsageError, match=r"version_0 is live: another process is writing it.*omit --ckpt_path"):
        begin(tmp_path, wanted=wanted, checkpoint=checkpoint)
    assert begin(tmp_path) == "version_1"


@pytest.mark.parametrize("wanted", ["last", "auto"])
def test_an_older_run_is_not_resumed_next_to_a_live_one(tmp_path, children, wanted):
    checkpoint = saved(tmp_path / "version_0")
    children(lambda: begin(tmp_path) and None)
    with pytest.raises(UsageError, match="version_1 is live"):
        begin(tmp_path, wanted=wanted, checkpoint=checkpoint)


def test_within_one_process(tmp_path):
    with claimed(tmp_path / "run", new=True) as first, claimed(tmp_path / "run", new=False) as second:
        assert first and not second
        assert is_live(tmp_path / "run")
    assert not is_live(tmp_path / "run")


def test_a_run_that_wrote_nothing_leaves_nothing(tmp_path):
    with claimed(tmp_path / "a" / "b" / "version_0", new=True):
        assert (tmp_path / "a" / "b" / "version_0" / LOCK).exists()
    assert not list(tmp_path.iterdir())
    with claimed(tmp_path / "run", new=True):
        (tmp_path / "run" / "config.yaml").touch()
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["config.yaml"]


class TestNames:
    def test_a_name_can_be_used_once(self, tmp_path, children):
        child = children(lambda: begin(tmp_path, "mine") and None)
        with pytest.raises(UsageError, match=r"run_name: the run .*mine is live"):
            begin(tmp_path, "mine")
        assert begin(tmp_path, "other") == "other"
        kill(child)
        assert begin(tmp_path, "mine") == "mine"  # it had saved nothing

    def test_a_run_with_checkpoints_is_not_started_again(self, tmp_path):
        saved(tmp_path / "mine")
        with pytest.raises(UsageError, match="resume it with --ckpt_path last"):
            begin(tmp_path, "mine")

    def test_a_checkpoint_of_another_run_does_not_take_a_name(self, tmp_path):
        checkpoint = saved(tmp_path / "version_0")
        with pytest.raises(UsageError, match=r"run_name: mine, but --ckpt_path .* resumes the run version_0"):
            begin(tmp_path, "mine", wanted=str(checkpoint), checkpoint=checkpoint)
        assert begin(tmp_path, wanted=str(checkpoint), checkpoint=checkpoint) == "version_0"


@pytest.mark.parametrize("name", RANKS)
def test_other_processes_of_a_job_claim_nothing(tmp_path, monkeypatch, name):
    monkeypatch.setenv(name, "1")
    assert begin(tmp_path) == "version_0"
    assert not list(tmp_path.iterdir())


def test_a_file_system_without_locks_is_warned_of(tmp_path, monkeypatch, caplog):
    def refuse(*arguments: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", refuse)
    assert begin(tmp_path) == "version_0"
    assert "no locks on this file system" in caplog.text


def test_a_folder_that_cannot_be_made_is_named(tmp_path):
    (tmp_path / "file").touch()
    for output_dir in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UsageError, match=r"output_dir: .*file"):
            begin(output_dir)
