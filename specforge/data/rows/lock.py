"""One process at a time."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from specforge.errors import SpecforgeError


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold an output folder for this process alone; the lock of a process that was killed is free at once.

    Args:
        output: the folder, which need not exist; the lock is a hidden file beside it.

    Raises:
        SpecforgeError: another process holds it.
        OSError: the lock cannot be made.
    """
    path = output.with_name(f".{output.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    file = _acquire(path, output)
    try:
        yield
    finally:
        path.unlink()
        os.close(file)


def _acquire(path: Path, output: Path) -> int:
    while True:
        file = os.open(path, os.O_CREAT | os.O_RDWR)
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            # Whoever held it before may have removed the file since it was opened here: then the lock holds nothing.
            if os.path.samestat(os.fstat(file), os.stat(path)):
                return file
        except FileNotFoundError:
            pass
        except BlockingIOError:
            os.close(file)
            raise SpecforgeError(
                f"another process is writing {output}; wait for it, or choose another --output"
            ) from None
        os.close(file)
