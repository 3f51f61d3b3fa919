"""When the state of a run is saved: the best, the last, and on a signal."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal, cast

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.plugins import TorchCheckpointIO
from torch import Tensor

from specforge.private.lightning import cluster_environment, is_accumulating, may_stop_early, validation_follows
from specforge.training.attached import callbacks_of, is_fitting
from specforge.training.callbacks.board.hyperparameters import log_results
from specforge.training.callbacks.configuration import next_call
from specforge.training.callbacks.stopping import StopRequest
from specforge.training.module import DraftModule
from specforge.training.runs import BEST, LAST
from specforge.training.saving import WholeCheckpointIO
from specforge.training.saying import say


class BestCheckpoint(ModelCheckpoint):
    """Saves the state of the best validation as ``checkpoints/best.ckpt``.

    The folder of the checkpoints is ``dirpath``; unless it is set, it is below the folder of the trainer's logger.

    Args:
        monitor: What to choose by; null for the acceptance length, exact or as a proxy as the data allow.
        mode: Whether more of it is better (max), or less (min).
    """

    def __init__(self, monitor: str | None = None, mode: Literal["max", "min"] = "max") -> None:
        super().__init__(
            filename=Path(BEST).stem,
            monitor=monitor,
            mode=mode,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find what to choose by: the data decide whether the acceptance length is exact or a proxy."""
        self.monitor = self.monitor or cast(DraftModule, pl_module).monitor
        super().setup(trainer, pl_module, stage)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where this validation is the best so far, and log by what runs are compared."""
        before = self.best_model_score
        super().on_validation_end(trainer, pl_module)
        if self.best_model_score is not before:
            log_results("best", trainer, pl_module)


class LastCheckpoint(Checkpoint):
    """Saves the last state as ``checkpoints/last.ckpt``: every so many steps, after each epoch, and on a signal.

    Lightning calls a ``Checkpoint`` after other callbacks and in the order given, here after the best has been chosen.

    Args:
        every_n_steps: Optimizer steps between two savings.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        self.every_n_steps = every_n_steps
        self._stop = StopRequest()
        self._saved_step = 0
        self._leaving = 0
        self._epoch_is_over = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Have checkpoints written whole or not at all, unless the trainer was given a writer of its own."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals that ask to stop: the step under way is finished and saved first."""
        epochs = trainer.fit_loop.epoch_progress.current
        if epochs.completed == epochs.ready:
            # Going on from the end of an epoch, there is no epoch to take up in its middle.
            trainer.fit_loop.epoch_loop.restarting = False
        self._saved_step, self._leaving = trainer.global_step, 0
        self._stop.listen(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave, once the last step has been saved and logged."""
        if self._leaving:
            self._leave(trainer, self._leaving)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Ask all processes for signals; they have answered when the step ends."""
        self._stop.ask()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time, or when a signal asks to stop; where a validation follows the step, after that."""
        # What is saved before a validation goes on behind it, and the best draft would be chosen without it.
        if not validation_follows(trainer):
            self._save_if_it_is_time(trainer, self._stop.answer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation in the middle of an epoch, for the step before it."""
        if is_fitting(trainer):
            self._save_if_it_is_time(trainer, self._stop.agreed)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after each epoch; where the run ends inside one, its last step has been saved already."""
        if _epoch_is_complete(trainer):
            self._epoch_is_over = True
            self._save(trainer)
            self._epoch_is_over = False
        if number := self._stop.agreed():
            self._leave(trainer, number)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store an epoch that has ended as one that is complete."""
        # Lightning stores it as one under way, and where max_steps is set it goes on one epoch too far.
        if self._epoch_is_over:
            for scope in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
                scope["completed"] = scope["processed"]

    def _save_if_it_is_time(self, trainer: Trainer, signal_received: Callable[[], int]) -> None:
        # Between optimizer steps there are gradients that a checkpoint does not hold.
        between_steps = trainer.global_step == self._saved_step or is_accumulating(trainer)
        if between_steps or _epoch_is_complete(trainer):  # the whole epoch is saved when it has ended
            return
        self._leaving = signal_received()
        is_last_step = trainer.global_step == trainer.max_steps or _stops_early(trainer)
        if self._leaving or is_last_step or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(checkpoint_folder(trainer) / LAST)
        self._saved_step = trainer.global_step

    def _leave(self, trainer: Trainer, number: int) -> None:
        why = "Interrupted" if number == signal.SIGINT else f"Stopped by {signal.Signals(number).name}"
        launched = trainer.world_size > 1 and cluster_environment(trainer).creates_processes_externally
        how = ", under the same launcher" if launched else ""
        last = checkpoint_folder(trainer) / LAST
        say(
            f"\n{why} at step {trainer.global_step}; everything up to it is saved in {last}.\n"
            f"To go on{how}:  {next_call(trainer, 'fit', last)}"
        )
        raise SystemExit(128 + number)


def checkpoint_folder(trainer: Trainer) -> Path:
    """Return the folder of a run's checkpoints; its parent is the run's folder."""
    return Path(str(best_checkpoint(trainer).dirpath))


def best_checkpoint(trainer: Trainer) -> BestCheckpoint:
    """Return the callback that saves the best state of a run."""
    return callbacks_of(trainer, BestCheckpoint)[0]


def _stops_early(trainer: Trainer) -> bool:
    """Tell whether ``max_time`` is over, or a callback has asked to stop, and the trainer will do so."""
    return bool(trainer.should_stop and may_stop_early(trainer))


def _epoch_is_complete(trainer: Trainer) -> bool:
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return bool(trainer.is_last_batch or batches >= trainer.num_training_batches)
