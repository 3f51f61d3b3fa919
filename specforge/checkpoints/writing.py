"""Atomic replacement of an output folder: it is written under a temporary name and renamed."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from specforge.errors import SpecforgeError, UsageError
from specforge.files import whole_folder


@contextmanager
def replacing_folder(folder: Path, mark: str | None = None) -> Iterator[Path]:
    """Yield a temporary folder to write into; on success it is renamed to ``folder``.

    Args:
        folder: The folder to write. An existing folder that is not empty is replaced only if it holds ``mark``.
        mark: Name of a file that identifies a replaceable folder; None never replaces one.

    Yields:
        The temporary folder.

    Raises:
        UsageError: Something else exists there.
        SpecforgeError: It cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and (_holds(folder, mark) or not any(folder.iterdir()))):
        but = f" and holds no {mark}" if mark else ""
        raise UsageError(f"{folder} already exists{but}; give another folder as --output")
    earlier = folder.absolute().with_name(f".{folder.absolute().name}.{os.getpid()}.earlier")
    try:
        with whole_folder(folder) as temporary:
            yield temporary
            if folder.exists():
                os.replace(folder, earlier)
    except OSError as error:
        raise SpecforgeError(f"{folder} cannot be written: {error}") from error
    finally:
        if earlier.exists():
            if folder.exists():
                shutil.rmtree(earlier, ignore_errors=True)
            else:
                os.replace(earlier, folder)


def _holds(folder: Path, mark: str | None) -> bool:
    return mark is not None and (folder / mark).is_file()
