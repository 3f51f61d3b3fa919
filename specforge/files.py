"""Atomic writes of files and folders, and locks on outputs."""

from __future__ import annotations

import glob
import os
import secrets
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from filelock import FileLock, Timeout

from specforge.errors import SpecforgeError

_RANDOM_BYTES = 4


@contextmanager
def whole_file(path: Path, durable: bool = True) -> Iterator[Path]:
    """Yield an empty temporary file; on success it replaces ``path``.

    It is in the same folder, under a unique name: if several processes write one file, the last to finish wins. The
    file gets the mode of the umask, whatever library writes it.

    Args:
        path: The file to write; its folder is created if needed.
        durable: Wait until the file is on disk; False for files that are written often and checked when read.

    Raises:
        OSError: It cannot be written; an existing file is unchanged.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary_path(path)
    temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors makes its files private
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Yield an empty temporary folder; on success it is renamed to ``folder``.

    Args:
        folder: The folder to write; it must not exist or be empty.

    Raises:
        OSError: It cannot be written, or something has appeared there.
    """
    temporary = _temporary_path(folder)
    temporary.mkdir(parents=True)
    try:
        yield temporary
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def leftovers(path: Path) -> Iterator[Path]:
    """Yield the temporary files left by processes that were killed while they wrote a file."""
    return path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 2 * _RANDOM_BYTES}")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Lock an output for this process; the lock of a killed process is released at once.

    Args:
        output: A file or folder, which need not exist; the lock is a hidden file next to it.

    Raises:
        SpecforgeError: Another process holds the lock.
        OSError: The lock cannot be created.
    """
    path = output.with_name(f".{output.name}.lock")
    path.parent.mkdir(parents=True, exist_ok=True)
    lock = FileLock(path)
    try:
        lock.acquire(blocking=False)
    except Timeout:
        raise SpecforgeError(f"another process is writing {output}; wait for it, or choose another --output") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)  # while it is held: a process that has opened it sees that it is gone
        lock.release()


def _temporary_path(path: Path) -> Path:
    path = path.absolute()
    return path.with_name(f".{path.name}.{secrets.token_hex(_RANDOM_BYTES)}")


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
