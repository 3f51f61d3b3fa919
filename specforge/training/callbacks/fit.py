"""The callbacks of a run of ``fit``, in their order."""

from __future__ import annotations

from pathlib import Path

from lightning.pytorch import Callback

from specforge.training.callbacks.advice import Advice
from specforge.training.callbacks.board.acceptance import AcceptanceFigure
from specforge.training.callbacks.board.charts import ScalarCharts
from specforge.training.callbacks.board.samples import SampleTexts
from specforge.training.callbacks.checkpoints import BestCheckpoint, LastCheckpoint
from specforge.training.callbacks.drafts import DraftWriter
from specforge.training.callbacks.progress import Summary
from specforge.training.callbacks.resuming import BatchNumbers, RandomState
from specforge.training.callbacks.speed import Throughput


def fit_callbacks(arguments: list[str], save_every_n_steps: int, folder: Path) -> list[Callback]:
    """Return the callbacks of a training run that is stored.

    Args:
        arguments: The words after ``specforge fit``, to tell a person how to go on.
        save_every_n_steps: Optimizer steps between two savings of the last state.
        folder: Folder of the checkpoints.
    """
    return [
        Summary(folder.parent),
        Advice(),
        ScalarCharts(),
        AcceptanceFigure(),
        SampleTexts(),
        Throughput(),  # behind those above, whose time at a validation it leaves out
        RandomState(),
        BatchNumbers(),
        BestCheckpoint(folder),
        LastCheckpoint(arguments, save_every_n_steps),
        DraftWriter(arguments),
    ]
