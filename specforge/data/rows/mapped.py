"""Files that are mapped into memory: one that is cut meanwhile would end the process by SIGBUS, without a message."""

from __future__ import annotations

import os
from pathlib import Path

from specforge.errors import SpecforgeError


def require_size(path: Path, size: int) -> None:
    """Make sure that a mapped file still has all of its bytes, before they are read.

    Args:
        path: The file.
        size: Bytes that it had when it was mapped.

    Raises:
        SpecforgeError: It is shorter, or gone.
    """
    try:
        left = os.stat(path).st_size
    except OSError as error:
        raise SpecforgeError(f"{path} can no longer be read: {error.strerror}") from error
    if left < size:
        raise SpecforgeError(
            f"{path} was cut while it was in use: {left:,} of its {size:,} bytes are left; prepare it again"
        )
