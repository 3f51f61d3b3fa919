"""How a run ends early: signals that ask it to save and stop, and processes that are lost."""

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
    """Whether a signal has asked to stop; all processes of a run come to know of it at the same step."""

    def __init__(self) -> None:
        self._received = 0
        self._process = 0
        self._group: torch.distributed.ProcessGroup | None = None
        self._asked: tuple[Tensor, torch.distributed.Work] | None = None

    def listen(self, trainer: Trainer) -> None:
        """Take over the signals; Lightning gives them back when the run ends, however it ends.

        They are SIGINT, SIGTERM, and the one that SLURM is asked to send before it ends a job (SIGUSR1, unless the
        trainer's plugin says otherwise). Lightning's own handler of that one saves in the middle of a step.
        Outside the main thread, where Python has no signals, whoever runs the main thread decides.
        """
        self._received, self._process = 0, os.getpid()
        if trainer.world_size > 1:
            # Over this one, processes agree without their devices.
            self._group = torch.distributed.new_group(backend="gloo")
        if threading.current_thread() is not threading.main_thread():
            return
        environment = cluster_environment(trainer)
        asked = environment.requeue_signal if isinstance(environment, SLURMEnvironment) else None
        for number in {signal.SIGINT, signal.SIGTERM, asked or signal.SIGUSR1}:
            signal.signal(number, self._on_signal)

    def ask(self) -> None:
        """Begin to ask all processes, each of which has to do so at the same moment; none waits for the others here."""
        if self._group is not None:
            own = torch.tensor(self._received)
            work = torch.distributed.all_reduce(own, torch.distributed.ReduceOp.MAX, group=self._group, async_op=True)
            self._asked = own, work

    def answer(self) -> int:
        """Return the signal that any process had received when all were asked last, 0 for none."""
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
            return  # a process that loads batches, which is needed up to the last step
        if self._received:
            # Only a person means it when they ask again; schedulers and launchers repeat themselves.
            if number == self._received == signal.SIGINT:
                raise KeyboardInterrupt
            return
        self._received = number
        again = "; press Ctrl-C again to stop at once without saving" if number == signal.SIGINT else ""
        _write(f"\n{signal.Signals(number).name}: stopping after this step and saving{again}.\n")


def is_of_a_lost_process(error: RuntimeError) -> bool:
    """Tell whether an error comes from talking to a process of the run that is no longer there."""
    # Gloo has no type of its own for it.
    return isinstance(error, torch.distributed.DistError) or "gloo" in str(error)


def explain_lost(error: RuntimeError | ValueError) -> str | None:
    """Return what a run says when a process or memory that it needs is lost; None for other errors."""
    if isinstance(error, ValueError):
        # Such an error may arise anywhere, and Lightning makes a ValueError of what arises while it logs.
        if not isinstance(error.__cause__, RuntimeError):
            return None
        error = error.__cause__
    text = str(error).partition("\n")[0].strip()
    if is_of_a_lost_process(error):
        return "another process of the run has ended; its output, or the launcher's, says why"
    if text.startswith("DataLoader worker (pid") and "Bus error" in text:
        return (
            "a process that loads batches was ended by a bus error: a file of rows or features was cut while it was in "
            "use, or shared memory is full"
        )
    if text.startswith("DataLoader worker (pid"):  # not "Caught ... in DataLoader worker", an error of its own
        return f"a process that loads batches was lost, perhaps for want of memory: {text} Set data.num_workers lower"
    if isinstance(error, torch.OutOfMemoryError) or "DefaultCPUAllocator" in text:
        return f"memory ran out: {text}. Set data.batch_size or data.max_length lower; see specforge estimate"
    return None


@rank_zero_only
def _write(text: str) -> None:
    # Not print: the signal may have come in the middle of another print, which cannot be entered twice.
    with suppress(OSError):
        os.write(1, text.encode())
