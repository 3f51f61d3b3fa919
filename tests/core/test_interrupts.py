"""Ctrl-C ends a command as an interrupt, even if a library turns it into another error."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator

import pytest

from specforge import interrupts

PLUGIN = """
from specforge.hookspecs import Command, hookimpl

@hookimpl
def specforge_commands():
    return [Command("toy", "play", "late:run")]
"""
MANGLED = """
import signal

def swallow():
    try:
        signal.raise_signal(signal.SIGINT)
    except KeyboardInterrupt:
        raise {error} from None
"""
NATIVE = """
import os, signal

try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    os.abort()
"""
# Tests that run in the background of a script inherit an ignored Ctrl-C.
START = """
import signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)
from specforge.__main__ import main
sys.exit(main(["toy"]))
"""
ERRORS = ("ImportError('no module of that name')", "ValueError('too many values to unpack')")


@pytest.fixture(autouse=True)
def _usual_handler() -> Iterator[None]:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("error", ERRORS)
@pytest.mark.parametrize("where", ["swallow()\ndef run(words): ...", "def run(words): swallow()"])
def test_an_error_that_a_library_raises_instead(toys, error, where):
    toys.install("toy-plugin", PLUGIN)
    toys.write("late.py", MANGLED.format(error=error) + where)
    done = toys.python("-c", START)
    assert (done.returncode, done.stderr) == (130, "specforge toy: interrupted\n")


@pytest.mark.parametrize("import_time", ["import native", "def run(words): import native"])
def test_a_library_that_aborts_while_it_is_imported(toys, import_time):
    """As an extension module does whose start an exception passes through."""
    toys.install("toy-plugin", PLUGIN)
    toys.write("native.py", NATIVE)
    toys.write("late.py", import_time)
    done = toys.python("-c", START)
    assert (done.returncode, done.stderr) == (130, "specforge toy: interrupted\n")


def test_other_errors_are_unchanged():
    with pytest.raises(ValueError, match="own"), interrupts.raising_keyboard_interrupt("specforge toy"):
        raise ValueError("own")


def test_the_default_handler_is_restored():
    with pytest.raises(KeyboardInterrupt), interrupts.raising_keyboard_interrupt("specforge toy"):
        signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


def test_a_custom_handler_is_kept():
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with interrupts.raising_keyboard_interrupt("specforge toy"):
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN


def test_other_threads_run_without_a_handler():
    ran = []

    def work() -> None:
        with interrupts.raising_keyboard_interrupt("specforge toy"):
            ran.append(True)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert ran
