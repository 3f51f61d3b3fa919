"""Rows with a response long enough to train the last head."""

from __future__ import annotations

from dataclasses import replace
from itertools import groupby
from typing import Any

import numpy as np
from jsonargparse.typing import PositiveInt
from tqdm import tqdm

from specforge.data.module import DraftDataModule
from specforge.data.rows.reading import TokenRows

TOO_SHORT = "response too short for the heads"


class MedusaDataModule(DraftDataModule):
    """Rows of text for training Medusa heads.

    Args:
        train: Source of the training rows.
        shortest_response: Training rows without a response of this length are omitted and counted. K heads learn from
            K + 1 tokens; with fewer, the verifier runs over a row for only some of the heads.
    """

    def __init__(self, train: str, shortest_response: PositiveInt = 4, **kwargs: Any) -> None:
        super().__init__(train=train, **kwargs)
        self.train_source = train
        self.shortest_response = shortest_response

    def rows_of(self, source: str) -> TokenRows:
        """Return the rows of a source; of the training source, only those that are long enough."""
        rows = super().rows_of(source)
        if source != self.train_source:
            return rows
        # disable=None shows the bar on a terminal only; delay hides it for short sources.
        numbers = tqdm(range(len(rows)), desc="measuring responses", unit=" rows", disable=None, delay=2)
        lengths = np.array([longest_response(rows[number]["loss_mask"].tolist()) for number in numbers])
        kept = rows.select(np.flatnonzero(lengths >= self.shortest_response))
        if left_out := len(rows) - len(kept):
            kept.summary = replace(kept.summary, dropped=kept.summary.dropped | {TOO_SHORT: left_out})
        return kept


def longest_response(loss_mask: list[bool]) -> int:
    """Return the largest number of consecutive response tokens."""
    return max((len(list(run)) for is_response, run in groupby(loss_mask) if is_response), default=0)
