"""Rows on a terminal, supervised tokens set off, so that a person can check a mask by eye."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Hashable, Iterator, Sequence
from itertools import groupby
from typing import TYPE_CHECKING, TypeVar

import numpy as np
from rich.console import Console
from rich.text import Text

from specforge.data.bad_rows import BadRow
from specforge.data.encoding import TokenRow
from specforge.data.recipe import Recipe
from specforge.data.sources import RawRecord

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SET_OFF = "black on bright_green"
END = "■"  # after an end token of the verifier that is supervised
Mark = TypeVar("Mark", bound=Hashable)
_CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]")  # in the data; it must not steer the terminal


def show_record(record: RawRecord, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Print the rows of a record as they would be kept.

    Supervised tokens are in color, or between ⟦ and ⟧ where there is none; the verifier's end token has a mark.

    Args:
        record: the raw row.
        recipe: makes rows of it.
        tokenizer: decodes them.
        console: where to.
    """
    try:
        (rows,) = recipe.encoder.encode([record.parse()])
    except BadRow as error:
        rows = error
    if isinstance(rows, BadRow):
        console.print(Text(f"{rows.location}: bad: {rows.explanation}\n", style="bold"))
        return
    for number, row in enumerate(rows, start=1):
        location = f"{record.location}, row {number} of {len(rows)}" if len(rows) > 1 else record.location
        _show_row(row, location, recipe, tokenizer, console)


def _show_row(
    row: TokenRow, location: str, recipe: Recipe, tokenizer: PreTrainedTokenizerBase, console: Console
) -> None:
    fitted = recipe.fit(row)
    kept = row if isinstance(fitted, str) else fitted
    number, supervised = len(kept.input_ids), int(kept.loss_mask.sum())
    fate = f"dropped: {fitted}" if isinstance(fitted, str) else "kept" if fitted is row else "truncated"
    share = f"{supervised:,} supervised ({supervised / max(number, 1):.1%})"
    console.print(Text(f"{location}: {number:,} tokens, {share}, {fate}", style="bold"))
    ends = kept.loss_mask & np.isin(kept.input_ids, recipe.encoder.end_ids)
    marks = list(zip(kept.loss_mask.tolist(), ends.tolist(), strict=True))
    parts = stretches(kept.input_ids.tolist(), marks, tokenizer)
    for is_supervised, group in groupby(parts, key=lambda part: part[1][0]):
        text = "".join(f"{part}{END}" if is_end else part for part, (_, is_end) in group)
        console.print(set_off(text, console) if is_supervised else Text(text), end="", soft_wrap=True)
    console.print()
    for rule, count in Counter(kept.rules).items():
        console.print(Text(f"  {count} span{'s' if count > 1 else ''}: {rule}", style="dim"))
    console.print()


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
