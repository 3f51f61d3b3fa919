"""Training runs in forked processes, which start quickly because all modules are imported."""

from __future__ import annotations

import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.elastic.multiprocessing import SignalException
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from specforge.__main__ import main

SECONDS = 120
QUIET = "--trainer.enable_progress_bar=false"


@dataclass
class Process:
    """Work in a child process.

    Attributes:
        child: The process's id.
        log: File of its output.
    """

    child: int
    log: Path

    def send(self, number: int) -> None:
        """Send a signal if it is still running."""
        with suppress(ProcessLookupError):
            os.kill(self.child, number)

    def wait(self) -> int:
        """Return its exit status, or minus the signal that killed it; kill one that hangs and fail."""
        for _ in range(SECONDS * 100):
            ended, status = os.waitpid(self.child, os.WNOHANG)
            if ended:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.01)
        os.killpg(self.child, signal.SIGKILL)
        os.waitpid(self.child, 0)
        raise AssertionError(f"did not end in {SECONDS} seconds:\n{self.shown}")

    @property
    def shown(self) -> str:
        """Its output so far."""
        return self.log.read_text(encoding="utf-8") if self.log.exists() else ""


def begin(work: Callable[[], int], log: Path) -> Process:
    """Work in a child process with default signal handlers.

    Args:
        work: Returns the exit status.
        log: File that the output is appended to.
    """
    child = os.fork()
    if child:
        return Process(child, log)
    status = 70
    try:
        os.setpgid(0, 0)  # a process group, so that its children are killed with it
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
            signal.signal(number, signal.SIG_DFL)
        print_to(log)
        torch.set_num_threads(1)  # a fork loses torch's threads
        status = work()
    except SystemExit as error:
        status = int(error.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        os._exit(status)


def print_to(log: Path) -> None:
    """Append this process's output to a file."""
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    for number in (1, 2):
        os.dup2(file, number)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    logging.getLogger().handlers.clear()  # pytest's


def begin_torchrun(words: list[str], folder: Path, processes: int, before: Callable[[int], Any] = int) -> Process:
    """Run ``specforge`` in several processes that train together, under torchrun's agent.

    Args:
        words: The words after ``specforge``.
        folder: Folder of the outputs agent.log, rank0.log, ...; they are truncated first.
        processes: Number of processes.
        before: Called first in each, with its rank.
    """

    def worker() -> None:
        rank = int(os.environ["RANK"])
        print_to(folder / f"rank{rank}.log")
        torch.set_num_threads(1)
        before(rank)
        status = 70
        try:
            status = main([*words, "--trainer.strategy=ddp", f"--trainer.devices={processes}"])
        except Exception:
            traceback.print_exc()
        if status:
            raise SystemExit(status)

    def agent() -> int:
        settings = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            rdzv_backend="c10d",
            rdzv_endpoint="localhost:0",
            start_method="fork",
            max_restarts=0,
            monitor_interval=0.1,
        )
        try:
            elastic_launch(settings, worker)()
        except SignalException as error:
            return 128 + error.sigval
        return 0

    for log in folder.glob("*.log"):
        log.unlink()
    return begin(agent, folder / "agent.log")
