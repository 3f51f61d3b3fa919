"""The training text of a run: its size, and representative batches."""

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

# Rows of a file up to this size in bytes are built here, within seconds; a run builds them anyway.
SMALL_FILE = 2**24
SAMPLED_BATCHES = 3


@dataclass(frozen=True)
class RunText:
    """The training text of a run.

    Attributes:
        tokens: Number of tokens per epoch.
        supervised_share: Share of supervised tokens.
        packed_rows: Number of packed rows per epoch.
        batches: Batches to run a step on.
        origin: Source of these figures.
    """

    tokens: int
    supervised_share: float
    packed_rows: int
    batches: list[Batch]
    origin: str


def given_text(tokens: int, supervised_share: float, data: Namespace) -> RunText:
    """Build the text described by flags: each row is one full document, supervised at its end.

    Args:
        tokens: Number of tokens per epoch.
        supervised_share: Share of supervised tokens.
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
    """Count the training rows, and take batches from the start, the middle and the end of the packed rows.

    Args:
        data: The data, not yet set up.
        source: Source of the training rows.

    Raises:
        UsageError: They are not prepared, and too many to build here.
    """
    small = Path(source).is_file() and Path(source).stat().st_size <= SMALL_FILE
    if not small and not data.is_built:
        raise UsageError(
            f"data.train: {source} is not counted yet; prepare its rows (specforge prepare rows), or give --tokens and "
            "--supervised_share"
        )
    data.setup()
    items = data.train_dataloader().dataset
    number, size = len(items), data.batch_size  # type: ignore[arg-type]
    starts = torch.linspace(0, max(0, number - size), SAMPLED_BATCHES).long().unique().tolist()
    batches = [collate([items[row] for row in range(start, min(start + size, number))]) for start in starts]
    summary = data.train_rows.summary
    origin = f"counted from the rows of {source}"
    return RunText(summary.tokens, summary.supervised_tokens / summary.tokens, number, batches, origin)
