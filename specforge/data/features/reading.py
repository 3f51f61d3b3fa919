"""Stored states on their way into batches."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from specforge.data.features.dtypes import has_scales
from specforge.data.features.manifest import FeatureNeeds
from specforge.data.features.store import FeatureStore

if TYPE_CHECKING:
    from specforge.data.packing import PackedRows

FEATURES = ("aux", "last", "aux_scales", "last_scales")
"""What a batch gains: stored values of aux layers [B, T, n, H] and last state [B, T, H], and their scales."""


@dataclass(frozen=True)
class RowFeatures:
    """Where the states of some rows are.

    Attributes:
        store: The store.
        places: Place of each row in it, int64 [rows]; -1 for one that is not there.
        aux_layers: Ids of the aux layers, ascending.
        last_layer: Id of the last state.
    """

    store: FeatureStore
    places: npt.NDArray[np.int64]
    aux_layers: Sequence[int]
    last_layer: int

    def join(self, rows: Sequence[int], lengths: Sequence[int]) -> dict[str, Tensor]:
        """Read the states of some rows, one behind the other.

        Args:
            rows: The rows.
            lengths: Tokens of each. States that are not stored, because nothing reads them, are zero.

        Returns:
            `aux` [T, n, H] and `last` [T, H] as stored; for types of one byte also `aux_scales` [T, n] and
            `last_scales` [T]. Nothing where one of the rows is not there.
        """
        if (self.places[list(rows)] < 0).any():
            return {}
        dtype, width = self.store.dtype, self.store.manifest.width
        tokens, number = sum(lengths), len(self.aux_layers)
        joined = {"aux": _zeros((tokens, number, width), dtype), "last": _zeros((tokens, width), dtype)}
        if has_scales(dtype):
            joined |= {"aux_scales": torch.zeros(tokens, number), "last_scales": torch.zeros(tokens)}
        for place, layer in enumerate(self.aux_layers):
            self._fill(layer, rows, lengths, joined["aux"][:, place], joined.get("aux_scales", joined["aux"])[:, place])
        self._fill(self.last_layer, rows, lengths, joined["last"], joined.get("last_scales", joined["last"]))
        return joined

    def _fill(self, layer: int, rows: Sequence[int], lengths: Sequence[int], values: Tensor, scales: Tensor) -> None:
        begin = 0
        for row, length in zip(rows, lengths, strict=True):
            stored, stored_scales = self.store.read(int(self.places[row]), layer)
            end = begin + min(length, len(stored))
            values[begin:end] = stored[: end - begin]
            if stored_scales is not None:
                scales[begin:end] = stored_scales[: end - begin]
            begin += length


def read_from(store: FeatureStore, needs: FeatureNeeds, items: PackedRows) -> npt.NDArray[np.bool_]:
    """Let items read what is stored of their rows.

    Args:
        store: The store.
        needs: What is read.
        items: They gain what `RowFeatures.join` returns.

    Returns:
        Which rows are not there, or not as far as they are read, bool [rows].
    """
    rows = items.rows
    places = store.locate(rows.digests)
    places = np.where(store.kept[places] < needs.kept(rows.lengths, rows.last_supervised), -1, places)
    items.features = RowFeatures(store, places, needs.aux_layers, needs.num_layers)
    return places < 0


def stack_features(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack the states of items to a batch, padded on the right with zeros; empty where an item has none.

    Args:
        items: Items of `RowFeatures.join`, among other things.
    """
    names = [name for name in FEATURES if all(name in item for item in items)]
    return {name: _stack([item[name] for item in items]) for name in names}


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0][None]  # states are large: no copy where one item is the batch
    longest = max(len(tensor) for tensor in tensors)
    stacked = _zeros((len(tensors), longest, *tensors[0].shape[1:]), tensors[0].dtype)
    for row, tensor in zip(stacked, tensors, strict=True):
        row[: len(tensor)] = tensor
    return stacked


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    # Zeroed as bytes, which every type knows.
    return torch.zeros(*shape[:-1], shape[-1] * dtype.itemsize, dtype=torch.uint8).view(dtype)
