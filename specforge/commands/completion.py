"""``specforge completion``: a script for shell completion of commands, options, their values and files."""

from __future__ import annotations

import argparse

import shtab

from specforge.commands.plain_parser import PlainParser
from specforge.commands.wrapping import HelpFormatter
from specforge.hookspecs import Algorithm, CheckpointFormat, Command, ProposalMethod
from specforge.private.argparse import action_of, actions, subcommands
from specforge.quiet import FLAG
from specforge.registry import Registry, installed

DESCRIPTION = """\
Print a script that completes commands, options and files. It covers the currently installed plugins: print it again
when they change.

  specforge completion bash \\
    > ~/.local/share/bash-completion/completions/specforge
  specforge completion zsh > ~/.zsh/completions/_specforge  # a folder of $fpath"""
# Metavars of files and of folders.
FILES = {"FILE", "SOURCE", "ROWS", "PROMPTS", "CONFIG"}
FOLDERS = {"FOLDER", "MODEL", "DRAFT", "EXPORT"}


def run(arguments: list[str]) -> int:
    """Print the script."""
    found = command_line().parse_args(arguments)
    print(shtab.complete(whole_parser(installed()), found.shell))
    return 0


def command_line() -> argparse.ArgumentParser:
    """Return the parser of the command's arguments."""
    parser = PlainParser(prog="specforge completion", description=DESCRIPTION, formatter_class=HelpFormatter)
    parser.add_argument("shell", choices=shtab.SUPPORTED_SHELLS)
    return parser


def whole_parser(registry: Registry) -> argparse.ArgumentParser:
    """Return one parser with all commands, for completion."""
    whole = argparse.ArgumentParser("specforge")
    whole.add_argument("--version", action="store_true")
    commands = whole.add_subparsers()
    for name, command in sorted(registry.all(Command).items()):
        own = commands.add_parser(name, help=command.summary)
        own.add_argument(FLAG, action="store_true")
        if command.parser is not None:
            add_options(registry.load(command, "parser")(), own)
    return whole


def add_options(parser: argparse.ArgumentParser, target: argparse.ArgumentParser) -> None:
    """Copy the missing options and subcommands of a parser to another, as far as completion needs them.

    Types, defaults and other extensions of argparse are not copied.

    Args:
        parser: The source; not changed.
        target: The parser to extend.
    """
    for action in actions(parser):
        inner = subcommands(action)
        if inner is not None:
            own = target.add_subparsers()
            for name, (one, summary) in inner.items():
                # Subcommands without a summary would count as hidden.
                add_options(one, own.add_parser(name, help=summary or name))
            continue
        words = [word for word in action.option_strings if action_of(target, word) is None]
        if action.help == argparse.SUPPRESS or (action.option_strings and not words):
            continue
        metavar = str(action.metavar or action.dest).rpartition(".")[2]
        if action.nargs == 0:
            target.add_argument(*words, action="store_true")
            continue
        copied = target.add_argument(*words or [action.dest], nargs="*" if action.nargs in ("*", "+") else None)
        if names := registered_names(words):
            copied.choices = names
        elif metavar.startswith("{"):
            copied.choices = metavar.strip("{}").split(",")
        elif action.choices is not None:
            copied.choices = list(action.choices)
        elif metavar in FILES | FOLDERS:
            copied.complete = shtab.FILE if metavar in FILES else shtab.DIRECTORY  # type: ignore[attr-defined]


def registered_names(words: list[str]) -> list[str]:
    """Return the names that plugins register for the values of an option, given its flags; empty for other options."""
    registry = installed()
    if "--algorithm" in words:
        return sorted(registry.all(Algorithm))
    if "--format" in words:
        return sorted({one.name for one in registry.all(CheckpointFormat).values()})
    return sorted(registry.all(ProposalMethod)) if "--proposal" in words else []
