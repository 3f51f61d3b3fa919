"""Child processes that a test may kill, and the files that they leave."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from specforge.errors import SpecforgeError


def files(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def in_child(work: Callable[[], object]) -> int:
    """Start work in a child process; return its id."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            work()
            status = 0
        except SpecforgeError as error:
            print(error, flush=True)
            status = 10 + error.exit_status
        finally:
            os._exit(status)
    return child


def status_of(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
