"""One file of a feature store: the states of some rows, one tensor per layer, and the digests that identify the rows.

Tensors: ``digests`` uint8 [rows, 16], ``starts`` int64 [rows + 1], ``checksums`` int64 [rows, layers]; for each layer k
``layer.k`` [tokens, H] and, for one-byte types, ``layer.k.scales`` float32 [tokens]. Row r has the tokens starts[r]
to starts[r + 1]. Its checksum at a layer is the XXH3 of its values and scales. One checksum in the header covers the
rest of the file.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor
from xxhash import xxh3_64, xxh3_128

from specforge.data.features.manifest import FORMAT, Shard
from specforge.data.rows.mapped import require_size
from specforge.errors import SpecforgeError
from specforge.files import whole_file

_KEY = "specforge"  # a single key: safetensors writes several in arbitrary order
_INDEX = ("digests", "starts", "checksums")
AGAIN = "remove it and run the command that wrote it again to capture its rows again"


def layer_name(layer: int) -> str:
    """Return the name of a layer's tensor."""
    return f"layer.{layer}"


def scales_name(layer: int) -> str:
    """Return the name of the tensor of a layer's scales."""
    return f"layer.{layer}.scales"


def write_shard(path: Path, tensors: Mapping[str, Tensor], identity: Mapping[str, Any]) -> None:
    """Write a shard atomically.

    Args:
        path: The file.
        tensors: Its tensors, without the checksums.
        identity: Identity of the store; ``layers`` are the layers in the shard.

    Raises:
        SpecforgeError: The shard cannot be written.
    """
    whole = {**tensors, "checksums": _checksums(tensors, identity["layers"])}
    metadata = json.dumps({"checksum": _index_checksum(whole, identity), "identity": identity})
    try:
        with whole_file(path) as file:
            save_file(whole, file, {_KEY: metadata})
    except (OSError, SafetensorError) as error:
        raise SpecforgeError(
            f"cannot write {path}: {error}; finished shards are kept: fix this and run the same command again to resume"
        ) from error


class StoredShard:
    """A memory-mapped shard; its index is checked when the file is opened, each row when it is read.

    Args:
        path: The file.

    Raises:
        SpecforgeError: The file is missing, damaged or not a shard of this version.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with safe_open(path, framework="pt") as file:
                metadata = json.loads(file.metadata()[_KEY])
                # Mapped once for all rows; only touched pages are read from disk.
                self._tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            self.identity: dict[str, Any] = metadata["identity"]
            """Identity of the store it belongs to."""
            is_current = self.identity["format"] == FORMAT
            found = _index_checksum(self._tensors, self.identity) if is_current else ""
        except FileNotFoundError:
            raise SpecforgeError(f"{path} is missing; run the command that wrote it again") from None
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise SpecforgeError(f"{path} is damaged or not a feature shard: {error}; {AGAIN}") from None
        if not is_current:
            raise SpecforgeError(f"{path} was written by another version of specforge; {AGAIN}")
        if found != metadata.get("checksum"):
            raise SpecforgeError(f"{path} is damaged: the checksum of its index is wrong; {AGAIN}")
        self.digests: npt.NDArray[np.uint64] = self._tensors["digests"].numpy().view(np.uint64)
        """Digests of the rows, uint64 [rows, 2]."""
        self.starts: npt.NDArray[np.int64] = self._tensors["starts"].numpy()
        """Offset of the first token of each row, then the number of tokens, int64 [rows + 1]."""
        self._checksums = self._tensors["checksums"].numpy().view(np.uint64)
        self._columns = {layer: column for column, layer in enumerate(self.identity["layers"])}
        self.entry = Shard(path.name, len(self.starts) - 1, int(self.starts[-1]), path.stat().st_size, found)
        """Its manifest entry."""

    def read(self, row: int, layer: int) -> tuple[Tensor, Tensor | None]:
        """Read the states of a row and verify their checksum.

        Args:
            row: Index of the row in the shard.
            layer: Id of the layer.

        Returns:
            The stored values [T, H] and, for one-byte types, the scales [T]: views of the file.

        Raises:
            SpecforgeError: The checksum is wrong.
        """
        require_size(self.path, self.entry.bytes)
        tokens = slice(int(self.starts[row]), int(self.starts[row + 1]))
        found = _row(self._tensors, layer, tokens)
        if _row_checksum(*found) != self._checksums[row, self._columns[layer]]:
            raise SpecforgeError(
                f"{self.path} is damaged: the checksum of the states of row {row} at layer {layer} is wrong; {AGAIN}"
            )
        return found

    def check(self) -> None:
        """Read the whole shard and verify its checksums.

        Raises:
            SpecforgeError: A checksum is wrong.
        """
        for row in range(self.entry.rows):
            for layer in self._columns:
                self.read(row, layer)


def _row(tensors: Mapping[str, Tensor], layer: int, tokens: slice) -> tuple[Tensor, Tensor | None]:
    scales = tensors.get(scales_name(layer))
    return tensors[layer_name(layer)][tokens], None if scales is None else scales[tokens]


def _checksums(tensors: Mapping[str, Tensor], layers: list[int]) -> Tensor:
    starts = tensors["starts"].tolist()
    checksums = np.empty((len(starts) - 1, len(layers)), np.uint64)
    for column, layer in enumerate(layers):
        for row, tokens in enumerate(map(slice, starts[:-1], starts[1:])):
            checksums[row, column] = _row_checksum(*_row(tensors, layer, tokens))
    return torch.from_numpy(checksums.view(np.int64))


def _row_checksum(values: Tensor, scales: Tensor | None) -> int:
    checksum = xxh3_64(_content(values))
    if scales is not None:
        checksum.update(_content(scales))
    return checksum.intdigest()


def _index_checksum(tensors: Mapping[str, Tensor], identity: Mapping[str, Any]) -> str:
    types = {name: f"{one.dtype} {list(one.shape)}" for name, one in tensors.items()}
    checksum = xxh3_128(json.dumps([types, identity], sort_keys=True).encode())
    for name in _INDEX:
        checksum.update(_content(tensors[name]))
    return checksum.hexdigest()


def _content(tensor: Tensor) -> memoryview:
    content: memoryview = tensor.contiguous().flatten().view(torch.uint8).numpy().data
    return content
