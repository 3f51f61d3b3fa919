"""Memory of a function call, on Linux."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

M_MMAP_THRESHOLD = -3  # of malloc.h


def growth_of_peak(work: Callable[[], Any]) -> int:
    """Return the growth of this process's peak resident memory during a call, in bytes."""
    libc = ctypes.CDLL("libc.so.6")
    # Large blocks are returned to the system at once, so that the peak is that of memory in use.
    libc.mallopt(M_MMAP_THRESHOLD, 2**16)
    libc.malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


def resident(what: str) -> int:
    """Return an entry of this process's status, in bytes: ``VmRSS`` is resident memory, ``VmHWM`` its peak."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{what}:"))
