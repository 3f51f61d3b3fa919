"""Verbosity of other libraries: almost silent, unless ``--verbose`` is given."""

from __future__ import annotations

import os
import sys

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
        # Progress bars of transformers, datasets and the hub would fill a log file.
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def is_verbose() -> bool:
    """Return whether ``--verbose`` was given to this process or its parent."""
    return os.environ.get(_VARIABLE) == "1"
