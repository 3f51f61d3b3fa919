"""Checkpoints on disk: whole under their names at any moment, whatever ends the process."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins import TorchCheckpointIO

from specforge.errors import UsageError
from specforge.files import leftovers, sync, whole_file
from specforge.training.runs import LAST, PREVIOUS, check_checkpoint


class WholeCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint whole or not at all.

    Lightning's own writer takes a second copy in memory and a third in the system's temporary folder, from where it is
    copied if that is another disk: killed meanwhile, it leaves half a file under the checkpoint's name.

    The ``last.ckpt`` that is replaced is kept as ``previous.ckpt``, to go on from if the new one is damaged.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last_is_whole = False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            OSError: It cannot be written, which the message says with its path; earlier ones are as they were.
        """
        path = Path(path)
        try:
            for left in leftovers(path):  # a run belongs to one process: whoever wrote it is gone
                left.unlink()
            with whole_file(path) as file:
                _write(checkpoint, file)
                sync(file)  # until the disk has it, the one before it keeps its name
                if path.name == LAST:
                    # One that another process has left may be the reason why this one goes on from the one before it.
                    if self._last_is_whole or _is_whole(path):
                        path.replace(path.with_name(PREVIOUS))
                    self._last_is_whole = True
        except OSError as error:
            raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from error


def _is_whole(path: Path) -> bool:
    try:
        check_checkpoint(path)
    except UsageError:
        return False
    return True


def _write(checkpoint: dict[str, Any], path: Path) -> None:
    with path.open("wb") as file:
        try:
            torch.save(checkpoint, file)
        except RuntimeError as error:
            if isinstance(error.__context__, OSError):  # the writer of torch hides why the file took no more
                raise error.__context__ from None
            raise
