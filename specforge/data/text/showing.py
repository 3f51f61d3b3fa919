"""Display of text with supervised spans highlighted, on a terminal or in Markdown."""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

from rich.console import Console
from rich.text import Text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


HIGHLIGHT = "black on bright_green"
Mark = TypeVar("Mark", bound=Hashable)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # control characters in the data must not reach the terminal


def highlighted(text: str, console: Console) -> Text:
    """Return a highlighted text: in color, or between ⟦ and ⟧ if the console has none (a pipe, ``NO_COLOR``)."""
    has_color = console.color_system is not None and not console.no_color
    return Text(text, style=HIGHLIGHT) if has_color else Text(f"⟦{text}⟧")


def spans(
    tokens: Sequence[int], marks: Sequence[Mark], tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[str, Mark]]:
    """Yield the text and mark of each run of tokens with equal marks; control characters are replaced.

    Args:
        tokens: Token ids.
        marks: One mark per token.
        tokenizer: Decodes the tokens.
    """
    shown, end = "", 0
    for mark, group in groupby(marks):
        end += len(list(group))
        # Decoded from the start: the text of a token can depend on the tokens before it.
        text = str(tokenizer.decode(tokens[:end], clean_up_tokenization_spaces=False))
        if end < len(tokens):
            text = text.rstrip("�")  # an incomplete character is shown with its remaining tokens
        if text[len(shown) :]:
            yield _CONTROL.sub("�", text[len(shown) :]), mark
        shown = text
