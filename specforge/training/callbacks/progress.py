"""Console output of a run: its progress, and a line for each validation."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.utilities import rank_zero_only

from specforge.data.module import data_of
from specforge.private.lightning import EpochBar
from specforge.training.attached import FIT, callbacks_of, is_fitting
from specforge.training.callbacks.board.acceptance import accept_rates
from specforge.training.callbacks.checkpoints import BestCheckpoint, checkpoint_folder
from specforge.training.module import DraftModule
from specforge.training.saying import say


class ProgressBar(EpochBar):
    """The progress bar of every run."""

    def __init__(self) -> None:
        super().__init__(leave=True, theme=RichProgressBarTheme(metrics_format=".3f"))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Omit the run's number and validation metrics, which are printed elsewhere, so that the rest fits a line."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num" and not name.startswith("val/")}


class Summary(Callback):
    """Prints draft, data and length at the start, and the results after each validation."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Determine the length of the run, which may be refused, before a verifier is loaded."""
        if stage == FIT:
            _ = cast(DraftModule, pl_module).length

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summaries of data, draft and run."""
        module = cast(DraftModule, pl_module)
        say(data_of(trainer).summary_text())
        say(module.summary_text())
        say(str(module.length))
        stored = callbacks_of(trainer, BestCheckpoint)
        say(f"run: {checkpoint_folder(trainer).parent if stored else 'nothing of it is stored'}")

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print one line per validation, so that a log file shows how the draft learns."""
        metrics = trainer.callback_metrics
        module = cast(DraftModule, pl_module)
        if not is_fitting(trainer) or module.monitor not in metrics:
            return
        rates = " ".join(f"{rate:.3f}" for rate in accept_rates(trainer, module, "pos"))
        say(
            f"step {trainer.global_step:>6}  {module.monitor} {float(metrics[module.monitor]):.3f}  "
            f"by position {rates}  val/loss {float(metrics['val/loss']):.4f}"
        )
