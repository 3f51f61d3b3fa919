"""What the head was worth before it was trained: a validation before the first step, and a line at the end."""

from __future__ import annotations

from typing import Any, cast

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from specforge.training.attached import FIT, callbacks_of
from specforge.training.callbacks.checkpoints import BestCheckpoint
from specforge.training.module import DraftModule
from specforge.training.saying import say


class UntouchedHead(Callback):
    """Validates the head before the first step, and prints at the end what training gained.

    Lightning's sanity check is this validation, over all batches; its figures are not among those that choose the best
    draft. A resumed run remembers the first one's.
    """

    def __init__(self) -> None:
        self._before: float | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let the sanity check run over all validation batches; Lightning leaves it out of resumed runs."""
        if stage == FIT:
            trainer.num_sanity_val_steps = float("inf")

    @rank_zero_only
    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Keep, print and log the acceptance length of the untouched head."""
        monitor = cast(DraftModule, pl_module).monitor
        if monitor not in trainer.callback_metrics:
            return
        self._before = float(trainer.callback_metrics[monitor])
        say(f"step {0:>6}  {monitor} {self._before:.3f}  before training")
        for logger in trainer.loggers:
            logger.log_metrics({monitor: self._before}, step=0)

    @rank_zero_only
    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the gain."""
        best = callbacks_of(trainer, BestCheckpoint)
        if self._before is None or not best or best[0].best_model_score is None:
            return
        after = float(best[0].best_model_score)
        gain = after / self._before - 1
        say(f"\n{best[0].monitor}: before training {self._before:.3f}, trained {after:.3f}: {gain:+.1%}")

    def state_dict(self) -> dict[str, Any]:
        """Return the figure, for checkpoints."""
        return {"before": self._before}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take the figure of the run that is resumed."""
        self._before = state_dict["before"]
