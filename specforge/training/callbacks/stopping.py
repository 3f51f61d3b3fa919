"""Early ends of a run: signals that ask it to save and stop, and lost processes."""

from __future__ import annotations

import math
import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from specforge.private.lightning import cluster_environment

# Processes ask each other after this many steps, or about after this time, whichever is sooner.
STEPS_BETWEEN = 10
SECONDS_BETWEEN = 1.0


class StopRequest:
    """Whether a signal has asked to stop; all processes of a run learn it at the same step."""

    def __init__(self) -> None:
        self._received = 0
        self._process = 0
        self._group: torch.distributed.ProcessGroup | None = None
        self._asked: tuple[Tensor, torch.distributed.Work] | None = None
        self._interval = 1
        self._steps = 0
        self._since = 0.0

    def listen(self, trainer: Trainer) -> None:
        """Install the signal handlers; Lightning restores the previous ones when the run ends for any reason.

        The signals are SIGINT, SIGTERM, and the one that SLURM sends before it ends a job (SIGUSR1, unless the
        trainer's plugin sets another). Lightning's own handler of the latter saves in the middle of a step. Nothing is
        installed outside the main thread, where Python has no signals.
        """
        self._received, self._process = 0, os.getpid()
        self._interval, self._steps, self._since = 1, 0, time.perf_counter()
        if trainer.world_size > 1:
            # Processes agree over this group without their devices.
            self._group = torch.distributed.new_group(backend="gloo")
        if threading.current_thread() is not threading.main_thread():
            return
        environment = cluster_environment(trainer)
        asked = environment.requeue_signal if isinstance(environment, SLURMEnvironment) else None
        for number in {signal.SIGINT, signal.SIGTERM, asked or signal.SIGUSR1}:
            signal.signal(number, self._on_signal)

    def ask(self) -> None:
        """Start to ask all processes, if it is time to; each must call this once a step, and none waits here."""
        self._steps += 1
        if self._steps < self._interval:
            return
        now = time.perf_counter()
        self._send((now - self._since) / self._steps)
        self._since, self._steps = now, 0

    def answer(self) -> int:
        """Return a signal that any process had received if they were asked in this step, 0 for none."""
        if self._group is None:
            return self._received
        if self._asked is None:
            return 0
        (found, work), self._asked = self._asked, None
        work.wait()
        number, seconds = found.tolist()
        self._interval = min(max(int(SECONDS_BETWEEN / seconds), 1), STEPS_BETWEEN)
        return int(number)

    def agreed(self) -> int:
        """Ask now, and wait for the answer; the next step asks again."""
        self._send(math.inf)
        return self.answer()

    def _send(self, seconds: float) -> None:
        """Start to find the greatest signal, and the seconds a step of the slowest process, which set when to ask."""
        if self._group is None:
            return
        own = torch.tensor([self._received, seconds], dtype=torch.float64)
        work = torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
        self._asked = own, work

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a DataLoader worker, which is needed up to the last step
        if self._received:
            # Only a user's second signal means to stop at once; schedulers and launchers repeat theirs.
            if number == self._received == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._received = number
        again = "; press Ctrl-C again to stop at once without saving" if number == signal.SIGINT else ""
        _write(f"\n{signal.Signals(number).name}: stopping at the end of a step and saving{again}.\n")


def is_of_a_lost_process(error: RuntimeError) -> bool:
    """Return whether an error comes from communication with a process of the run that has died."""
    # Gloo has no exception type for it.
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def explain_lost(error: RuntimeError | ValueError) -> str | None:
    """Return the message for a lost process or memory exhaustion; None for other errors."""
    if isinstance(error, ValueError):
        # Such an error may arise anywhere; Lightning turns one raised during logging into a ValueError.
        if not isinstance(error.__cause__, RuntimeError):
            return None
        error = error.__cause__
    text = str(error).partition("\n")[0].strip()
    if is_of_a_lost_process(error):
        return "another process of the run has ended; its output, or the launcher's, says why"
    if text.startswith("DataLoader worker (pid") and "Bus error" in text:
        return (
            "a DataLoader worker was ended by a bus error: a file of rows or features was truncated while it was in "
            "use, or shared memory is full"
        )
    if text.startswith("DataLoader worker (pid"):  # not "Caught ... in DataLoader worker", which is its own error
        return f"a DataLoader worker was lost, perhaps for lack of memory: {text} Lower data.num_workers"
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
        return f"out of memory: {text}. Lower data.batch_size or data.max_length; see specforge estimate"
    return None


@rank_zero_only
def _write(text: str) -> None:
    # Not print: the signal may have interrupted another print, which is not reentrant.
    with suppress(OSError):
        os.write(1, text.encode())
