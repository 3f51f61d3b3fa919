"""Folders that are there whole or not at all."""

from __future__ import annotations

import logging
import shutil
import uuid
from collections.abc import Callable
from pathlib import Path

from specforge.errors import SpecforgeError

_log = logging.getLogger(__name__)


def ensure_folder(folder: Path, write: Callable[[Path], None], is_whole: Callable[[Path], bool]) -> None:
    """Make sure that a folder exists with its whole content.

    The content is written into a neighbour and renamed at the end: a process that is killed, or a disk that is full,
    leaves no half-written folder under the name. Of two processes that write at once, the first to finish wins.

    Args:
        folder: the folder to provide.
        write: fills the empty folder that it is given.
        is_whole: tells whether an existing folder is undamaged; a damaged one is written anew.

    Raises:
        SpecforgeError: the folder cannot be written.
    """
    if is_whole(folder):
        return
    neighbour = folder.with_name(f".{folder.name[:16]}-{uuid.uuid4().hex[:16]}")
    try:
        if folder.exists():
            _log.warning("the cache %s is damaged and is built again", folder)
            shutil.rmtree(folder)
        neighbour.mkdir(parents=True)
    except OSError as error:
        raise SpecforgeError(f"cannot write below {folder.parent}: {error}; choose another data.cache_dir") from error
    try:
        write(neighbour)
        _rename(neighbour, folder, is_whole)
    except OSError as error:
        raise SpecforgeError(
            f"cannot write {folder}: {error}; free some space or choose another data.cache_dir"
        ) from error
    finally:
        shutil.rmtree(neighbour, ignore_errors=True)


def _rename(neighbour: Path, folder: Path, is_whole: Callable[[Path], bool]) -> None:
    try:
        neighbour.rename(folder)
    except OSError:
        if not is_whole(folder):  # otherwise another process was faster, with the same content
            raise
