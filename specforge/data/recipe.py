"""From raw rows to batches on their way to disk: parsed, tokenised, split, cut. Worker processes do this part."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import pyarrow as pa

from specforge.data.encoding import RowEncoder, TokenRow
from specforge.data.sources import RawRecord
from specforge.data.summary import RowSettings, RowsSummary

FORMAT = 2  # raised when the same source would give other rows, so that old caches are left alone
SCHEMA = pa.schema([("input_ids", pa.list_(pa.int32())), ("loss_mask", pa.list_(pa.bool_()))])
TRAIN, VALIDATION = "train", "validation"


@dataclass(frozen=True)
class Batch:
    """The rows that a chunk of raw rows adds to a split.

    Attributes:
        message: an Arrow record batch as it stands in a stream.
        summary: what became of the chunk's rows of this split.
    """

    message: bytes
    summary: RowsSummary


@dataclass(frozen=True)
class Recipe:
    """How rows are made; equal recipes make equal rows of equal sources.

    Attributes:
        encoder: tokenises.
        settings: what is done with long rows.
        validation_share: share of the rows that goes to the validation split, from 0 to below 1.
        seed: chooses which.
    """

    encoder: RowEncoder
    settings: RowSettings
    validation_share: float = 0.0
    seed: int = 0

    @property
    def identity(self) -> str:
        """All that the rows depend on besides the sources."""
        split = [self.validation_share, self.seed] if self.validation_share else None
        return json.dumps([FORMAT, asdict(self.settings), split, self.encoder.identity])

    @property
    def splits(self) -> tuple[str, ...]:
        """Names of the splits."""
        return (TRAIN, VALIDATION) if self.validation_share else (TRAIN,)

    def split_of(self, row: TokenRow) -> str:
        """Return the split of a row.

        It depends on the row's tokens and the seed alone: equal rows never stand on both sides, and a row stays where
        it is when others come and go.
        """
        digest = hashlib.blake2b(f"{self.seed} ".encode() + row.input_ids.tobytes(), digest_size=8).digest()
        return VALIDATION if int.from_bytes(digest) < self.validation_share * 2**64 else TRAIN

    def fit(self, row: TokenRow) -> TokenRow | str:
        """Return the row as it is kept, or the reason why it is not."""
        limit = self.settings.max_length
        if not row.loss_mask.any():
            return "no supervised token"
        if len(row.input_ids) <= limit:
            return row
        if self.settings.long_rows == "drop":
            return "longer than max_length"
        if not row.loss_mask[:limit].any():
            return "no supervised token within max_length"
        return replace(row, input_ids=row.input_ids[:limit], loss_mask=row.loss_mask[:limit])

    def make(self, chunk: Sequence[RawRecord]) -> dict[str, Batch]:
        """Return what a chunk of raw rows adds to each split.

        Raises:
            UsageError: a row is refused; the message names its location.
        """
        rows = self.encoder.encode([record.parse() for record in chunk])
        by_split: dict[str, list[TokenRow]] = {split: [] for split in self.splits}
        for row in rows:
            by_split[self.split_of(row)].append(row)
        return {split: self._batch(chosen) for split, chosen in by_split.items()}

    def _batch(self, rows: list[TokenRow]) -> Batch:
        summary = RowsSummary()
        kept = []
        for row in rows:
            fitted = self.fit(row)
            if isinstance(fitted, str):
                summary.dropped[fitted] = summary.dropped.get(fitted, 0) + 1
                continue
            kept.append(fitted)
            summary.truncated += fitted is not row
        summary.rows = len(kept)
        summary.tokens = sum(len(row.input_ids) for row in kept)
        summary.supervised_tokens = sum(int(row.loss_mask.sum()) for row in kept)
        summary.origins = list(dict.fromkeys(row.origin for row in kept))
        return Batch(_record_batch(kept).serialize().to_pybytes(), summary)


def _record_batch(rows: list[TokenRow]) -> pa.RecordBatch:
    offsets = np.cumsum([0, *(len(row.input_ids) for row in rows)], dtype=np.int32)
    ids = np.concatenate([np.empty(0, np.int32), *(row.input_ids for row in rows)])
    mask = np.concatenate([np.empty(0, np.bool_), *(row.loss_mask for row in rows)])
    columns = [pa.ListArray.from_arrays(offsets, pa.array(values)) for values in (ids, mask)]
    return pa.record_batch(columns, schema=SCHEMA)
