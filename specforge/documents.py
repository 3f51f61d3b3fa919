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
        lengths = torch.diff(starts, append=torch.tensor([ids.numel()]))
        real = ids.flatten()[starts] >= 0
        starts, lengths = starts[real], lengths[real]
        whole_rows = bool((begins & (ids >= 0)).sum() == ids.shape[0]) and bool((ids[:, 0] >= 0).all())
        groups = tuple(group.to(document_ids.device) for group in _group(starts, lengths))
        return cls(groups, whole_rows)

    def in_order(self, order: Tensor) -> Self:
        """Return where the same documents lie in one row [1, B * T] that holds the tokens in another order.

        Args:
            order: The token at each place, int64 [B * T].
        """
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order), device=order.device)
        groups = tuple(torch.where(group >= 0, place[group], -1) for group in self.groups)
        return type(self)(groups, whole_rows=False)

    def attend(self, attention: Callable[..., Tensor], queries: Sequence[Tensor], keys: Sequence[Tensor]) -> Tensor:
        """Apply causal attention to each document.

        Args:
            attention: Maps tensors [G, heads, L, width], first those of queries, to one [G, heads, L, width].
            queries: Its inputs over the batch that belong to queries, [B, heads, T, width] each; where the batch is
                one row, they may hold its first tokens alone.
            keys: Its inputs that belong to keys, [B, heads, T, width] each, of all tokens.

        Returns:
            The output at the queries, [B, heads, T, width]; zero on padding, except where rows are whole.
        """
        if self.whole_rows:
            return attention(*queries, *keys)
        batch, _, length, _ = queries[0].shape
        flat = [tensor.transpose(1, 2).flatten(0, 1) for tensor in (*queries, *keys)]
        places, outputs = [], []
        for group in self.groups:
            # What stands for a missing query is any other; what comes of it is left out.
            real = (group >= 0) & (group < batch * length)
            gathered = [tensor[group.clamp(0, len(tensor) - 1)].transpose(1, 2) for tensor in flat]
            outputs.append(attention(*gathered).transpose(1, 2)[real])
            places.append(group[real])
        packed = torch.cat(outputs)
        output = packed.new_zeros(batch * length, *packed.shape[1:]).index_copy(0, torch.cat(places), packed)
        return output.unflatten(0, (batch, length)).transpose(1, 2)


def _group(starts: Tensor, lengths: Tensor) -> list[Tensor]:
    if not lengths.numel():
        return [starts.new_empty(0, 1)]
    groups = []
    order = torch.argsort(lengths, descending=True, stable=True)
    # Group by powers of two of the length: few groups, and at most as much padding as tokens.
    classes = torch.floor(torch.log2(lengths[order].double())).long()
    for size_class in classes.unique(sorted=True).flip(0):
        members = order[classes == size_class]
        offsets = torch.arange(int(lengths[members].max()))
        inside = offsets < lengths[members, None]
        groups.append(torch.where(inside, starts[members, None] + offsets, -1))
    return groups
