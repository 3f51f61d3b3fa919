"""Early ends of a run: signals that ask it to save and stop, and lost processes."""

from __future__ import annotations

import os
import signal
import threading
from contextlib import suppress
from types import FrameType

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins.environments import SLURMEnvironment
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from specforge.private.lightning import cluster_environment


class StopRequest:
    """Whether a signal has asked to stop; all processes of a run learn it at the same step."""

    def __init__(self) -> None:
        self._received = 0
        self._process = 0
        self._group: torch.distributed.ProcessGroup | None = None
        self._asked: tuple[Tensor, torch.distributed.Work] | None = None

    def listen(self, trainer: Trainer) -> None:
        """Install the signal handlers; Lightning restores the previous ones when the run ends for any reason.

        The signals are SIGINT, SIGTERM, and the one that SLURM sends before it ends a job (SIGUSR1, unless the
        trainer's plugin sets another). Lightning's own handler of the latter saves in the middle of a step. Nothing is
        installed outside the main thread, where Python has no signals.
        """
        self._received, self._process = 0, os.getpid()
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
        """Start to ask all processes; each must call this at the same step, and none waits here."""
        if self._group is not None:
            own = torch.tensor(self._received)
            work = torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
            self._asked = own, work

    def answer(self) -> int:
        """Return a signal that any process had received when last asked, 0 for none."""
        if self._asked is None:
            return self._received
        found, work = self._asked
        work.wait()
        return int(found)

    def agreed(self) -> int:
        """Ask, and wait for the answer."""
        self.ask()
        return self.answer()

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
        _write(f"\n{signal.Signals(number).name}: stopping after this step and saving{again}.\n")


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
