"""Where the documents of packed rows are, for attention that never crosses a document and needs no mask.

Documents are gathered into right-padded groups of similar length, on which plain causal attention is exact: a real
query never sees the padding after it. A group's longest document is at most twice its shortest, so padding costs less
than the attention itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Queries:
    """Query tokens of a group of G documents; each attends to its whole document.

    Attributes:
        indices: int64 [G, Q] indices among the queries; -1 if a document has fewer.
        positions: Their positions within the documents, int64 [G, Q].
    """

    indices: Tensor
    positions: Tensor


@dataclass(frozen=True)
class DocumentLayout:
    """The documents of a packed batch, in groups of similar length.

    Attributes:
        groups: For each group, int64 [G, L] indices into the flattened [B * T] batch; -1 is padding.
        whole_rows: True if every row is one document that begins with the row, so nothing needs to be gathered.
    """

    groups: tuple[Tensor, ...]
    whole_rows: bool

    @classmethod
    def of(cls, document_ids: Tensor) -> Self:
        """Find the documents of a batch.

        Args:
            document_ids: [B, T]; equal neighbours are one document, -1 is padding.
        """
        ids = document_ids.cpu()
        begins = torch.ones_like(ids, dtype=torch.bool)
        begins[:, 1:] = ids[:, 1:] != ids[:, :-1]
        starts = begins.flatten().nonzero().squeeze(1)
        lengths = torch.diff(starts, append=starts.new_tensor([ids.numel()]))
        real = ids.flatten()[starts] >= 0
        starts, lengths = starts[real], lengths[real]
        whole_rows = bool((begins & (ids >= 0)).sum() == ids.shape[0]) and bool((ids[:, 0] >= 0).all())
        groups = tuple(group.to(document_ids.device) for group in _group(starts, lengths))
        return cls(groups, whole_rows)

    def attend(self, attention: Callable[..., Tensor], *tensors: Tensor) -> Tensor:
        """Apply causal attention to each document.

        Args:
            attention: Maps tensors [G, heads, L, width] to one [G, heads, L, width].
            *tensors: Its inputs over the batch, [B, heads, T, width] each.

        Returns:
            The output over the batch, [B, heads, T, width]; zero on padding, unless rows are whole documents.
        """
        if self.whole_rows:
            return attention(*tensors)
        batch, _, length, _ = tensors[0].shape
        flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors]
        outputs = [attention(*(_gather(tensor, group) for tensor in flat)) for group in self.groups]
        return _scatter(outputs, self.groups, batch * length).unflatten(0, (batch, length)).transpose(1, 2)

    def reordered(self, order: Tensor) -> Self:
        """Return the layout of the same documents in one row [1, B * T] that holds the tokens in another order.

        Args:
            order: The old index of the token at each new index, int64 [B * T].
        """
        index = torch.empty_like(order)
        index[order] = torch.arange(len(order), device=order.device)
        return type(self)(tuple(torch.where(group >= 0, index[group], -1) for group in self.groups), whole_rows=False)

    def queries_of_first(self, count: int) -> list[Queries]:
        """Find the first ``count`` tokens of the flattened batch in each group."""
        found = []
        for group in self.groups:
            chosen = (group >= 0) & (group < count)
            most = max(chosen.sum(1).tolist(), default=0)
            positions = chosen.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
            indices = torch.where(chosen.gather(1, positions), group.gather(1, positions), -1)
            found.append(Queries(indices, positions))
        return found

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Gather the tokens of a batch of one row [1, heads, T, width] into each group, [G, heads, L, width]."""
        flat = tensor[0].transpose(0, 1)
        return [_gather(flat, group) for group in self.groups]


def attend_at(
    queries: Sequence[Queries], attention: Callable[..., Tensor], query: Tensor, keys: Sequence[Sequence[Tensor]]
) -> Tensor:
    """Apply attention to each document of a batch of one row, for some of its tokens as queries.

    Args:
        queries: The query tokens of each group.
        attention: Maps the queries [G, heads, Q, width], the tensors of the group's ``keys``, and the queries'
            positions within their documents, [G, Q], to one [G, heads, Q, width].
        query: Its input at n queries, [1, heads, n, width].
        keys: Its inputs at all tokens of each group.

    Returns:
        The output at the queries, [1, heads, n, width]; zero on padding.
    """
    flat = query[0].transpose(0, 1)
    outputs = [
        attention(_gather(flat, own.indices), *group, own.positions) for own, group in zip(queries, keys, strict=True)
    ]
    return _scatter(outputs, [own.indices for own in queries], len(flat)).transpose(0, 1)[None]


def _gather(tensor: Tensor, indices: Tensor) -> Tensor:
    """Gather rows of a tensor [n, heads, width] to [G, heads, L, width]; padding reads row 0, callers discard it."""
    return tensor[indices.clamp(min=0)].transpose(1, 2)


def _scatter(outputs: Sequence[Tensor], indices: Sequence[Tensor], rows: int) -> Tensor:
    """Scatter outputs [G, heads, L, width] back to their rows, [rows, heads, width]; the other rows are zero."""
    real = [one >= 0 for one in indices]
    packed = torch.cat([one.transpose(1, 2)[own] for one, own in zip(outputs, real, strict=True)])
    index = torch.cat([one[own] for one, own in zip(indices, real, strict=True)])
    return packed.new_zeros(rows, *packed.shape[1:]).index_copy(0, index, packed)


def _group(starts: Tensor, lengths: Tensor) -> list[Tensor]:
    if not lengths.numel():
        return [starts.new_empty(0, 1)]
    groups = []
    order = torch.argsort(lengths, descending=True, stable=True)
    # Group by powers of two of the length: few groups, and at most as much padding as tokens.
    classes = torch.floor(torch.log2(lengths[order].double())).long()
    for size_class in classes.unique(sorted=True).flip(0):
        members = order[classes == size_class]
        offsets = torch.arange(int(lengths[members].max()), device=lengths.device)
        inside = offsets < lengths[members, None]
        groups.append(torch.where(inside, starts[members, None] + offsets, -1))
    return groups
