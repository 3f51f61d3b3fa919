"""Reading a store: rows are found by their tokens, states are read through memory maps."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors import safe_open
from torch import Tensor
from tqdm import tqdm

from specforge.data.features.dtypes import has_scales, torch_dtype
from specforge.data.features.manifest import Manifest, describe_layers
from specforge.data.features.shards import check_shard, layer_name, open_shard, scales_name
from specforge.data.mapped import require_size
from specforge.errors import SpecforgeError, UsageError


class FeatureStore:
    """A folder of states.

    Args:
        folder: The folder.
        manifest: What of it to read; by default what its manifest says.

    Raises:
        UsageError: It is no store, it is unfinished, or a shard is missing or truncated; the file is named.
    """

    def __init__(self, folder: Path, manifest: Manifest | None = None) -> None:
        self.folder = folder
        self.manifest = manifest or Manifest.read(folder)
        self.dtype = torch_dtype(self.manifest.dtype)
        self._files: dict[int, safe_open] = {}
        self._mapped: dict[tuple[int, str], Tensor] = {}
        digests, starts, kept, shards = [], [], [], []
        for number, shard in enumerate(self.manifest.shards):
            path = folder / shard.file
            size = path.stat().st_size if path.is_file() else None
            if size != shard.bytes:
                found = "is missing" if size is None else f"has {size:,} bytes instead of {shard.bytes:,}"
                raise UsageError(f"{path} {found}; remove it and run the store's command again, which makes it anew")
            bounds = self._file(number).get_tensor("starts").numpy()
            digests.append(self._file(number).get_tensor("digests").numpy().view(np.uint64))
            starts.append(bounds[:-1])
            kept.append(np.diff(bounds))
            shards.append(np.full(shard.rows, number))
        # By the first half of the digest; the second half tells whether it is really that row. Of equal rows, which
        # only recordings have, the one with the most tokens comes first.
        found_by, tokens = np.concatenate(digests), np.concatenate(kept)
        order = np.lexsort((-tokens, found_by[:, 0]))
        self._digests = found_by[order]
        self._starts = np.concatenate(starts)[order]
        self._shards = np.concatenate(shards)[order]
        self.kept: npt.NDArray[np.int64] = tokens[order]
        """Tokens of each place that have states."""

    def __getstate__(self) -> dict[str, Any]:
        """Leave the open files behind: each process maps its own."""
        return {**self.__dict__, "_files": {}, "_mapped": {}}

    def locate(self, digests: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
        """Find rows.

        Args:
            digests: Digests of their tokens, uint64 [rows, 2].

        Returns:
            The place of each in the store, int64 [rows]; -1 for one that is not there.
        """
        places = np.searchsorted(self._digests[:, 0], digests[:, 0]).clip(max=len(self._digests) - 1)
        return np.where((self._digests[places] == digests).all(1), places, -1)

    def read(self, place: int, layer: int) -> tuple[Tensor, Tensor | None]:
        """Read the states of a row.

        Args:
            place: Its place in the store.
            layer: Id of the layer.

        Returns:
            The stored values [T, H], and the scales [T] of types that have them: views of the file.
        """
        shard, begin = int(self._shards[place]), int(self._starts[place])
        row = slice(begin, begin + int(self.kept[place]))
        described = self.manifest.shards[shard]
        require_size(self.folder / described.file, described.bytes)
        scales = self._map(shard, scales_name(layer))[row] if has_scales(self.dtype) else None
        return self._map(shard, layer_name(layer))[row], scales

    def summary_text(self) -> str:
        """Return one line for a person."""
        manifest = self.manifest
        return (
            f"{self.folder}, {describe_layers(manifest.layers)} of {len(self.kept):,} rows, {manifest.dtype}, "
            f"{manifest.token_bytes:,} bytes a token"
        )

    def verify(self) -> None:
        """Read everything, and compare it with the checksums.

        Raises:
            SpecforgeError: Shards are damaged; they are named.
        """
        faults = []
        for shard in tqdm(self.manifest.shards, desc="verifying", unit=" shards", disable=None, delay=2):
            try:
                check_shard(self.folder / shard.file, shard)
            except SpecforgeError as error:
                faults.append(str(error))
        if faults:
            raise SpecforgeError("; ".join(faults) + "; remove these files and run the store's command again")

    def _map(self, shard: int, name: str) -> Tensor:
        """Return a whole tensor of a shard, of which the disk gives what is touched; mapping it anew takes longer."""
        if (shard, name) not in self._mapped:
            self._mapped[shard, name] = self._file(shard).get_tensor(name)
        return self._mapped[shard, name]

    def _file(self, number: int) -> safe_open:
        if number not in self._files:
            self._files[number] = open_shard(self.folder / self.manifest.shards[number].file)
        return self._files[number]
