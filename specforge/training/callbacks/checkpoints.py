"""When the state of a run is saved: best, last, and on a signal."""

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

    The folder of the checkpoints is ``dirpath``; by default it is inside the folder of the trainer's logger.

    Args:
        monitor: Metric to choose by; null for the acceptance length, exact if the data allow it, else its proxy.
        mode: Whether a higher (max) or a lower (min) value is better.

    Attributes:
        validated_step: Step of the latest validation; 0 before the first.
    """

    def __init__(self, monitor: str | None = None, mode: Literal["max", "min"] = "max") -> None:
        self.validated_step = 0
        super().__init__(
            filename=Path(BEST).stem,
            monitor=monitor,
            mode=mode,
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Set the metric to choose by: the data decide whether the acceptance length is exact or a proxy."""
        self.monitor = self.monitor or cast(DraftModule, pl_module).monitor
        super().setup(trainer, pl_module, stage)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save if this validation is the best so far, and log the results by which runs are compared."""
        before = self.best_model_score
        if is_fitting(trainer):
            self.validated_step = trainer.global_step
        super().on_validation_end(trainer, pl_module)
        if self.best_model_score is not before:
            log_results("best", trainer, pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs."""
        return {**super().state_dict(), "validated_step": self.validated_step}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Resume."""
        self.validated_step = state_dict.get("validated_step", 0)
        super().load_state_dict(state_dict)


class LastCheckpoint(Checkpoint):
    """Saves the last state as ``checkpoints/last.ckpt``: every n steps, after each epoch, and on a signal.

    Lightning calls a ``Checkpoint`` after other callbacks and in the order given, here after the best has been chosen.

    Args:
        every_n_steps: Optimizer steps between two checkpoints.
    """

    def __init__(self, every_n_steps: int = 500) -> None:
        self.every_n_steps = every_n_steps
        self._stop = StopRequest()
        self._saved_step = 0
        self._leaving = 0
        self._epoch_is_over = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write checkpoints atomically, unless the trainer was given its own checkpoint writer."""
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:
            trainer.strategy.checkpoint_io = WholeCheckpointIO()

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Handle signals that ask to stop: the current step is finished and saved first."""
        epochs = trainer.fit_loop.epoch_progress.current
        if epochs.completed == epochs.ready:
            # The run resumes at the end of an epoch, not inside one.
            trainer.fit_loop.epoch_loop.restarting = False
        self._saved_step, self._leaving = trainer.global_step, 0
        self._stop.listen(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Stop once the last step has been saved and logged."""
        if self._leaving:
            self._exit(trainer, self._leaving)

    def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
        """Start to collect signals from all processes; the result is ready when the step ends."""
        if not is_accumulating(trainer):
            self._stop.ask()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a checkpoint is due or a signal asks to stop; if a validation follows the step, save after it."""
        # A checkpoint from before a validation resumes after it: the best draft would be chosen without it.
        if not validation_follows(trainer):
            self._save_if_due(trainer, self._stop.answer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the step before a validation inside an epoch, after that validation."""
        if is_fitting(trainer):
            self._save_if_due(trainer, self._stop.agreed)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after each epoch; if the run ends inside one, its last step has been saved already."""
        if _epoch_is_complete(trainer):
            self._epoch_is_over = True
            self._save(trainer)
            self._epoch_is_over = False
        if number := self._stop.agreed():
            self._exit(trainer, number)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store an epoch that has ended as complete."""
        # Lightning stores it as unfinished; if max_steps is set, it would train one epoch too many.
        if self._epoch_is_over:
            for scope in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
                scope["completed"] = scope["processed"]

    def _save_if_due(self, trainer: Trainer, signal_received: Callable[[], int]) -> None:
        # During gradient accumulation there are gradients that a checkpoint does not hold.
        between_steps = trainer.global_step == self._saved_step or is_accumulating(trainer)
        if between_steps or _epoch_is_complete(trainer):  # a complete epoch is saved at its end
            return
        self._leaving = signal_received()
        is_last_step = trainer.global_step == trainer.max_steps or _stops_early(trainer)
        if self._leaving or is_last_step or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(checkpoint_folder(trainer) / LAST)
        self._saved_step = trainer.global_step

    def _exit(self, trainer: Trainer, number: int) -> None:
        why = "Interrupted" if number == signal.SIGINT else f"Stopped by {signal.Signals(number).name}"
        launched = trainer.world_size > 1 and cluster_environment(trainer).creates_processes_externally
        how = ", under the same launcher" if launched else ""
        last = checkpoint_folder(trainer) / LAST
        say(
            f"\n{why} at step {trainer.global_step}; everything up to it is saved in {last}.\n"
            f"To resume{how}:  {next_call(trainer, 'fit', last)}"
        )
        raise SystemExit(128 + number)


def checkpoint_folder(trainer: Trainer) -> Path:
    """Return the folder of a run's checkpoints; its parent is the run's folder."""
    return Path(str(best_checkpoint(trainer).dirpath))


def best_checkpoint(trainer: Trainer) -> BestCheckpoint:
    """Return the callback that saves the best state of a run."""
    return callbacks_of(trainer, BestCheckpoint)[0]


def _stops_early(trainer: Trainer) -> bool:
    """Return whether the trainer will stop because ``max_time`` is over or a callback asked it to."""
    return bool(trainer.should_stop and may_stop_early(trainer))


def _epoch_is_complete(trainer: Trainer) -> bool:
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return bool(trainer.is_last_batch or batches >= trainer.num_training_batches)
