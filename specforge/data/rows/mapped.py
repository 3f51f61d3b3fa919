"""A check for memory-mapped files: reading one that was truncated would kill the process with SIGBUS."""

from __future__ import annotations

import os
from pathlib import Path

from specforge.errors import SpecforgeError


def require_size(path: Path, size: int) -> None:
    """Check that a mapped file still has all its bytes before they are read.

    Args:
        path: The file.
        size: Its size in bytes when it was mapped.

    Raises:
        SpecforgeError: The file is shorter or missing.
    """
    try:
        left = os.stat(path).st_size
    except OSError as error:
        raise SpecforgeError(f"{path} can no longer be read: {error.strerror}") from error
    if left < size:
        raise SpecforgeError(
            f"{path} was truncated while in use: {left:,} of its {size:,} bytes are left; prepare it again"
        )
