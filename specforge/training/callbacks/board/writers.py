"""Where a run writes for TensorBoard."""

from __future__ import annotations

from lightning.pytorch import Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from torch.utils.tensorboard import SummaryWriter


def writers(trainer: Trainer) -> list[SummaryWriter]:
    """Return the writers of TensorBoard: in the first process alone, and none where other loggers are chosen."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]
