"""Reading stored states into batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from specforge.data.features.dtypes import has_scales
from specforge.data.features.manifest import FeatureNeeds
from specforge.data.features.store import FeatureStore
from specforge.private.torch import shared_zeros

if TYPE_CHECKING:
    from specforge.data.packing import PackedRows

FEATURES = ("aux", "last", "aux_scales", "last_scales")
"""Keys added to a batch: stored values of aux layers [B, T, n, H] and last state [B, T, H], and their scales."""


@dataclass(frozen=True)
class RowFeatures:
    """Where the states of some rows are stored.

    Attributes:
        store: The store.
        indices: Index of each row in the store, int64 [rows]; -1 for a missing row.
        aux_layers: Ids of the aux layers, ascending.
        last_layer: Id of the last state.
    """

    store: FeatureStore
    indices: npt.NDArray[np.int64]
    aux_layers: Sequence[int]
    last_layer: int

    def join(self, rows: Sequence[int], lengths: Sequence[int]) -> dict[str, Tensor]:
        """Read and concatenate the states of some rows.

        Args:
            rows: The rows.
            lengths: Tokens of each. States that are not stored, because nothing reads them, are set to zero.

        Returns:
            ``aux`` [T, n, H] and ``last`` [T, H] as stored; for types of one byte also ``aux_scales`` [T, n] and
            ``last_scales`` [T]. Empty if one of the rows is missing.
        """
        if (self.indices[list(rows)] < 0).any():
            return {}
        dtype, width = self.store.dtype, self.store.manifest.width
        tokens, number = sum(lengths), len(self.aux_layers)
        joined = {"aux": _zeros((tokens, number, width), dtype), "last": _zeros((tokens, width), dtype)}
        if has_scales(dtype):
            joined |= {"aux_scales": torch.zeros(tokens, number), "last_scales": torch.zeros(tokens)}
        for column, layer in enumerate(self.aux_layers):
            self._fill(
                layer, rows, lengths, joined["aux"][:, column], joined.get("aux_scales", joined["aux"])[:, column]
            )
        self._fill(self.last_layer, rows, lengths, joined["last"], joined.get("last_scales", joined["last"]))
        return joined

    def _fill(self, layer: int, rows: Sequence[int], lengths: Sequence[int], values: Tensor, scales: Tensor) -> None:
        begin = 0
        for row, length in zip(rows, lengths, strict=True):
            stored, stored_scales = self.store.read(int(self.indices[row]), layer)
            end = begin + min(length, len(stored))
            values[begin:end] = stored[: end - begin]
            if stored_scales is not None:
                scales[begin:end] = stored_scales[: end - begin]
            begin += length


def read_from(store: FeatureStore, needs: FeatureNeeds, items: PackedRows) -> npt.NDArray[np.bool_]:
    """Attach the stored states of their rows to the items.

    Args:
        store: The store.
        needs: What is read.
        items: They gain the keys that ``RowFeatures.join`` returns.

    Returns:
        Which rows are missing or stored too short, bool [rows].
    """
    rows = items.rows
    indices = store.locate(rows.digests)
    indices = np.where(store.kept[indices] < needs.kept(rows.lengths, rows.last_supervised), -1, indices)
    items.features = RowFeatures(store, indices, needs.aux_layers, needs.num_layers)
    return indices < 0


def stack_features(items: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Stack the states of items into a batch, right-padded with zeros; empty if an item has none.

    Args:
        items: Items that may hold the keys of ``RowFeatures.join``.
    """
    names = [name for name in FEATURES if all(name in item for item in items)]
    return {name: _stack([item[name] for item in items]) for name in names}


def _stack(tensors: Sequence[Tensor]) -> Tensor:
    if len(tensors) == 1:
        return tensors[0][None]  # states are large: do not copy a batch of one item
    longest = max(len(tensor) for tensor in tensors)
    stacked = _zeros((len(tensors), longest, *tensors[0].shape[1:]), tensors[0].dtype)
    for row, tensor in zip(stacked, tensors, strict=True):
        row[: len(tensor)] = tensor
    return stacked


def _zeros(shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Create zeros where a batch needs no further copy: shared by a worker with its process, page-locked for a GPU."""
    # Created as bytes, which support zeros for every type.
    number = math.prod(shape) * dtype.itemsize
    if get_worker_info() is not None:
        content = shared_zeros(number)
    else:
        content = torch.zeros(number, dtype=torch.uint8, pin_memory=torch.cuda.is_available())
    return content.view(dtype).view(shape)
