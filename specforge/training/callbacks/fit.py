"""The callbacks of a training run: what they are by default, which can be left out, and where they come from."""

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
    """The callbacks of a training run that is stored, in their order; None leaves one out.

    Args:
        progress_bar: Shows the progress of any run; trainer.enable_progress_bar turns it off as well.
        summary: Prints what is trained on what, and a line after each validation.
        advice: Prints what a recipe wastes.
        charts: Arranges the curves of TensorBoard's Custom Scalars.
        acceptance_figure: Draws acceptance by position after each validation.
        samples: Shows texts of the validation rows with the accepted tokens marked.
        throughput: Logs tokens a second, the share of time that training waits for data, and memory.
        random_state: Stores and restores the state of random numbers.
        batch_numbers: Counts batches anew where a run is resumed with another batch size or number of processes.
        best_checkpoint: Saves the state of the best validation.
        last_checkpoint: Saves the last state, every save_every_n_steps, after each epoch and on a signal.
        draft_writer: Writes the best draft at the end.
        hyperparameters: Writes the settings and results by which TensorBoard compares runs.
        resumed_settings: Prints which settings a resumed run changes, and has optimizer and schedule follow them.
    """

    progress_bar: ProgressBar | None = field(default_factory=ProgressBar)
    summary: Summary | None = field(default_factory=Summary)
    advice: Advice | None = field(default_factory=Advice)
    charts: ScalarCharts | None = field(default_factory=ScalarCharts)
    acceptance_figure: AcceptanceFigure | None = field(default_factory=AcceptanceFigure)
    samples: SampleTexts | None = field(default_factory=SampleTexts)
    # After those above, whose time at a validation it leaves out.
    throughput: Throughput | None = field(default_factory=Throughput)
    random_state: RandomState | None = field(default_factory=RandomState)
    batch_numbers: BatchNumbers | None = field(default_factory=BatchNumbers)
    best_checkpoint: BestCheckpoint = field(default_factory=BestCheckpoint)
    last_checkpoint: LastCheckpoint = field(default_factory=LastCheckpoint)
    draft_writer: DraftWriter | None = field(default_factory=DraftWriter)
    hyperparameters: Hyperparameters | None = field(default_factory=Hyperparameters)
    resumed_settings: ResumedSettings | None = field(default_factory=ResumedSettings)

    def present(self, *names: str) -> list[Callback]:
        """Return those that are not left out, in order.

        Args:
            *names: Which of them; all by default.
        """
        found = (getattr(self, one.name) for one in fields(self) if not names or one.name in names)
        return [one for one in found if one is not None]

    @classmethod
    def defaults(cls) -> dict[str, dict[str, Any]]:
        """Return the class of each by name, as a configuration gives it."""
        classes: dict[str, Any] = {one.name: one.default_factory for one in fields(cls)}
        return {name: {"class_path": f"{one.__module__}.{one.__qualname__}"} for name, one in classes.items()}

    @classmethod
    def missing_in(cls, trainer: Trainer) -> list[Callback]:
        """Return what a trainer is to be given to train a draft as the command does.

        Those whose class the trainer has already are left out, and so are all of them where it has a
        ``BestCheckpoint``, which means that it was given a run's callbacks, and where nothing is stored
        (``enable_checkpointing=False``, ``fast_dev_run``).
        """
        stores = trainer.checkpoint_callbacks and not trainer.fast_dev_run  # type: ignore[attr-defined]
        if not is_fitting(trainer) or not stores or callbacks_of(trainer, BestCheckpoint):
            return []
        given = {type(one) for one in callbacks_of(trainer, Callback)}
        return [one for one in cls(progress_bar=None).present() if type(one) not in given]
