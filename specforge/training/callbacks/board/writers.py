"""Where the callbacks of a run write beyond plain curves."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import numpy.typing as npt
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger, WandbLogger
from torch.utils.tensorboard import SummaryWriter


def writers(trainer: Trainer) -> list[SummaryWriter]:
    """Return the TensorBoard writers: only in the first process, and none if other loggers are chosen."""
    if not trainer.is_global_zero:
        return []
    return [logger.experiment for logger in trainer.loggers if isinstance(logger, TensorBoardLogger)]


def show_image(trainer: Trainer, tag: str, draw: Callable[[], npt.NDArray[np.uint8]]) -> None:
    """Log a picture in TensorBoard, W&B and MLflow; nothing is drawn for other loggers.

    Args:
        trainer: The run's trainer.
        tag: Name of the picture.
        draw: Returns it, [height, width, 3].
    """
    step = trainer.global_step
    for logger in trainer.loggers if trainer.is_global_zero else []:
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_image(tag, draw(), step, dataformats="HWC")
        elif isinstance(logger, WandbLogger):
            logger.log_image(tag, [draw()], step)
        elif isinstance(logger, MLFlowLogger):
            logger.experiment.log_image(logger.run_id, draw(), key=tag, step=step)
