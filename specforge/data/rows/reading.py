"""Reading token rows through a memory map."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.compute as pc
import torch
from torch import Tensor

from specforge.data.rows.stored import ROWS_FILE, StoredRows, to_numpy
from specforge.data.rows.summary import RowsSummary
from specforge.errors import SpecforgeError


class TokenRows:
    """Tokenised rows, read from disk on demand.

    Args:
        stored: Columns ``input_ids`` (lists of int32), ``loss_mask`` (lists of bool) and ``chat`` (int64).
        summary: Summary of the source.
        vocabulary_size: Vocabulary size V of the verifier.
        chosen: Indices of the rows to use; None for all.
        with_prompts: Whether all tokens but the first of each row are supervised, whatever is stored.
    """

    def __init__(
        self,
        stored: StoredRows,
        summary: RowsSummary,
        vocabulary_size: int,
        chosen: npt.NDArray[np.int64] | None = None,
        with_prompts: bool = False,
    ) -> None:
        self.summary = summary
        self.vocabulary_size = vocabulary_size
        self._stored = stored
        self._chosen = chosen
        self._with_prompts = with_prompts

    def __len__(self) -> int:
        return len(self._stored if self._chosen is None else self._chosen)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return ``input_ids`` int64 [T] and ``loss_mask`` bool [T] of one row."""
        return self.join([index])[0]

    def join(self, indices: list[int]) -> tuple[dict[str, Tensor], Tensor]:
        """Read and concatenate some rows.

        Returns:
            ``input_ids`` int64 [T] and ``loss_mask`` bool [T] of all of them, and the length of each row, int64 [rows].

        Raises:
            SpecforgeError: The rows are damaged.
        """
        chosen = np.asarray(indices, dtype=np.int64)
        rows = self._masked(self._stored.take(chosen if self._chosen is None else self._chosen[chosen]))
        ids, mask = rows["input_ids"].combine_chunks(), rows["loss_mask"].combine_chunks()
        joined = {
            "input_ids": torch.from_numpy(to_numpy(ids.flatten()).astype(np.int64)),
            "loss_mask": torch.from_numpy(to_numpy(mask.flatten())),
        }
        return joined, torch.from_numpy(to_numpy(ids.value_lengths()).astype(np.int64))

    @cached_property
    def lengths(self) -> npt.NDArray[np.int64]:
        """Number of tokens of each row, int64 [rows]."""
        return self._stored.lengths if self._chosen is None else self._stored.lengths[self._chosen]

    @cached_property
    def chats(self) -> npt.NDArray[np.int64]:
        """Chat id of each row, int64 [rows]; equal for rows of the same chat."""
        return np.concatenate([to_numpy(batch["chat"]) for batch in self._batches()])

    @cached_property
    def supervised_counts(self) -> Tensor:
        """How often each id is supervised, int64 [V]."""
        return _count_supervised(self._batches(), self.vocabulary_size)

    @cached_property
    def token_counts(self) -> Tensor:
        """How often each id occurs, supervised or not, int64 [V]."""
        counts = np.zeros(self.vocabulary_size, dtype=np.int64)
        for batch in self._batches():
            counts += np.bincount(to_numpy(pc.list_flatten(batch["input_ids"])), minlength=self.vocabulary_size)
        return torch.from_numpy(counts)

    @cached_property
    def longest_response(self) -> int:
        """Most supervised tokens that follow each other in a row."""
        longest = 0
        for batch in self._batches():
            mask = to_numpy(pc.list_flatten(batch["loss_mask"]))
            ends = np.cumsum(to_numpy(pc.list_value_length(batch["loss_mask"])))
            # An unsupervised token after each row, so that no span crosses from one to the next.
            gaps = np.flatnonzero(~np.insert(mask, ends, False))
            longest = max(longest, int(np.diff(gaps, prepend=-1).max()) - 1)
        return longest

    @cached_property
    def digests(self) -> npt.NDArray[np.uint64]:
        """Digest of the tokens of each row, uint64 [rows, 2]."""
        digests = []
        for batch in self._batches():
            ids = to_numpy(pc.list_flatten(batch["input_ids"]))
            ends = np.cumsum(to_numpy(pc.list_value_length(batch["input_ids"])))
            digests += [row_digest(one) for one in np.split(ids, ends[:-1])]
        return np.frombuffer(b"".join(digests), dtype=np.uint64).reshape(-1, 2)

    @cached_property
    def last_supervised(self) -> npt.NDArray[np.int64]:
        """Index of the last supervised token of each row, int64 [rows]; -1 if none is supervised."""
        indices = []
        for batch in self._batches():
            lengths = to_numpy(pc.list_value_length(batch["loss_mask"]))
            starts = np.cumsum(lengths) - lengths
            mask = to_numpy(pc.list_flatten(batch["loss_mask"]))
            within = np.arange(len(mask)) - np.repeat(starts, lengths)
            indices.append(np.maximum.reduceat(np.where(mask, within, -1), starts))
        return np.concatenate(indices).astype(np.int64)

    def select(self, indices: npt.NDArray[np.int64]) -> TokenRows:
        """Return some of the rows; the summary's ``truncated`` and ``dropped`` still cover the whole source."""
        rows = indices if self._chosen is None else self._chosen[indices]
        return TokenRows(self._stored, self.summary, self.vocabulary_size, rows, self._with_prompts)._counted()

    def supervising_prompts(self) -> TokenRows:
        """Return the same rows with all tokens supervised but the first of each, which nothing precedes."""
        return TokenRows(self._stored, self.summary, self.vocabulary_size, self._chosen, with_prompts=True)._counted()

    def _counted(self) -> TokenRows:
        """Adapt the summary's counts to the rows and tokens that are used."""
        tokens, supervised_tokens = int(self.lengths.sum()), int(self.supervised_counts.sum())
        self.summary = replace(self.summary, rows=len(self), tokens=tokens, supervised_tokens=supervised_tokens)
        return self

    def _batches(self) -> Iterator[pa.Table]:
        if self._chosen is None:
            return map(self._masked, self._stored.tables())
        chunks = np.split(self._chosen, range(1024, len(self), 1024))
        return (self._masked(self._stored.take(chunk)) for chunk in chunks)

    def _masked(self, rows: pa.Table) -> pa.Table:
        if not self._with_prompts:
            return rows
        lengths = to_numpy(pc.list_value_length(rows["input_ids"]))
        offsets = np.concatenate([[0], np.cumsum(lengths)])
        mask = np.ones(offsets[-1], dtype=np.bool_)
        mask[offsets[:-1]] = False
        masks = pa.ListArray.from_arrays(offsets.astype(np.int32), pa.array(mask))
        return rows.set_column(rows.schema.get_field_index("loss_mask"), "loss_mask", masks)


