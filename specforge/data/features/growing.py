"""A feature store that grows: rows are added in any order, and several processes may add to one folder."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import replace
from hashlib import sha256
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specforge.data.features.dtypes import encode, torch_dtype
from specforge.data.features.manifest import MANIFEST, Manifest
from specforge.data.features.plan import SHARD_BYTES
from specforge.data.features.shards import StoredShard, layer_name, write_shard
from specforge.data.features.store import FeatureStore
from specforge.errors import SpecforgeError, UsageError

_log = logging.getLogger(__name__)


class GrowingStore:
    """Collects the states of rows, and writes them as shards.

    Args:
        folder: The folder.
        manifest: Contents of the store; its dtype must be one without scales.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder = folder
        self.manifest = manifest
        self._rows: list[tuple[bytes, Tensor]] = []
        self._bytes = 0

    @property
    def is_full(self) -> bool:
        """Whether the rows that are not written yet fill a shard."""
        return self._bytes >= SHARD_BYTES

    def add(self, digest: bytes, states: Tensor) -> None:
        """Add a row, which is held in memory until ``flush``.

        Args:
            digest: Digest of its tokens.
            states: Its states [L, T, H]; not a view of something that changes.
        """
        self._rows.append((digest, encode(states, torch_dtype(self.manifest.dtype))[0].cpu()))
        self._bytes += states.shape[1] * self.manifest.token_bytes

    def flush(self) -> None:
        """Write the rows that were added since the last call as a shard.

        Raises:
            SpecforgeError: The shard cannot be written; its rows are dropped.
        """
        if not self._rows:
            return
        digests, states = zip(*self._rows, strict=True)
        self._rows, self._bytes = [], 0
        lengths = [one.shape[1] for one in states]
        tensors = dict(zip(map(layer_name, self.manifest.layers), torch.cat(states, dim=1), strict=True))
        tensors["digests"] = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, 16)
        tensors["starts"] = torch.tensor([0, *np.cumsum(lengths)])
        name = f"shard-{sha256(b''.join(digests)).hexdigest()[:16]}.safetensors"
        write_shard(self.folder / name, tensors, self.manifest.identity)

    def open(self) -> FeatureStore | None:
        """Open what any process has written so far; None if that is nothing."""
        shards = [shard.entry for shard in self._shards() if shard.identity == self.manifest.identity]
        return FeatureStore(self.folder, replace(self.manifest, shards=tuple(shards))) if shards else None

    def publish(self) -> None:
        """Write the manifest, by which the folder is read with ``data.features: FOLDER``; for one process at a time.

        Raises:
            OSError: It cannot be written.
        """
        store = self.open()
        if store is not None:
            store.manifest.write(self.folder)

    def check_folder(self, key: str) -> None:
        """Refuse a folder that holds anything besides states of this kind.

        Args:
            key: Configuration key of the folder, for messages.

        Raises:
            UsageError: Names what it holds.
        """
        if self.folder.exists() and not self.folder.is_dir():
            raise UsageError(f"{key}: {self.folder} is a file; give a folder")
        for path in sorted(self.folder.glob("[!.]*")):
            if not path.match("shard-*.safetensors") and path.name != MANIFEST:
                raise UsageError(f"{key}: {self.folder} holds something else ({path.name}); give a new folder")
        if any(shard.identity != self.manifest.identity for shard in self._shards()):
            raise UsageError(
                f"{key}: {self.folder} holds states of another verifier, type, layers or kind of rows; give a new "
                "folder"
            )

    def _shards(self) -> Iterator[StoredShard]:
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            try:
                yield StoredShard(path)
            except SpecforgeError as error:
                _log.warning("%s. Its rows will be captured again", error)
