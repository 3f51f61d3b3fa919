"""Verbosity of other libraries: almost silent, unless ``--verbose`` is given."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager

FLAG = "--verbose"
_VARIABLE = "SPECFORGE_VERBOSE"


def configure_verbosity(verbose: bool) -> None:
    """Set the verbosity of this process and its children; call it before importing other libraries.

    Args:
        verbose: Show all messages.
    """
    if verbose:
        os.environ[_VARIABLE] = "1"
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info")
    elif not is_verbose():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_VERBOSITY", "error")  # it reports each retry
        os.environ.setdefault("MC_LOG_LEVEL", "ERROR")  # Mooncake
        # Progress bars of transformers, datasets and the hub would fill a log file.
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def is_verbose() -> bool:
    """Return whether ``--verbose`` was given to this process or its parent."""
    return os.environ.get(_VARIABLE) == "1"


@contextmanager
def native_messages_hidden() -> Iterator[None]:
    """Discard what libraries in other languages write to standard error meanwhile, unless ``--verbose`` was given."""
    if is_verbose():
        yield
        return
    kept, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, 2)
    try:
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)
        os.close(nowhere)