def row_digest(input_ids: npt.NDArray[Any]) -> bytes:
    """Return a 16-byte digest of a row's tokens."""
    return hashlib.blake2b(input_ids.astype("<i4", copy=False).tobytes(), digest_size=16).digest()


def open_rows(folder: Path, vocabulary_size: int) -> TokenRows:
    """Open a folder of rows.

    Raises:
        UsageError: The rows are damaged.
    """
    return token_rows(StoredRows(folder), vocabulary_size)


def token_rows(stored: StoredRows, vocabulary_size: int) -> TokenRows:
    """Wrap stored rows as ``TokenRows``."""
    return TokenRows(stored, RowsSummary.from_json(stored.description["summary"]), vocabulary_size)


def count_stored(folder: Path, vocabulary_size: int) -> Tensor:
    """Return how often each id is supervised in a folder of rows, int64 [V].

    The rows are read batch by batch, not through a memory map, which would keep all of them resident.
    """
    with pa.OSFile(str(folder / ROWS_FILE)) as file, pa.ipc.open_stream(file) as batches:
        return _count_supervised(batches, vocabulary_size)


def is_whole(folder: Path) -> bool:
    """Return whether a folder holds all rows of its summary, undamaged."""
    try:
        StoredRows(folder).check()
    except SpecforgeError:
        return False
    return True


def _count_supervised(batches: Iterable[pa.Table | pa.RecordBatch], vocabulary_size: int) -> Tensor:
    counts = np.zeros(vocabulary_size, dtype=np.int64)
    for batch in batches:
        supervised = pc.list_flatten(batch["input_ids"]).filter(pc.list_flatten(batch["loss_mask"]))
        counts += np.bincount(to_numpy(supervised), minlength=vocabulary_size)
    return torch.from_numpy(counts)
