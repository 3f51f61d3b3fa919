"""Recording the states of training, so that each row is captured or asked for once."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from specforge.data.features.dtypes import decode, encode, torch_dtype
from specforge.data.features.growing import GrowingStore
from specforge.data.features.manifest import FeatureNeeds, Manifest, describe_layers
from specforge.data.features.reading import read_from
from specforge.data.packing import PackedRows
from specforge.data.rows.reading import row_digest
from specforge.errors import SpecforgeError

_log = logging.getLogger(__name__)


class FeatureRecorder:
    """Records the states of batches; several processes may record into the same folder.

    Args:
        folder: The folder.
        manifest: Contents of the store; its dtype must be one without scales.
        needs: Which states the run reads.
        splits: The rows of the run, by split.

    Attributes:
        store: The store that they are added to.
    """

    def __init__(self, folder: Path, manifest: Manifest, needs: FeatureNeeds, splits: Mapping[str, PackedRows]) -> None:
        self.store = GrowingStore(folder, manifest)
        self.needs = needs
        self.splits = splits
        self._missing: dict[bytes, int] = {}  # tokens to store of each missing row, by digest

    def reopen(self) -> bool:
        """Let batches read everything recorded so far by any process; return whether no row is missing."""
        store = self.store.open()
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
        manifest = self.store.manifest
        return (
            f"recorded in {self.store.folder}, {describe_layers(manifest.layers)}, {manifest.dtype}, "
            f"{manifest.token_bytes:,} bytes a token"
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
                    self.store.add(digest, torch.stack([one[number, begin : begin + kept] for one in states]))
        if self.store.is_full:
            self.flush()

    def rounded(self, states: Tensor) -> Tensor:
        """Return states as they will be read back after recording, in their own dtype."""
        return decode(encode(states, torch_dtype(self.store.manifest.dtype))[0], None, states.dtype)

    def flush(self) -> None:
        """Write the states recorded since the last flush; if that fails, training continues without recording."""
        try:
            self.store.flush()
        except SpecforgeError as error:
            self._missing.clear()
            _log.warning("states are no longer recorded: %s", error)

    def publish(self) -> None:
        """Let later runs read what is recorded (see ``GrowingStore.publish``); warn if that fails."""
        try:
            self.store.publish()
        except OSError as error:
            _log.warning("cannot write the manifest of %s: %s", self.store.folder, error)
