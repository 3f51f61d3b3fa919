"""Ctrl-C while libraries load."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def ended_by_interrupt() -> Iterator[None]:
    """Let Ctrl-C end the process at once instead of raising KeyboardInterrupt.

    Raised in the middle of loading a library, the exception can get lost there, and the program would go on.
    """
    handler = signal.getsignal(signal.SIGINT)
    is_changed = handler is signal.default_int_handler and threading.current_thread() is threading.main_thread()
    if is_changed:
        signal.signal(signal.SIGINT, signal.SIG_DFL)
    try:
        yield
    finally:
        if is_changed:
            signal.signal(signal.SIGINT, handler)
