"""Atomic checkpoints: a file with a checkpoint's name is complete at any moment, however the process ends."""

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
    """Writes checkpoints atomically.

    Lightning's own writer makes a second copy in memory and a third in the system's temporary folder, which is copied
    again if that is another disk; if it is killed meanwhile, half a file remains under the checkpoint's name.

    The replaced ``last.ckpt`` is kept as ``previous.ckpt``, to resume from if the new one is damaged.
    """

    def __init__(self) -> None:
        super().__init__()
        self._last_is_whole = False

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | os.PathLike[str], storage_options: Any = None
    ) -> None:
        """Write a checkpoint.

        Raises:
            OSError: The file, named in the message, cannot be written; earlier checkpoints are unchanged.
        """
        path = Path(path)
        try:
            for left in leftovers(path):  # a run belongs to one process, so its writer is gone
                left.unlink()
            with whole_file(path) as file:
                _write(checkpoint, file)
                sync(file)  # the previous file keeps its name until this one is on disk
                if path.name == LAST:
                    # An existing last.ckpt may be the damaged one that this run resumed past.
                    if self._last_is_whole or _is_whole(path):
                        _keep(path, path.with_name(PREVIOUS))
                    self._last_is_whole = True
        except OSError as error:
            raise OSError(error.errno, f"{path} cannot be written: {error.strerror}") from error


def _keep(path: Path, name: Path) -> None:
    """Give a file a second name; it keeps the first until it is replaced."""
    name.unlink(missing_ok=True)
    try:
        name.hardlink_to(path)
    except OSError:  # a file system without hard links
        path.replace(name)


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
            if isinstance(error.__context__, OSError):  # torch's writer hides the cause
                raise error.__context__ from None
            raise
