"""Packing several documents into a row: the assignment and the resulting tensors."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Collection, Mapping, Sequence

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from specforge.data.features.reading import RowFeatures, stack_features
from specforge.data.rows.reading import TokenRows

_PADDING = {"input_ids": 0, "loss_mask": False, "document_ids": -1, "position_ids": 0}
# Prefix of the masks of a whole optimizer step.
_WINDOW = "window_"


def pack(lengths: npt.NDArray[np.int64], capacity: int) -> list[list[int]]:
    """Pack documents into rows, longest first, each into the fullest row that still has room for it.

    Args:
        lengths: Number of tokens of each document.
        capacity: Number of tokens per row.

    Returns:
        The documents of each row. Each document is in exactly one row; the result is deterministic.

    Raises:
        ValueError: A document is longer than a row.
    """
    if len(lengths) and lengths.max() > capacity:
        raise ValueError(f"a document of {lengths.max()} tokens does not fit into a row of {capacity}")
    bins: list[list[int]] = []
    bins_with: dict[int, list[int]] = {}  # free tokens -> bins with exactly that many
    free_sizes: list[int] = []  # its keys, ascending: at most `capacity`, however many bins there are
    for document in np.argsort(-lengths, kind="stable").tolist():
        length = int(lengths[document])
        index = bisect_left(free_sizes, length)
        if index == len(free_sizes):
            chosen, free = len(bins), capacity
            bins.append([])
        else:
            free = free_sizes[index]
            chosen = bins_with[free].pop()
            if not bins_with[free]:
                del bins_with[free], free_sizes[index]
        bins[chosen].append(document)
        free -= length
        if free and free not in bins_with:
            bins_with[free] = []
            insort(free_sizes, free)
        if free:
            bins_with[free].append(chosen)
    return bins


class PackedRows(Dataset[dict[str, Tensor]]):
    """Data set of packed rows: each item joins the documents of one bin.

    Args:
        rows: The documents.
        bins: Documents of each item.
    """

    def __init__(self, rows: TokenRows, bins: list[list[int]]) -> None:
        self.rows = rows
        self.bins = bins
        self.features: RowFeatures | None = None
        """Where states of the documents come from; None if the verifier computes them."""

    def __len__(self) -> int:
        return len(self.bins)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Join the documents of a bin.

        Args:
            index: Index of the bin. A negative index ``-1 - i`` is bin ``i`` without supervision: evaluation pads with
                such items so that every rank has the same number of batches and every document counts once.

        Returns:
            ``input_ids`` int64 [T], ``loss_mask`` bool [T], ``document_ids`` int64 [T] (0, 1, ... in the row) and
            ``position_ids`` int64 [T], which restart at each document; plus the keys of ``features``, if any.
        """
        return self.__getitems__([index])[0]

    def __getitems__(self, indices: Sequence[int]) -> list[dict[str, Tensor]]:
        """Return several items, whose documents are read together: states that are asked for come at the same time."""
        bins = [self.bins[index if index >= 0 else -1 - index] for index in indices]
        chosen = [document for one in bins for document in one]
        joined, lengths = self.rows.join(chosen)
        starts = lengths.cumsum(0) - lengths
        if self.features:
            joined |= self.features.join(chosen, joined["input_ids"].split(lengths.tolist()))
        joined["position_ids"] = torch.arange(len(joined["input_ids"])) - starts.repeat_interleave(lengths)
        numbers = torch.cat([torch.arange(len(one)) for one in bins])
        joined["document_ids"] = numbers.repeat_interleave(lengths)
        sizes = [int(one.sum()) for one in lengths.split([len(one) for one in bins])]
        split = {name: one.split(sizes) for name, one in joined.items()}
        items = [{name: parts[number] for name, parts in split.items()} for number in range(len(bins))]
        for index, item in zip(indices, items, strict=True):
            if index < 0:
                item["loss_mask"] = torch.zeros_like(item["loss_mask"])
        return items

    def fill_share(self, capacity: int) -> float:
        """Return the share of tokens that documents fill if every item is ``capacity`` tokens long."""
        return float(self.rows.lengths.sum()) / (len(self.bins) * capacity)


def collate(items: Sequence[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Stack items into a batch of [B, T] tensors, right-padded to the longest.

    Padding has ``input_ids`` 0, ``loss_mask`` False, ``document_ids`` -1 and ``position_ids`` 0. Stored states are
    padded with zeros; a batch has them if all items have them.
    """
    padded = {
        key: pad_sequence([item[key] for item in items], batch_first=True, padding_value=padding)
        for key, padding in _PADDING.items()
    }
    return padded | stack_features(items)


def window_of(batches: Collection[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Return the masks of several batches, concatenated as one batch.

    Returns:
        ``window_loss_mask`` and ``window_document_ids``, [W * B, T] each for W batches, padded to the longest row.
    """
    longest = max(one["loss_mask"].shape[1] for one in batches)
    return {
        f"{_WINDOW}{name}": torch.cat(
            [F.pad(one[name], (0, longest - one[name].shape[1]), value=_PADDING[name]) for one in batches]
        )
        for name in ("loss_mask", "document_ids")
    }


def window_in(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return ``loss_mask`` and ``document_ids`` of a whole optimizer step; empty if the step has only one batch."""
    return {name.removeprefix(_WINDOW): one for name, one in batch.items() if name.startswith(_WINDOW)}
