"""``specforge prepare``: preparation of training data, with one subcommand for each step."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module

from specforge.commands.wrapping import wrap_hanging
from specforge.errors import SpecforgeError, UsageError, nearest_name

_SUBCOMMANDS = {
    "responses": "let the verifier answer prompts again, in this process or through a serving engine",
    "check": "check whether responses are the verifier's own",
    "rows": "tokenise conversations, mask unsupervised tokens, split and count",
    "features": "store the verifier's states over token rows, so that training does not run the verifier",
}


def run(arguments: list[str]) -> int:
    """Run one subcommand.

    Raises:
        UsageError: There is no such subcommand.
    """
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help"):
        print(_help())
        return 0
    if name not in _SUBCOMMANDS:
        known = ", ".join(_SUBCOMMANDS)
        raise UsageError(f"unknown subcommand {name!r}; known: {known}.{nearest_name(name, _SUBCOMMANDS)}")
    subcommand: Callable[[list[str]], int] = import_module(f"{__name__}.{name}").run
    try:
        return subcommand(arguments[1:])
    except SpecforgeError as error:
        error.subcommand = name
        raise


def command_line() -> argparse.ArgumentParser:
    """Return a parser with the parsers of all subcommands."""
    parser = argparse.ArgumentParser(prog="specforge prepare")
    subcommands = parser.add_subparsers()
    for name, summary in _SUBCOMMANDS.items():
        own = import_module(f"{__name__}.{name}").command_line()
        subcommands.add_parser(name, help=summary, add_help=False)
        subcommands.choices[name] = own
    return parser


def _help() -> str:
    lines = [wrap_hanging(f"  {name:<10} ", summary) for name, summary in _SUBCOMMANDS.items()]
    return "\n".join(
        [
            "usage: specforge prepare SUBCOMMAND [options]",
            "",
            "Prepare the data that a draft is trained on.",
            "",
            "subcommands:",
            *lines,
            "",
            "All options of one: specforge prepare SUBCOMMAND --help",
        ]
    )
