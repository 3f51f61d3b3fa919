"""Text wrapped to the width of the terminal, by default 80 columns."""

from __future__ import annotations

import argparse
import shutil
import textwrap


def wrap_paragraphs(text: str) -> str:
    """Wrap paragraphs; those with indented lines, mostly examples, are kept."""
    paragraphs = (_filled(one) for one in text.split("\n\n"))
    return "\n\n".join(paragraphs)


def wrap_hanging(head: str, text: str, label: str = "") -> str:
    """Wrap a text with a hanging indent after its head.

    Args:
        head: Start of the first line.
        text: Text to wrap.
        label: Text that the caller will print before the head.
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
    """Return the width of the terminal, or the value of ``COLUMNS``."""
    return shutil.get_terminal_size().columns


def _filled(paragraph: str) -> str:
    if any(line.startswith(" ") for line in paragraph.splitlines()):
        return paragraph
    return textwrap.fill(paragraph, columns(), break_on_hyphens=False, break_long_words=False)


class HelpFormatter(argparse.HelpFormatter):
    """Help that wraps descriptions by paragraph, and adds default values."""

    def _fill_text(self, text: str, width: int, indent: str) -> str:
        return wrap_paragraphs(text)

    def _get_help_string(self, action: argparse.Action) -> str | None:
        # By identity, since a default of 0 is shown.
        nothing = any(action.default is one for one in (None, False, argparse.SUPPRESS)) or action.default == []
        if action.help is None or nothing or action.required or "default" in action.help:
            return action.help
        shown = " ".join(map(str, action.default)) if isinstance(action.default, list) else str(action.default)
        return f"{action.help.rstrip('.')} (default: {shown.replace('%', '%%')})."
