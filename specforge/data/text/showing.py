"""Text with what is supervised set off, on a terminal or in Markdown."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


SET_OFF = "black on bright_green"
Mark = TypeVar("Mark", bound=Hashable)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # in the data; it must not steer the terminal


def set_off(text: str, console: Console) -> Text:
    """Return a text in color, or between ⟦ and ⟧ where there is none: a pipe, or ``NO_COLOR``."""
    has_color = console.color_system is not None and not console.no_color
    return Text(text, style=SET_OFF) if has_color else Text(f"⟦{text}⟧")


def stretches(
    tokens: Sequence[int], marks: Sequence[Mark], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, Mark]]:
    """Yield the texts between changes of the mark, each with its mark; control characters are replaced.

    Args:
        tokens: ids.
        marks: one for each token.
        tokenizer: decodes them.
    """
    shown, end = "", 0
    for mark, group in groupby(marks):
        end += len(list(group))
        # All from the start: what a token adds can depend on those before it.
        text = str(tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False))
        if end < len(tokens):
            text = text.rstrip("�")  # a character whose other tokens follow, and which is shown with them
        if text[len(shown) :]:
            yield _CONTROL.sub("�", text[len(shown) :]), mark
        shown = text
