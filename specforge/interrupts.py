"""Ctrl-C, which a library can turn into a different error, or into an abort, while it is being imported."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType

STATUS = 130
"""The exit status of an interrupted command, as shells have it."""


@contextmanager
def raising_keyboard_interrupt(program: str) -> Iterator[None]:
    """Raise ``KeyboardInterrupt`` instead of any error that follows a Ctrl-C; exit at once during an import.

    Does nothing outside the main thread, since only that one receives signals, or if Ctrl-C is ignored or handled by
    other code.

    Args:
        program: The command, for the message.
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
        if _is_importing(frame):
            # An exception that passes through the start of an extension module can abort the process.
            print(message(program), file=sys.stderr, flush=True)
            os._exit(STATUS)
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


def message(program: str) -> str:
    """Return what an interrupted command prints."""
    return f"{program}: interrupted"


def _is_importing(frame: FrameType | None) -> bool:
    """Return whether the frame or one of its callers imports a module."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False
