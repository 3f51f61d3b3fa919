"""Files and folders that are there whole or not at all, and locks that say who writes them."""

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
    """Give an empty file to write, which takes a file's place when it has gone well and the disk has it.

    It lies beside its place, under a name that nobody else uses: of several processes that write one file, the last to
    finish wins. Whatever writes it, it gets the mode that the umask asks for.

    Args:
        path: Where it belongs; the folder is created if need be.
        durable: Wait for the disk; what is written often, and checked when it is read, does without.

    Raises:
        OSError: It cannot be written; what was there is as it was.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = _beside(path)
    beside.touch(exist_ok=False)
    mode = beside.stat().st_mode
    try:
        yield beside
        beside.chmod(mode)  # safetensors makes its files private
        if durable:
            sync(beside)
        os.replace(beside, path)
        if durable:
            sync(path.parent)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def whole_folder(folder: Path) -> Iterator[Path]:
    """Give an empty folder to fill, which takes its place when that has gone well.

    Args:
        folder: Where it belongs: nothing, or an empty folder.

    Raises:
        OSError: It cannot be written, or something is there by now.
    """
    beside = _beside(folder)
    beside.mkdir(parents=True)
    try:
        yield beside
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def leftovers(path: Path) -> Iterator[Path]:
    """Yield what processes left beside a file that were killed while they wrote it."""
    return path.parent.glob(f".{glob.escape(path.name)}.{'[0-9a-f]' * 2 * _RANDOM_BYTES}")


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Hold an output for this process alone; the lock of a process that was killed is free at once.

    Args:
        output: A file or folder, which need not exist; the lock is a hidden file beside it.

    Raises:
        SpecforgeError: Another process holds it.
        OSError: The lock cannot be made.
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
        path.unlink(missing_ok=True)  # while it is held: who has opened it meanwhile sees that it is gone
        lock.release()


def _beside(path: Path) -> Path:
    path = path.absolute()
    return path.with_name(f".{path.name}.{secrets.token_hex(_RANDOM_BYTES)}")


def sync(path: Path) -> None:
    """Wait until the disk has a file, or the names in a folder."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
