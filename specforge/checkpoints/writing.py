"""Writing a folder beside its place and renaming it, so that there is a whole one or none."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from specforge.errors import SpecforgeError, UsageError
from specforge.files import whole_folder


@contextmanager
def written_whole(folder: Path, mark: str | None = None) -> Iterator[Path]:
    """Give a new folder to write into, which takes its place when everything has gone well.

    Args:
        folder: Where it belongs. One that is there and not empty is replaced only if it holds ``mark``.
        mark: Name of a file that tells such a folder from other ones; None where nothing is ever replaced.

    Yields:
        The folder beside it.

    Raises:
        UsageError: Something else is there.
        SpecforgeError: It cannot be written.
    """
    if folder.exists() and not (folder.is_dir() and (_holds(folder, mark) or not any(folder.iterdir()))):
        but = f", and holds no {mark}" if mark else ""
        raise UsageError(f"{folder} is there already{but}; give another folder as --output")
    earlier = folder.absolute().with_name(f".{folder.absolute().name}.{os.getpid()}.earlier")
    try:
        with whole_folder(folder) as beside:
            yield beside
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
