"""Imports of the large libraries, which take most of a command's start."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def without_collection() -> Iterator[None]:
    """Import torch and what comes with it while the garbage collector is off.

    All that modules create stays, so that a collection finds nothing and takes a fifth of the time of an import. Later
    collections leave these objects out, too. Does nothing if torch was imported earlier, or if the collector is off.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    gc.disable()
    try:
        yield
        gc.freeze()
    finally:
        gc.enable()
