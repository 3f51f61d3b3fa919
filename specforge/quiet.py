"""How much other libraries say of themselves: next to nothing, unless ``--verbose`` asks for all of it."""

from __future__ import annotations

import os
import sys

FLAG = "--verbose"
_VARIABLE = "SPECFORGE_VERBOSE"


def begin(verbose: bool) -> None:
    """Settle it for this process and for those that it starts, before anything heavy is imported.

    Args:
        verbose: Let them say all that they have to say.
    """
    if verbose:
        os.environ[_VARIABLE] = "1"
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "info")
    elif not is_verbose():
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        # Bars of transformers, datasets and the hub would fill a log file.
        if not sys.stderr.isatty():
            os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
            os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")


def is_verbose() -> bool:
    """Tell whether ``--verbose`` was given to this process or to the one that started it."""
    return os.environ.get(_VARIABLE) == "1"
