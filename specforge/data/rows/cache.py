"""Cache folders that are written atomically."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

from specforge.errors import SpecforgeError
from specforge.files import whole_folder

_log = logging.getLogger(__name__)


def ensure_folder(folder: Path, write: Callable[[Path], None], is_whole: Callable[[Path], bool]) -> None:
    """Make sure that a folder exists with its complete content.

    If two processes write it at once, the first to finish wins.

    Args:
        folder: The folder to provide.
        write: Fills an empty folder.
        is_whole: Returns whether an existing folder is undamaged; a damaged one is written again.

    Raises:
        SpecforgeError: The folder cannot be written.
    """
    if is_whole(folder):
        return
    try:
        if folder.exists():
            _log.warning("the cache %s is damaged and will be built again", folder)
            shutil.rmtree(folder)
        with whole_folder(folder) as temporary:
            write(temporary)
    except OSError as error:
        if not is_whole(folder):  # otherwise another process finished first, with the same content
            raise SpecforgeError(
                f"cannot write {folder}: {error}; free some space or choose another data.cache_dir"
            ) from error
