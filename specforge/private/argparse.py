"""Private names of argparse and, built on it, jsonargparse."""

from __future__ import annotations

from argparse import Action, ArgumentParser, _SubParsersAction
from typing import Any


def actions(parser: ArgumentParser) -> list[Action]:
    """Return all arguments of a parser."""
    return parser._actions


def action_of(parser: ArgumentParser, flag: str) -> Action | None:
    """Return the argument that a flag is of; None if the parser has no such flag."""
    return parser._option_string_actions.get(flag)


def subcommands(action: Action) -> dict[str, tuple[ArgumentParser, str | None]] | None:
    """Return parser and summary of each subcommand; None for an argument of another kind."""
    if not isinstance(action, _SubParsersAction):
        return None
    summaries = {one.dest: one.help for one in action._choices_actions}
    return {name: (parser, summaries.get(name)) for name, parser in action.choices.items()}


def type_of(action: Action) -> Any:
    """Return the type hint of an argument of jsonargparse; None if it has none."""
    return getattr(action, "_typehint", None)


def restriction_of(hint: Any) -> tuple[type, str] | None:
    """Return number type and bounds, such as ``v>=1 and v<=100``, of a restricted number type; None for other types."""
    expression = getattr(hint, "_expression", None)
    return None if expression is None else (hint._type, expression)
