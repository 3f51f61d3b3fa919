"""The text of a run: how much there is, and batches that stand for all of it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from jsonargparse import Namespace

from specforge.data.loader import Batch
from specforge.data.module import DraftDataModule
from specforge.data.packing import collate
from specforge.errors import UsageError

# Of a file of text up to so many bytes the rows are made at once, in seconds; a run makes them anyway.
SMALL_FILE = 2**24
SAMPLED_BATCHES = 3


@dataclass(frozen=True)
class RunText:
    """What a run is trained on.

    Attributes:
        tokens: Tokens of an epoch.
        supervised_share: Share of them that is supervised.
        packed_rows: Rows of an epoch as they enter batches.
        batches: Batches to run a step on.
        origin: Where all of this is known from.
    """

    tokens: int
    supervised_share: float
    packed_rows: int
    batches: list[Batch]
    origin: str


def given_text(tokens: int, supervised_share: float, data: Namespace) -> RunText:
    """Make the text that flags speak of: each row one document, full, and supervised at its end.

    Args:
        tokens: Tokens of an epoch.
        supervised_share: Share of them that is supervised.
        data: The settings of ``data``.
    """
    length = data.max_length
    shape = (data.batch_size, length)
    positions = torch.arange(length).expand(shape)
    batch = {
        "input_ids": torch.ones(shape, dtype=torch.int64),
        "loss_mask": positions >= round(length * (1 - supervised_share)),
        "document_ids": torch.zeros(shape, dtype=torch.int64),
        "position_ids": positions,
    }
    origin = f"given: full rows of one document, the last {supervised_share:.0%} of each supervised"
    return RunText(tokens, supervised_share, math.ceil(tokens / length), [batch], origin)


def counted_text(data: DraftDataModule, source: str) -> RunText:
    """Count the training rows, and take batches from the beginning, the middle and the end of the packed ones.

    Args:
        data: The data, not yet set up.
        source: Source of the training rows.

    Raises:
        UsageError: They are not prepared, and too many to be made on the way.
    """
    small = Path(source).is_file() and Path(source).stat().st_size <= SMALL_FILE
    if not small and not data.is_built:
        raise UsageError(
            f"data.train: {source} is not counted yet; make its rows once (specforge prepare rows), or give --tokens "
            "and --supervised_share"
        )
    data.setup()
    items = data.train_dataloader().dataset
    number, size = len(items), data.batch_size  # type: ignore[arg-type]
    starts = torch.linspace(0, max(0, number - size), SAMPLED_BATCHES).long().unique().tolist()
    batches = [collate([items[row] for row in range(start, min(start + size, number))]) for start in starts]
    summary = data.train_rows.summary
    origin = f"counted from the rows of {source}"
    return RunText(summary.tokens, summary.supervised_tokens / summary.tokens, number, batches, origin)
