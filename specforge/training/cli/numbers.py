"""Whole numbers in exponent notation, such as ``1e9``, on the command line."""

from __future__ import annotations

import re
from argparse import ArgumentParser

from specforge.private.argparse import action_of, type_of

EXPONENT = re.compile(r"[-+]?\d+(\.\d+)?[eE]\+?\d{1,2}")


def whole_numbers(parser: ArgumentParser, arguments: list[str]) -> list[str]:
    """Return the words of a command line with whole numbers such as ``1e3`` written out, unless they are texts.

    Args:
        parser: The parser, which has the types of the keys.
        arguments: The words of the command line.
    """
    words: list[str] = []
    flag = ""
    for word in arguments:
        if word.startswith("--"):
            flag, equals, value = word.partition("=")
            words.append(f"{flag}={_written_out(parser, flag, value)}" if equals else word)
        else:
            words.append(_written_out(parser, flag, word))
    return words


def _written_out(parser: ArgumentParser, flag: str, value: str) -> str:
    action = action_of(parser, flag)
    is_text = action is None or type_of(action) in (str, str | None)
    if is_text or not EXPONENT.fullmatch(value) or not float(value).is_integer():
        return value
    return str(int(float(value)))
