"""The documents of packed rows, for attention that never crosses a document and needs no mask.

Documents are gathered into right-padded groups of similar length. Plain causal attention is exact on them: a real query
never sees the padding after it. A group's longest document is at most twice its shortest, so padding costs less than
the attention itself.

The indices are computed once per batch, on the CPU. Layers only gather and scatter by them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Self

import torch
from torch import Tensor

from specforge import flash
from specforge.flash import Ends
from specforge.moving import moved


@dataclass(frozen=True)
class Groups:
    """Tokens of a flattened batch in groups of slots, G documents of L slots each; some slots are empty.

    Attributes:
        shapes: G and L of each group.
        rows: The token in each filled slot, int64 [n].
        slots: Index of each filled slot among the slots of all groups, int64 [n]; None if all are filled.
    """

    shapes: tuple[tuple[int, int], ...]
    rows: Tensor
    slots: Tensor | None

    @classmethod
    def of(cls, indices: Sequence[Tensor]) -> Self:
        """Make groups of indices into the batch.

        Args:
            indices: Indices of each group, int64 [G, L] on the CPU; -1 for an empty slot.
        """
        shapes = tuple((len(one), one.shape[1]) for one in indices)
        flat = torch.cat([one.flatten() for one in indices])
        slots = (flat >= 0).nonzero().squeeze(1)
        return cls(shapes, flat[slots], None if len(slots) == len(flat) else slots)

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Gather rows of a batch [B * T, ...] into slots, [G, L, ...] for each group; empty slots are zero."""
        sizes = [documents * length for documents, length in self.shapes]
        together = _Copy.apply(tensor, self.rows, self.slots, sum(sizes))
        parts = together.split(sizes)
        return [part.unflatten(0, shape) for part, shape in zip(parts, self.shapes, strict=True)]

    def scatter(self, tensors: Sequence[Tensor], number: int) -> Tensor:
        """Scatter slots, [G, L, ...] for each group, to a batch [number, ...]; other rows are zero."""
        flat = [one.flatten(0, 1) for one in tensors]
        together = torch.cat(flat) if len(flat) > 1 else flat[0]
        taken: Tensor = _Copy.apply(together, self.slots, self.rows, number)
        return taken


class _Copy(torch.autograd.Function):
    """Copies rows of a tensor to rows of a new one, by indices without duplicates; None means all rows in order.

    Autograd's own gradient of indexing sums duplicates, which is slow, and nondeterministic on GPUs.
    """

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, source: Tensor | None, target: Tensor | None, number: int) -> Tensor:
        ctx.indices, ctx.number = (source, target), len(tensor)
        return _copied(tensor, source, target, number)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        source, target = ctx.indices
        return _copied(gradient, target, source, ctx.number), None, None, None


def _copied(tensor: Tensor, source: Tensor | None, target: Tensor | None, number: int) -> Tensor:
    taken = tensor if source is None else tensor.index_select(0, source)
    if target is None:
        return taken
    return tensor.new_zeros(number, *tensor.shape[1:]).index_copy_(0, target, taken)


@dataclass(frozen=True)
class DocumentLayout:
    """The documents of a packed batch [B, T], in groups of similar length.

    Attributes:
        groups: For each group, int64 [G, L] indices into the flattened batch, on the CPU; -1 is padding.
        whole_rows: Whether every row is a single document from its first token on, so that nothing is gathered.
        lengths: Lengths of all documents and paddings as they follow each other in the flattened batch, int64 [runs];
            None if its tokens are in another order.
    """

    groups: tuple[Tensor, ...]
    whole_rows: bool
    lengths: Tensor | None = None

    @classmethod
    def of(cls, document_ids: Tensor) -> Self:
        """Find the documents of a batch.

        Args:
            document_ids: Integers [B, T]; equal neighbours are one document, -1 is padding. On a device, this waits for
                a copy to the CPU.
        """
        ids = document_ids.cpu()
        begins = torch.ones_like(ids, dtype=torch.bool)
        begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = begins.flatten().nonzero().squeeze(1)
        lengths = torch.diff(starts, append=starts.new_tensor([ids.numel()]))
        real = ids.flatten()[starts] >= 0
        runs, starts, lengths = lengths, starts[real], lengths[real]
        whole_rows = bool((begins & (ids >= 0)).sum() == ids.shape[0]) and bool((ids[:, 0] >= 0).all())
        return cls(tuple(_group(starts, lengths)), whole_rows, runs)

    def reordered(self, order: Tensor) -> Self:
        """Return the layout of the same documents in one row [1, B * T] with the tokens in another order.

        Args:
            order: The token at each index, int64 [B * T], on the CPU.
        """
        index = torch.empty_like(order)
        index[order] = torch.arange(len(order))
        return type(self)(tuple(torch.where(group >= 0, index[group], -1) for group in self.groups), whole_rows=False)

    def on(self, device: torch.device) -> DocumentAttention:
        """Return the attention within these documents on a device."""
        if self.whole_rows:
            return DocumentAttention(None)
        ends = Ends.of(self.lengths) if self.lengths is not None and flash.has_flash(device) else None
        return moved(DocumentAttention(Groups.of(self.groups), ends), device)


EACH_ROW_ONE_DOCUMENT = DocumentLayout((), whole_rows=True)


@dataclass(frozen=True)
class DocumentAttention:
    """Causal attention within each document of a batch.

    Attributes:
        groups: The documents; None if each row is one.
        ends: Those of the documents and paddings as sequences, if the device has a kernel for sequences.
    """

    groups: Groups | None
    ends: Ends | None = None

    def attend(self, attention: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Apply causal attention to each document.

        Args:
            attention: Maps tensors [G, heads, L, width] to one [G, heads, L, width].
            *tensors: The attention's inputs over the batch, [B, heads, T, width] each.

        Returns:
            The output over the batch, [B, heads, T, width]; zero on padding, unless each row is one document.
        """
        if self.groups is None:
            return attention(*tensors)
        batch, _, length, _ = tensors[0].shape
        flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors]
        gathered = zip(*(self.groups.gather(one) for one in flat), strict=True)
        outputs = [attention(*(one.transpose(1, 2) for one in of_group)).transpose(1, 2) for of_group in gathered]
        return self.groups.scatter(outputs, batch * length).unflatten(0, (batch, length)).transpose(1, 2)


def _group(starts: Tensor, lengths: Tensor) -> list[Tensor]:
    if not lengths.numel():
        return [starts.new_empty(0, 1)]
    groups = []
    order = torch.argsort(lengths, descending=True, stable=True)
    # Group by powers of two of the length: few groups, and no more padding than tokens.
    classes = torch.floor(torch.log2(lengths[order].double())).long()
    for size_class in classes.unique(sorted=True).flip(0):
        members = order[classes == size_class]
        offsets = torch.arange(int(lengths[members].max()))
        inside = offsets < lengths[members, None]
        groups.append(torch.where(inside, starts[members, None] + offsets, -1))
    return groups
