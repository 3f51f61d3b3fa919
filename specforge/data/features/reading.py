"""Reading stored states into batches."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import get_worker_info

from specforge.data.features.dtypes import has_scales
from specforge.data.features.manifest import FeatureNeeds
from specforge.data.features.store import FeatureStore
from specforge.data.rows.reading import TokenRows
from specforge.private.torch import shared_zeros

if TYPE_CHECKING:
    from specforge.data.features.servers import StateServers
    from specforge.data.packing import PackedRows

FEATURES = ("aux", "last", "aux_scales", "last_scales")
"""Keys added to a batch: stored values of aux layers [B, T, n, H] and last state [B, T, H], and their scales."""


@dataclass(frozen=True)
class RowFeatures:
    """Where the states of some rows come from: a store, and servers for rows that are not stored.

    Attributes:
        needs: Which states are read.
        kept: Number of leading tokens of each row whose states servers are asked for, int64 [rows].
        indices: Index of each row in the store, int64 [rows]; -1 for a missing row.
        store: The store; None if no row is stored.
        servers: The servers; None if states of missing rows are not asked for.
    """

    needs: FeatureNeeds
    kept: npt.NDArray[np.int64]
    indices: npt.NDArray[np.int64]
    store: FeatureStore | None = None
    servers: StateServers | None = None

    @classmethod
    def of(cls, rows: TokenRows, needs: FeatureNeeds) -> Self:
        """Return those of rows that are not stored."""
        return cls(needs, needs.kept(rows.lengths, rows.last_supervised), np.full(len(rows), -1))

    def join(self, rows: Sequence[int], tokens: Sequence[Tensor]) -> dict[str, Tensor]:
        """Read or ask for the states of some rows, and concatenate them.

        Args:
            rows: The rows.
            tokens: Tokens of each, int64 [T]. States that nothing reads are set to zero.

        Returns:
            ``aux`` [T, n, H] and ``last`` [T, H] as stored, or in bfloat16 if they are asked for; for types of one byte
            also ``aux_scales`` [T, n] and ``last_scales`` [T]. Empty if one of the rows is missing and is not asked
            for.
        """
        missing = {row: one for row, one in zip(rows, tokens, strict=True) if self.indices[row] < 0}
        if missing and self.servers is None:
            return {}
        asked = self._ask(missing)
        dtype = torch.bfloat16 if self.store is None else self.store.dtype
        needs, lengths = self.needs, [len(one) for one in tokens]
        number, width, total = len(needs.aux_layers), needs.width, sum(lengths)
        joined = {"aux": _zeros((total, number, width), dtype), "last": _zeros((total, width), dtype)}
        if has_scales(dtype):
            joined |= {"aux_scales": torch.zeros(total, number), "last_scales": torch.zeros(total)}
        for row, begin, length in zip(rows, np.cumsum([0, *lengths]), lengths, strict=False):
            for column, layer in enumerate(needs.aux_layers):
                _fill(joined, "aux", (slice(begin, begin + length), column), *self._states(row, layer, asked))
            _fill(joined, "last", (slice(begin, begin + length),), *self._states(row, needs.num_layers, asked))
        return joined

    def _ask(self, tokens: Mapping[int, Tensor]) -> dict[int, Tensor]:
        """Return the states [T, L, H] of some rows from the servers."""
        if not tokens or self.servers is None:
            return {}
        states = self.servers.states([one.numpy()[: self.kept[row]] for row, one in tokens.items()])
        # One type, whichever server answers, and the one that is recorded.
        return {row: one.bfloat16() for row, one in zip(tokens, states, strict=True)}

    def _states(self, row: int, layer: int, asked: Mapping[int, Tensor]) -> tuple[Tensor, Tensor | None]:
        if row in asked:
            return asked[row][:, self.needs.layers.index(layer)], None
        assert self.store is not None
        return self.store.read(int(self.indices[row]), layer)


def _fill(
    joined: Mapping[str, Tensor], name: str, where: tuple[Any, ...], values: Tensor, scales: Tensor | None
) -> None:
    for key, found in ((name, values), (f"{name}_scales", scales)):
        if found is not None:
            target = joined[key][where]
            target[: len(found)] = found[: len(target)]


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
    indices = np.where(store.kept[indices] < needs.read(rows.lengths, rows.last_supervised), -1, indices)
    items.features = replace(items.features or RowFeatures.of(rows, needs), store=store, indices=indices)
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
