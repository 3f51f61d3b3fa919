"""Text for a person's terminal, as wide as that is: 80 columns where nobody says."""

from __future__ import annotations

import argparse
import shutil
import textwrap


def reflowed(text: str) -> str:
    """Wrap paragraphs; lines that are set in, examples mostly, stay as they are."""
    paragraphs = (_filled(one) for one in text.split("\n\n"))
    return "\n\n".join(paragraphs)


def hanging(head: str, text: str, label: str = "") -> str:
    """Wrap a text behind a head, further lines below where the first one begins.

    Args:
        head: Beginning of the first line.
        text: Words.
        label: What somebody else will write before the head.
    """
    wrapped = textwrap.fill(
        text,
        columns(),
        initial_indent=label + head,
        subsequent_indent=" " * len(label + head),
        break_on_hyphens=False,
        break_long_words=False,
    )
    return wrapped.removeprefix(label)


def columns() -> int:
    """Return the width of the terminal, or what ``COLUMNS`` says."""
    return shutil.get_terminal_size().columns


def _filled(paragraph: str) -> str:
    if any(line.startswith(" ") for line in paragraph.splitlines()):
        return paragraph
    return textwrap.fill(paragraph, columns(), break_on_hyphens=False, break_long_words=False)


class HelpFormatter(argparse.HelpFormatter):
    """Help that wraps descriptions by paragraph, and says the default of everything that has one."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return reflowed(text)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # Not by equality: a default of 0 is said.
        nothing = any(action.default is one for one in (None, False, argparse.SUPPRESS)) or action.default == []
        if action.help is None or nothing or action.required or "default" in action.help:
            return action.help
        shown = " ".join(action.default) if isinstance(action.default, list) else str(action.default)
        return f"{action.help.rstrip('.')} (default: {shown.replace('%', '%%')})."
