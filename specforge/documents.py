"""Where the documents of packed rows lie, for attention that never crosses a document and needs no mask.

Documents are gathered into right-padded groups of similar length, on which plain causal attention is exact: a real
query never sees the padding behind it. A group's longest document is at most twice its shortest, so that padding
costs less than the attention itself.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor


@dataclass(frozen=True)
class Queries:
    """Some tokens of a group of G documents, that attend to all of theirs.

    Attributes:
        places: int64 [G, Q] indices among the queries; -1 where a document has fewer.
        positions: Where they stand in their documents, int64 [G, Q].
    """

    places: Tensor
    positions: Tensor


@dataclass(frozen=True)
class DocumentLayout:
    """The documents of a packed batch, in groups of similar length.

    Attributes:
        groups: For each group, int64 [G, L] indices into the flattened [B * T] batch; -1 is padding.
        whole_rows: True when every row is one document that begins with the row, so that nothing need be gathered.
    """

    groups: tuple[Tensor, ...]
    whole_rows: bool

    @classmethod
    def of(cls, document_ids: Tensor) -> Self:
        """Find the documents of a batch.

        Args:
            document_ids: [B, T]; equal neighbours belong together, -1 is padding.
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
            The output over the batch, [B, heads, T, width]; zero on padding, except where rows are whole.
        """
        if self.whole_rows:
            return attention(*tensors)
        batch, _, length, _ = tensors[0].shape
        flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in tensors]
        outputs = [attention(*(_gather(tensor, group) for tensor in flat)) for group in self.groups]
        return _scatter(outputs, self.groups, batch * length).unflatten(0, (batch, length)).transpose(1, 2)

    def in_order(self, order: Tensor) -> Self:
        """Return where the same documents lie in one row [1, B * T] that holds the tokens in another order.

        Args:
            order: The token at each place, int64 [B * T].
        """
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        return type(self)(tuple(torch.where(group >= 0, place[group], -1) for group in self.groups), whole_rows=False)

    def first(self, count: int) -> list[Queries]:
        """Find the first so many tokens of the flattened batch in each group."""
        found = []
        for group in self.groups:
            chosen = (group >= 0) & (group < count)
            most = max(chosen.sum(1).tolist(), default=0)
            positions = chosen.byte().argsort(dim=1, descending=True, stable=True)[:, :most]
            places = torch.where(chosen.gather(1, positions), group.gather(1, positions), -1)
            found.append(Queries(places, positions))
        return found

    def gather(self, tensor: Tensor) -> list[Tensor]:
        """Take the tokens of a batch of one row [1, heads, T, width] to each group, [G, heads, L, width]."""
        flat = tensor[0].transpose(0, 1)
        return [_gather(flat, group) for group in self.groups]


def attend_at(
    queries: Sequence[Queries], attention: Callable[..., Tensor], query: Tensor, of_keys: Sequence[Sequence[Tensor]]
) -> Tensor:
    """Apply attention to each document of a batch of one row, at some of its tokens.

    Args:
        queries: These tokens, for each group.
        attention: Maps tensors [G, heads, Q, width] of the queries, those of a group of ``of_keys``, and the queries'
            positions in their documents, [G, Q], to one [G, heads, Q, width].
        query: Its input at n queries, [1, heads, n, width].
        of_keys: Its inputs at all tokens of each group.

    Returns:
        The output at the queries, [1, heads, n, width]; zero on padding.
    """
    flat = query[0].transpose(0, 1)
    outputs = [
        attention(_gather(flat, own.places), *keys, own.positions) for own, keys in zip(queries, of_keys, strict=True)
    ]
    return _scatter(outputs, [own.places for own in queries], len(flat)).transpose(0, 1)[None]


def _gather(tensor: Tensor, places: Tensor) -> Tensor:
    """Take rows of a tensor [n, heads, width] to [G, heads, L, width]; where there is none, any."""
    return tensor[places.clamp(min=0)].transpose(1, 2)


def _scatter(outputs: Sequence[Tensor], places: Sequence[Tensor], rows: int) -> Tensor:
    """Put outputs [G, heads, L, width] back to their rows, [rows, heads, width]; zero at the others."""
    real = [one >= 0 for one in places]
    packed = torch.cat([one.transpose(1, 2)[own] for one, own in zip(outputs, real, strict=True)])
    index = torch.cat([one[own] for one, own in zip(places, real, strict=True)])
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
