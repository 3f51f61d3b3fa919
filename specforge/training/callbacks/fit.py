"""The callbacks of a training run, for the command and for a plain Trainer."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any

from lightning.pytorch import Callback, Trainer

from specforge.training.attached import callbacks_of, is_fitting
from specforge.training.callbacks.advice import Advice
from specforge.training.callbacks.board.acceptance import AcceptanceFigure
from specforge.training.callbacks.board.charts import ScalarCharts
from specforge.training.callbacks.board.hyperparameters import Hyperparameters
from specforge.training.callbacks.board.samples import SampleTexts
from specforge.training.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from specforge.training.callbacks.drafts import DraftWriter
from specforge.training.callbacks.progress import ProgressBar, Summary
from specforge.training.callbacks.resuming import BatchNumbers, RandomState, ResumedSettings
from specforge.training.callbacks.speed import Throughput


@dataclass
class RunCallbacks:
    """The callbacks of a stored training run, in order; None leaves one out.

    Args:
        progress_bar: Shows the progress of any run; trainer.enable_progress_bar turns it off, too.
        summary: Prints a summary of draft and data, and a line after each validation.
        advice: Prints advice about a wasteful recipe.
        charts: Arranges the curves of TensorBoard's Custom Scalars.
        acceptance_figure: Draws acceptance by position after each validation.
        samples: Shows texts of the validation rows with the accepted tokens marked.
        throughput: Logs tokens per second, the share of time that training waits for data, and memory.
        random_state: Stores and restores the state of random number generators.
        batch_numbers: Recounts batches if a run is resumed with another batch size or number of processes.
        best_checkpoint: Saves the state of the best validation.
        last_checkpoint: Saves the last state, every save_every_n_steps, after each epoch and on a signal.
        draft_writer: Writes the best draft at the end.
        hyperparameters: Writes the settings and results by which TensorBoard compares runs.
        resumed_settings: Prints which settings a resumed run changes, and applies them to optimizer and schedule.
    """

    progress_bar: ProgressBar | None = field(default_factory=ProgressBar)
    summary: Summary | None = field(default_factory=Summary)
    advice: Advice | None = field(default_factory=Advice)
    charts: ScalarCharts | None = field(default_factory=ScalarCharts)
    acceptance_figure: AcceptanceFigure | None = field(default_factory=AcceptanceFigure)
    samples: SampleTexts | None = field(default_factory=SampleTexts)
    # After the callbacks above, so that it excludes their time at a validation.
    throughput: Throughput | None = field(default_factory=Throughput)
    random_state: RandomState | None = field(default_factory=RandomState)
    batch_numbers: BatchNumbers | None = field(default_factory=BatchNumbers)
    best_checkpoint: BestCheckpoint = field(default_factory=BestCheckpoint)
    last_checkpoint: LastCheckpoint = field(default_factory=LastCheckpoint)
    draft_writer: DraftWriter | None = field(default_factory=DraftWriter)
    hyperparameters: Hyperparameters | None = field(default_factory=Hyperparameters)
    resumed_settings: ResumedSettings | None = field(default_factory=ResumedSettings)

    def present(self, *names: str) -> list[Callback]:
        """Return the callbacks that are not left out, in order.

        Args:
            *names: Names of the callbacks to return; all by default.
        """
        found = (getattr(self, one.name) for one in fields(self) if not names or one.name in names)
        return [one for one in found if one is not None]

    @classmethod
    def defaults(cls) -> dict[str, dict[str, Any]]:
        """Return the class of each callback by name, in the form of a configuration."""
        classes: dict[str, Any] = {one.name: one.default_factory for one in fields(cls)}
        return {name: {"class_path": f"{one.__module__}.{one.__qualname__}"} for name, one in classes.items()}

    @classmethod
    def missing_in(cls, trainer: Trainer) -> list[Callback]:
        """Return the callbacks that a trainer lacks to train a draft like the command.

        Callbacks whose class the trainer already has are left out. Nothing is returned if it has a ``BestCheckpoint``,
        which means that it was given a run's callbacks, or if nothing is stored (``enable_checkpointing=False``,
        ``fast_dev_run``).
        """
        stores = trainer.checkpoint_callbacks and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if not is_fitting(trainer) or not stores or callbacks_of(trainer, BestCheckpoint):
            return []
        given = {type(one) for one in callbacks_of(trainer, Callback)}
        return [one for one in cls(progress_bar=None).present() if type(one) not in given]
