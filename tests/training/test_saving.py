"""Checkpoints on disk are complete at any moment."""

from __future__ import annotations

import errno
import os
import resource
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from specforge.files import leftovers
from specforge.training.runs import check_checkpoint, resolve_checkpoint
from specforge.training.saving import WholeCheckpointIO


def content(step: int) -> dict[str, Any]:
    return {"state_dict": {"weight": torch.full((20_000,), step)}, "loops": {}, "pytorch-lightning_version": "2"}


def step_of(path: Path) -> int:
    check_checkpoint(path)
    return int(torch.load(path, weights_only=True)["state_dict"]["weight"][0])


@pytest.fixture
def last(tmp_path: Path) -> Path:
    return tmp_path / "version_0" / "checkpoints" / "last.ckpt"


def test_the_previous_one_is_kept(last):
    writer = WholeCheckpointIO()
    for step in range(3):
        writer.save_checkpoint(content(step), last)
    assert step_of(last) == 2 and step_of(last.with_name("previous.ckpt")) == 1
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_without_hard_links_the_previous_one_is_kept(last, monkeypatch):
    def refuse(*_: Any) -> None:
        raise OSError(errno.EPERM, "Operation not permitted")

    monkeypatch.setattr(os, "link", refuse)
    for step in range(2):
        WholeCheckpointIO().save_checkpoint(content(step), last)
    assert step_of(last) == 1 and step_of(last.with_name("previous.ckpt")) == 0


def test_others_are_replaced(last):
    best = last.with_name("best.ckpt")
    for step in range(2):
        WholeCheckpointIO().save_checkpoint(content(step), best)
    assert step_of(best) == 1 and [path.name for path in best.parent.iterdir()] == ["best.ckpt"]


def test_a_damaged_checkpoint_does_not_replace_the_previous_one(last):
    for step in range(2):
        WholeCheckpointIO().save_checkpoint(content(step), last)
    last.write_bytes(last.read_bytes()[:1000])
    WholeCheckpointIO().save_checkpoint(content(2), last)
    assert step_of(last) == 2 and step_of(last.with_name("previous.ckpt")) == 0


@pytest.mark.parametrize("limit", [0, 1_000, 100_000, 160_500])
def test_a_full_disk_leaves_both_as_they_were(last, limit):
    writer = WholeCheckpointIO()
    for step in range(2):
        writer.save_checkpoint(content(step), last)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, before[1]))
    try:
        with pytest.raises(OSError, match=r"last\.ckpt cannot be written: File too large"):
            writer.save_checkpoint(content(2), last)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert step_of(last) == 1 and step_of(last.with_name("previous.ckpt")) == 0
    assert sorted(path.name for path in last.parent.iterdir()) == ["last.ckpt", "previous.ckpt"]


@pytest.mark.parametrize(("function", "calls"), [("fsync", 3), ("link", 1), ("replace", 1), ("unlink", 2)])
@pytest.mark.parametrize("call", range(4))
def test_a_kill_around_any_write_leaves_a_complete_newest_checkpoint(last, function, calls, call):
    writer = WholeCheckpointIO()
    for step in range(2):
        writer.save_checkpoint(content(step), last)
    numbers = iter(range(5))
    original = getattr(os, function)

    def die(*arguments: Any) -> Any:
        if next(numbers) == call:
            os.kill(os.getpid(), signal.SIGKILL)
        return original(*arguments)

    child = os.fork()
    if child == 0:
        setattr(os, function, die)
        writer.save_checkpoint(content(2), last)
        os._exit(0)
    killed = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert killed == (call < calls) and last.exists()
    found = resolve_checkpoint("last", last.parents[2])
    assert found is not None and step_of(found) in (1, 2)
    WholeCheckpointIO().save_checkpoint(content(3), last)
    assert step_of(last) == 3 and not list(leftovers(last))
