"""Errors that a user can cause or fix: one message, no traceback."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pydantic import ValidationError

# Letters of a name that suggest the rest of it.
SHORTEST_BEGINNING = 3


class SpecforgeError(Exception):
    """Something failed at run time; ``specforge`` prints the message and exits with status 1.

    Attributes:
        exit_status: Exit status of the process.
        subcommand: Word printed between the command and the message, for a command with subcommands.
    """

    exit_status = 1
    subcommand: str | None = None


class UsageError(SpecforgeError):
    """The command line, the configuration or the input is wrong; exit status 2.

    The message says what is wrong, where (file and line, or configuration key), what is allowed and what to do.
    """

    exit_status = 2


def nearest_name(name: str, allowed: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the closest allowed name in any case, or an empty string if none is close.

    A name that begins with the given one, such as ``temperature`` for ``temp``, is close too.
    """
    closest = _closest(name, allowed)
    return f" Did you mean {closest!r}?" if closest else ""


def nearest_path(path: Path) -> str:
    """Return ``" Did you mean 'x'?"`` for a file or folder beside it with a similar name, or an empty string."""
    try:
        closest = _closest(path.name, (one.name for one in path.parent.iterdir() if one.name != path.name))
    except OSError:
        return ""
    return f" Did you mean {str(path.with_name(closest))!r}?" if closest else ""


def describe_os_error(error: OSError) -> str:
    """Return in one line which file or folder could not be used, and why."""
    reason = error.strerror or str(error)
    return f"{error.filename}: {reason}" if error.filename else reason


def describe_invalid(error: ValidationError) -> str:
    """Describe the faults of a pydantic validation: for each, the key's path, what is allowed and the value."""
    lines = []
    for fault in error.errors():
        key = ".".join(str(part) for part in fault["loc"]) or "(whole)"
        value = "" if fault["type"] == "missing" else f" (got {fault['input']!r:.80})"
        lines.append(f"{key}: {fault['msg'].removeprefix('Value error, ')}{value}")
    return "; ".join(lines)


def _closest(name: str, allowed: Iterable[str]) -> str | None:
    names = {one.lower(): one for one in allowed}
    wanted = name.lower()
    begun = [one for one in names if len(wanted) >= SHORTEST_BEGINNING and one.startswith(wanted)]
    matches = difflib.get_close_matches(wanted, list(names), n=1) or begun
    return names[matches[0]] if matches else None
