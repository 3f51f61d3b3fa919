"""Recording the states captured during training, so that each row is captured once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import replace
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specforge.data.features.dtypes import decode, encode, torch_dtype
from specforge.data.features.manifest import FeatureNeeds, Manifest, describe_layers
from specforge.data.features.plan import SHARD_BYTES
from specforge.data.features.reading import read_from
from specforge.data.features.shards import StoredShard, layer_name, write_shard
from specforge.data.features.store import FeatureStore
from specforge.data.packing import PackedRows
from specforge.data.rows.reading import row_digest
from specforge.errors import SpecforgeError

_log = logging.getLogger(__name__)


class FeatureRecorder:
    """Adds shards of captured states to a folder; several processes may record into the same folder.

    Args:
        folder: The folder.
        manifest: Contents of the store; its dtype must be one without scales.
        needs: Which states the run reads.
        splits: The rows of the run, by split.
    """

    def __init__(self, folder: Path, manifest: Manifest, needs: FeatureNeeds, splits: Mapping[str, PackedRows]) -> None:
        self.folder = folder
        self.manifest = manifest
        self.needs = needs
        self.splits = splits
        self._missing: dict[bytes, int] = {}  # tokens to store of each missing row, by digest
        self._recorded: list[tuple[bytes, Tensor]] = []
        self._bytes = 0

    def reopen(self) -> bool:
        """Let batches read everything recorded so far by any process; return whether no row is missing."""
        store = self._open()
        self._missing.clear()
        for items in self.splits.values():
            rows = items.rows
            missing = np.ones(len(rows), np.bool_) if store is None else read_from(store, self.needs, items)
            kept = self.needs.kept(rows.lengths, rows.last_supervised)
            for row in np.flatnonzero(missing):
                digest = rows.digests[row].tobytes()
                self._missing[digest] = max(self._missing.get(digest, 0), int(kept[row]))
        return not self._missing

    def summary_text(self) -> str:
        """Return a one-line summary."""
        return (
            f"recorded in {self.folder}, {describe_layers(self.manifest.layers)}, {self.manifest.dtype}, "
            f"{self.manifest.token_bytes:,} bytes a token"
        )

    def add(self, batch: Mapping[str, Tensor], aux: Tensor, last: Tensor) -> None:
        """Record the rows of a batch that are not yet stored.

        Args:
            batch: ``input_ids`` and ``document_ids``, [B, T] each.
            aux: States of the aux layers, [B, T, n, H].
            last: The last states, [B, T, H].
        """
        if not self._missing:
            return
        by_layer = dict(zip(self.needs.aux_layers, aux.unbind(2), strict=True)) | {self.needs.num_layers: last}
        states = [by_layer[layer] for layer in self.needs.layers]
        tokens, documents = batch["input_ids"].cpu().numpy(), batch["document_ids"].cpu().numpy()
        for number, ids in enumerate(documents):
            bounds = [0, *(np.flatnonzero(np.diff(ids)) + 1), len(ids)]
            for begin, end in pairwise(bounds):
                digest = row_digest(tokens[number, begin:end])
                kept = self._missing.pop(digest, None)
                if kept is not None:
                    found = torch.stack([one[number, begin : begin + kept] for one in states])
                    self._recorded.append((digest, encode(found, torch_dtype(self.manifest.dtype))[0].cpu()))
                    self._bytes += kept * self.manifest.token_bytes
        if self._bytes >= SHARD_BYTES:
            self.flush()

    def rounded(self, states: Tensor) -> Tensor:
        """Return states as they will be read back after recording, in their own dtype."""
        return decode(encode(states, torch_dtype(self.manifest.dtype))[0], None, states.dtype)

    def flush(self) -> None:
        """Write the states recorded since the last flush; if that fails, training continues without recording."""
        if not self._recorded:
            return
        digests, states = zip(*self._recorded, strict=True)
        self._recorded, self._bytes = [], 0
        lengths = [one.shape[1] for one in states]
        tensors = dict(zip(map(layer_name, self.manifest.layers), torch.cat(states, dim=1), strict=True))
        tensors["digests"] = torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(-1, 16)
        tensors["starts"] = torch.tensor([0, *np.cumsum(lengths)])
        name = f"shard-{sha256(b''.join(digests)).hexdigest()[:16]}.safetensors"
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_shard(self.folder / name, tensors, self.manifest.identity)
        except (SpecforgeError, OSError) as error:
            self._missing.clear()
            _log.warning("states are no longer recorded; the verifier runs instead: %s", error)

    def _open(self) -> FeatureStore | None:
        shards = []
        for path in sorted(self.folder.glob("shard-*.safetensors")):
            try:
                shard = StoredShard(path)
            except SpecforgeError as error:
                _log.warning("%s. Its rows will be captured again", error)
                continue
            if shard.identity == self.manifest.identity:
                shards.append(shard.entry)
        return FeatureStore(self.folder, replace(self.manifest, shards=tuple(shards))) if shards else None
