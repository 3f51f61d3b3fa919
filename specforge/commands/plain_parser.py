"""The parser of commands without settings: argparse, with one message for wrong usage like all other commands."""

from __future__ import annotations

import argparse
from typing import NoReturn

from specforge.errors import UsageError


class PlainParser(argparse.ArgumentParser):
    """Raises ``UsageError`` where argparse prints its usage and exits."""

    def error(self, message: str) -> NoReturn:
        """Report wrong usage.

        Raises:
            UsageError: Always.
        """
        # Its parser takes longer to import than these commands to answer.
        from specforge.training.cli.config_errors import explain

        words = message.removeprefix("unrecognized arguments: ")
        if words != message:
            raise UsageError(f"unexpected argument {words!r}; see: {self.prog} --help")
        raise UsageError(explain(message, self, []))
