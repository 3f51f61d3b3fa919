"""Classes that a setting names by their path, ``package.module.Class``, as on Lightning's command line."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from pkgutil import resolve_name
from typing import Any, TypeVar

from specforge.errors import UsageError

Base = TypeVar("Base")


def class_at(path: str, base: type[Base], own: Sequence[str]) -> type[Base]:
    """Import a class.

    Args:
        path: Its path.
        base: The required base class.
        own: Names that are allowed instead of a path, for error messages.

    Raises:
        ValueError: There is no such class.
    """
    try:
        found = resolve_name(path) if "." in path else None
    except Exception as error:  # a package may fail in any way while it is imported
        raise ValueError(f"it cannot be imported: {error}") from None
    if not (inspect.isclass(found) and issubclass(found, base)):
        known = ", ".join(own)
        raise ValueError(f"give {known}, or the path of a subclass of {base.__module__}.{base.__name__}")
    return found


def check_arguments(path: str, found: type, arguments: Mapping[str, Any]) -> None:
    """Refuse arguments that a class does not accept, and missing required ones.

    Args:
        path: Path of the class.
        found: The class; its first argument is passed separately.
        arguments: The arguments by name.

    Raises:
        ValueError: Names the fault and the arguments of the class.
    """
    try:
        inspect.signature(found).bind(None, **arguments)
    except TypeError as error:
        names = [*inspect.signature(found).parameters][1:]
        raise ValueError(f"{path}: {error}; its arguments are {', '.join(names)}") from None


def takes(found: type, name: str) -> bool:
    """Return whether a class accepts an argument of that name."""
    return name in inspect.signature(found).parameters


def build(key: str, found: Callable[..., Base], first: Any, arguments: Mapping[str, Any]) -> Base:
    """Create an object of a class.

    Args:
        key: The setting's key, for error messages.
        found: The class.
        first: Its first argument.
        arguments: The others, by name.

    Raises:
        UsageError: The class refuses them.
    """
    try:
        return found(first, **arguments)
    except (TypeError, ValueError) as error:
        raise UsageError(f"{key}.options: {error}") from None
