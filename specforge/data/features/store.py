"""Reading a feature store: rows are found by a digest of their tokens, states are memory-mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor
from tqdm import tqdm

from specforge.data.features.dtypes import torch_dtype
from specforge.data.features.manifest import MANIFEST, Manifest, describe_layers
from specforge.data.features.shards import AGAIN, StoredShard
from specforge.errors import SpecforgeError, UsageError


class FeatureStore:
    """A folder of stored states.

    Args:
        folder: The folder.
        manifest: Which shards to read. Default: the folder's own manifest.

    Raises:
        UsageError: The folder is not a store or is unfinished, or a shard is missing or truncated; names the file.
        SpecforgeError: The index of a shard is damaged; names the file.
    """

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        self.folder = folder
        self.manifest = manifest or Manifest.read(folder)
        self.dtype = torch_dtype(self.manifest.dtype)
        self._shards: dict[int, StoredShard] = {}
        digests, kept, shards, rows = [], [], [], []
        for number, shard in enumerate(self.manifest.shards):
            path = folder / shard.file
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size:,} bytes instead of {shard.bytes:,}"
                raise UsageError(f"{path} {found}; {AGAIN}")
            stored = self._shard(number)
            if stored.entry != shard:
                raise SpecforgeError(f"{path} is damaged: it is not the file that {MANIFEST} describes; {AGAIN}")
            digests.append(stored.digests)
            kept.append(np.diff(stored.starts))
            shards.append(np.full(shard.rows, number))
            rows.append(np.arange(shard.rows))
        # Sorted by the first half of the digest; `locate` also compares the second half. Recordings may hold equal
        # rows; the one with the most tokens comes first.
        found_by, tokens = np.concatenate(digests), np.concatenate(kept)
        order = np.lexsort((-tokens, found_by[:, 0]))
        self._digests = found_by[order]
        self._shard_of = np.concatenate(shards)[order]
        self._row_of = np.concatenate(rows)[order]
        self.kept: npt.NDArray[np.int64] = tokens[order]
        """Number of tokens with states of each row, int64 [rows]."""

    def __getstate__(self) -> dict[str, Any]:
        """Drop the open files: each process maps its own."""
        return {**self.__dict__, "_shards": {}}

    def locate(self, digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Find rows by their digests.

        Args:
            digests: Digests of their tokens, uint64 [rows, 2].

        Returns:
            The index of each row in the store, int64 [rows]; -1 for a missing row.
        """
        indices = np.searchsorted(self._digests[:, 0], digests[:, 0]).clip(max=len(self._digests) - 1)
        return np.where((self._digests[indices] == digests).all(1), indices, -1)

    def read(self, index: int, layer: int) -> tuple[Tensor, Tensor | None]:
        """Read the states of a row.

        Args:
            index: Index of the row in the store.
            layer: Id of the layer.

        Returns:
            The stored values [T, H] and, for one-byte types, the scales [T]: views of the file.

        Raises:
            SpecforgeError: The checksum is wrong; names the file.
        """
        return self._shard(int(self._shard_of[index])).read(int(self._row_of[index]), layer)

    def summary_text(self) -> str:
        """Return a one-line summary."""
        manifest = self.manifest
        return (
            f"{self.folder}, {describe_layers(manifest.layers)} of {len(self.kept):,} rows, {manifest.dtype}, "
            f"{manifest.token_bytes:,} bytes a token"
        )

    def check(self) -> None:
        """Read all shards and verify their checksums.

        Raises:
            SpecforgeError: Shards are damaged; names them.
        """
        faults = []
        for number in tqdm(range(len(self.manifest.shards)), desc="verifying", unit=" shards", disable=None, delay=2):
            try:
                self._shard(number).check()
            except SpecforgeError as error:
                faults.append(str(error))
        if faults:
            raise SpecforgeError("; ".join(faults))

    def _shard(self, number: int) -> StoredShard:
        if number not in self._shards:
            self._shards[number] = StoredShard(self.folder / self.manifest.shards[number].file)
        return self._shards[number]
