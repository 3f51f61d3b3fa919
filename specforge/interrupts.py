"""Ctrl-C, which a library can turn into a different error while it is being imported."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def raising_keyboard_interrupt() -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` instead of any error that follows a Ctrl-C.

    Does nothing outside the main thread, since only that one receives signals, or if Ctrl-C is ignored or handled by
    other code.
    """
    if (
        threading.current_thread() is not threading.main_thread()
        or signal.getsignal(signal.SIGINT) is not signal.default_int_handler
    ):
        yield
        return
    interrupted = False

    def handle(number: int, frame: FrameType | None) -> None:
        nonlocal interrupted
        interrupted = True
        raise KeyboardInterrupt

    signal.signal(signal.SIGINT, handle)
    try:
        yield
    except (Exception, SystemExit) as error:
        if interrupted:
            raise KeyboardInterrupt from error
        raise
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
