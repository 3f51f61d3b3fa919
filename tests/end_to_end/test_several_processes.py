"""Runs of several processes under torchrun's agent: stopped, resumed with fewer or more, and after a crash."""

from __future__ import annotations

import os
import resource
import signal
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from quickstart_runs import Workshop
from run_processes import QUIET, begin, begin_torchrun
from training_runs import weights

from specforge.__main__ import main
from specforge.training.callbacks import stopping
from specforge.training.module import DraftModule

# With each layout, an optimizer step reads the same four of sixteen packed rows.
LAYOUTS = {
    "1 process": (1, ["--data.batch_size=2", "--trainer.accumulate_grad_batches=2"]),
    "2 processes": (2, ["--data.batch_size=1", "--trainer.accumulate_grad_batches=2"]),
    "2 processes, batches of 2": (2, ["--data.batch_size=2"]),
    "1 process, batches of 4": (1, ["--data.batch_size=4"]),
}
STEPS = 7


def run(workshop: Workshop, output: str, layout: str, *more: str, before: Callable[[int], Any] = int) -> int:
    """Run ``specforge fit``; return the exit status of the run or its agent."""
    processes, words = LAYOUTS[layout]
    words = ["fit", *workshop.words(output, *words, QUIET, f"--trainer.max_steps={STEPS}", *more)]
    if processes > 1:
        return begin_torchrun(words, workshop.folder, processes, before).wait()

    def work() -> int:
        before(0)
        return main(words)

    return begin(work, workshop.folder / "single.log").wait()


def at_step(step: int, act: Callable[[], Any], rank: int) -> Callable[[int], None]:
    """Run a function in one process during a step, counted from 1."""

    def before(own: int) -> None:
        original = DraftModule.training_step

        def training_step(self: DraftModule, batch: Any, batch_idx: int) -> Any:
            if own == rank and self.trainer.global_step == step - 1:
                act()
            return original(self, batch, batch_idx)

        DraftModule.training_step = training_step  # the process ends after it

    return before


def own_signal(number: int) -> Callable[[], None]:
    return lambda: os.kill(os.getpid(), number)


def fail() -> None:
    raise ValueError("something that no part of the program expects")


@pytest.fixture
def rows_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[], Counter[tuple[str, ...]]]:
    """Count how often each epoch has seen each packed row, over all runs and processes from now on."""
    original = DraftModule.training_step
    log = tmp_path / "rows.txt"

    def step(self: DraftModule, batch: Any, batch_idx: int) -> Any:
        loss = original(self, batch, batch_idx)
        with log.open("a", encoding="utf-8") as file:
            for tokens, ids in zip(batch["input_ids"], batch["document_ids"], strict=True):
                file.write(f"{self.trainer.current_epoch} {hash(tuple(tokens[ids >= 0].tolist()))}\n")
        return loss

    monkeypatch.setattr(DraftModule, "training_step", step)
    return lambda: Counter(tuple(line.split()) for line in log.read_text(encoding="utf-8").splitlines())


@pytest.fixture(scope="module")
def straight(shared: Workshop) -> dict[str, torch.Tensor]:
    """The weights of a run of one process without a stop."""
    assert run(shared, "straight", "1 process") == 0
    return weights(shared.run_folder("straight") / "checkpoints" / "last.ckpt")


def assert_close(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> None:
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=1e-4, atol=1e-4, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize(
    ("first", "then", "same_means"),
    [
        ("2 processes", "1 process", True),
        ("1 process", "2 processes", True),
        ("2 processes, batches of 2", "1 process, batches of 4", False),
    ],
)
def test_resuming_with_others(workshop, straight, rows_seen, monkeypatch, first, then, same_means):
    monkeypatch.setattr(stopping, "SECONDS_BETWEEN", 0)  # so that each step asks
    rank = LAYOUTS[first][0] - 1
    status = run(workshop, "runs", first, before=at_step(3, own_signal(signal.SIGTERM), rank))
    assert status != 0
    last = workshop.run_folder("runs") / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 3
    shown = (workshop.folder / ("rank0.log" if rank else "single.log")).read_text(encoding="utf-8")
    assert "Stopped by SIGTERM at step 3" in shown and "--ckpt_path last" in shown
    assert run(workshop, "runs", then, "--ckpt_path=last") == 0
    seen = rows_seen()
    assert set(seen.values()) == {1}
    assert Counter(epoch for epoch, _ in seen) == {"0": 16, "1": 12}
    if same_means:  # a mean of the halves' means differs from the mean of the batch
        assert_close(straight, weights(last))


@pytest.mark.parametrize(
    ("seconds", "stop"),
    [(2.0, 2), (0.4, 3), (0.001, 4)],
    ids=["asked at each step", "asked at steps 1 and 3", "asked at step 1 and the end of the epoch"],
)
def test_a_stop_is_asked_for_by_the_time_of_the_slowest_process(workshop, seconds, stop):
    """On a clock that advances only with the steps, in the process that gets no signal."""
    terminate = at_step(2, own_signal(signal.SIGTERM), rank=0)

    def before(rank: int) -> None:
        terminate(rank)
        own, now, step = (seconds if rank else 1e-6), 0.0, DraftModule.training_step

        def training_step(self: DraftModule, batch: Any, batch_idx: int) -> Any:
            nonlocal now
            now += own
            return step(self, batch, batch_idx)

        DraftModule.training_step = training_step
        stopping.time = SimpleNamespace(perf_counter=lambda: now)

    assert run(workshop, "runs", "2 processes, batches of 2", before=before) != 0
    last = workshop.run_folder("runs") / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == stop
    shown = [(workshop.folder / f"rank{rank}.log").read_text(encoding="utf-8") for rank in range(2)]
    assert f"Stopped by SIGTERM at step {stop}" in shown[0] and "error" not in "".join(shown)


@pytest.mark.parametrize(
    ("rank", "act", "cause"),
    [(1, own_signal(signal.SIGKILL), ""), (0, fail, "ValueError: something that no part of the program expects")],
    ids=["killed", "error"],
)
def test_a_process_that_dies_ends_the_other(workshop, straight, rank, act, cause):
    status = run(workshop, "runs", "2 processes", "--save_every_n_steps=2", before=at_step(4, act, rank))
    assert status != 0
    dead, other = ((workshop.folder / f"rank{number}.log").read_text(encoding="utf-8") for number in (rank, 1 - rank))
    assert cause in dead and "Traceback" not in other
    assert not other.count("error:") or f"specforge fit: error: rank {1 - rank} stopped at step 3" in other
    last = workshop.run_folder("runs") / "checkpoints" / "last.ckpt"
    assert torch.load(last, weights_only=True)["global_step"] == 2
    if rank == 1:
        assert run(workshop, "runs", "2 processes", "--ckpt_path=last") == 0
        assert_close(straight, weights(last))


def test_a_full_disk_ends_all(workshop):
    fill = lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, 200_000))  # noqa: E731
    words = ["--save_every_n_steps=2"]
    assert run(workshop, "runs", "2 processes", *words, before=at_step(5, fill, rank=0)) != 0
    shown = (workshop.folder / "rank0.log").read_text(encoding="utf-8")
    last = workshop.run_folder("runs") / "checkpoints" / "last.ckpt"
    assert f"{last} cannot be written: File too large" in shown and "Traceback" not in shown
    assert torch.load(last, weights_only=True)["global_step"] == 4
