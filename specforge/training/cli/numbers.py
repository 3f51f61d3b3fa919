"""Whole numbers in exponent notation, such as ``1e9``, in files and on the command line."""

from __future__ import annotations

import functools
import re
from argparse import ArgumentParser
from typing import Any

import yaml
from jsonargparse import get_loader, set_loader

from specforge.private.argparse import action_of, type_of

EXPONENT = re.compile(r"[-+]?\d+(\.\d+)?[eE]\+?\d{1,2}")


@functools.cache
def accept_in_files() -> None:
    """Let all parsers read whole numbers of files, such as ``1e3``, as integers."""
    load = get_loader("yaml")

    def load_written_out(text: str) -> Any:
        return load(_with_integers(text))

    set_loader("yaml", load_written_out, exceptions=(yaml.YAMLError,))


def _with_integers(text: str) -> str:
    for token in reversed(list(yaml.scan(text))):
        if isinstance(token, yaml.ScalarToken) and token.plain and _is_whole(token.value):
            start, end = token.start_mark.index, token.end_mark.index
            text = text[:start] + _written_out(token.value) + text[end:]
    return text


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
            words.append(f"{flag}={_of_flag(parser, flag, value)}" if equals else word)
        else:
            words.append(_of_flag(parser, flag, word))
    return words


def _of_flag(parser: ArgumentParser, flag: str, value: str) -> str:
    action = action_of(parser, flag)
    is_text = action is None or type_of(action) in (str, str | None)
    return value if is_text or not _is_whole(value) else _written_out(value)


def _is_whole(word: str) -> bool:
    return EXPONENT.fullmatch(word) is not None and float(word).is_integer()


def _written_out(word: str) -> str:
    return str(int(float(word)))
