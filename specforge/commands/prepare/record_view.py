"""Rows on a terminal, supervised tokens set off, so that a person can check a mask by eye."""

from __future__ import annotations

from collections import Counter
from itertools import groupby
from typing import TYPE_CHECKING

import numpy as np
from rich.console import Console
from rich.text import Text

from specforge.data.rows.maker import RowMaker
from specforge.data.text.bad_rows import BadRow
from specforge.data.text.encoding import TokenRow
from specforge.data.text.records import RawRecord
from specforge.data.text.showing import highlighted, spans

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

END = "■"  # after an end token of the verifier that is supervised


def show_record(record: RawRecord, maker: RowMaker, tokenizer: PreTrainedTokenizerBase, console: Console) -> None:
    """Print the rows of a record as they would be kept.

    Supervised tokens are in color, or between ⟦ and ⟧ where there is none; the verifier's end token has a mark.

    Args:
        record: The raw row.
        maker: Builds the rows.
        tokenizer: Decodes them.
        console: Console to print to.
    """
    try:
        (rows,) = maker.encoder.encode([record.parse()])
    except BadRow as error:
        rows = error
    if isinstance(rows, BadRow):
        console.print(Text(f"{rows.location}: bad: {rows.explanation}\n", style="bold"))
        return
    for number, row in enumerate(rows, start=1):
        location = f"{record.location}, row {number} of {len(rows)}" if len(rows) > 1 else record.location
        _show_row(row, location, maker, tokenizer, console)


def _show_row(
    row: TokenRow, location: str, maker: RowMaker, tokenizer: PreTrainedTokenizerBase, console: Console
) -> None:
    fitted = maker.fit(row)
    kept = row if isinstance(fitted, str) else fitted
    number, supervised = len(kept.input_ids), int(kept.loss_mask.sum())
    fate = f"dropped: {fitted}" if isinstance(fitted, str) else "kept" if fitted is row else "truncated"
    share = f"{supervised:,} supervised ({supervised / max(number, 1):.1%})"
    console.print(Text(f"{location}: {number:,} tokens, {share}, {fate}", style="bold"))
    ends = kept.loss_mask & np.isin(kept.input_ids, maker.encoder.end_ids)
    marks = list(zip(kept.loss_mask.tolist(), ends.tolist(), strict=True))
    parts = spans(kept.input_ids.tolist(), marks, tokenizer)
    for is_supervised, group in groupby(parts, key=lambda part: part[1][0]):
        text = "".join(f"{part}{END}" if is_end else part for part, (_, is_end) in group)
        console.print(highlighted(text, console) if is_supervised else Text(text), end="", soft_wrap=True)
    console.print()
    for rule, count in Counter(kept.rules).items():
        console.print(Text(f"  {count} span{'s' if count > 1 else ''}: {rule}", style="dim"))
    console.print()
