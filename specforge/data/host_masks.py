"""The masks of a batch on the CPU, where documents and supervised rows are found without waiting for a device."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Any, Self

from specforge.data.packing import window_in
from specforge.documents import DocumentLayout

# What they are called in a batch.
NAME = "host_masks"


class HostMasks:
    """Which tokens of a batch are supervised, and which documents they belong to; it stays on the CPU.

    Reading a mask on a GPU means waiting until it has done everything that it was given before.

    Args:
        batch: ``document_ids`` and, where rows are trained, ``loss_mask``, [B, T] each, and perhaps those of the
            optimizer step (see ``specforge.data.packing.window_of``).

    Attributes:
        masks: The batch's ``loss_mask`` and ``document_ids``.
        window: Those of all batches of the optimizer step; empty if it takes only one.
    """

    def __init__(self, batch: Mapping[str, Any]) -> None:
        self.masks = {name: batch[name].cpu() for name in ("loss_mask", "document_ids") if name in batch}
        self.window = {name: one.cpu() for name, one in window_in(batch).items()}

    @classmethod
    def of(cls, batch: Mapping[str, Any]) -> Self:
        """Return those that came with a batch; for a batch that no data module has prepared, make them."""
        return batch[NAME] if NAME in batch else cls(batch)

    @classmethod
    def kept(cls, batch: Mapping[str, Any]) -> dict[str, Any]:
        """Return a batch on the CPU together with its masks, which stay there when Lightning moves the batch."""
        return {**batch, NAME: cls(batch)}

    @cached_property
    def documents(self) -> DocumentLayout:
        """Where the documents are."""
        return DocumentLayout.of(self.masks["document_ids"])
