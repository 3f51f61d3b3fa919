"""Kernels of causal attention to the keys of documents (see ``specforge.models.chain.merging.Kernel``).

``Sequences`` is one call of FlashAttention over all documents, which torch has for CUDA devices and short dtypes.
``Blocks`` is for everything else: some hundred queries of a group of documents attend with a mask, to the keys up to
the last of them, so that no mask grows with the square of the length.

Letters in shapes: G documents of a group, with Q slots for queries and L for keys; D width of a head.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from specforge import flash
from specforge.documents import DocumentLayout, Groups
from specforge.flash import Ends
from specforge.models.chain.queries import Queries
from specforge.moving import moved
from specforge.private.torch import ATTENTION, ATTENTION_BACKWARD

# Small enough that few masked keys are computed, large enough for efficient matrix products.
QUERIES_PER_MASK = 128


@dataclass(frozen=True)
class Blocks:
    """Attention in blocks of queries with a mask; masks are not kept.

    Attributes:
        placed: The queries, in consecutive slots of their documents.
    """

    placed: Queries

    @classmethod
    def of(
        cls, documents: DocumentLayout, counts: Iterable[int], device: torch.device
    ) -> tuple[Groups, dict[int, Blocks]]:
        """Return where keys are, and the kernel of the first ``count`` rows for each count."""
        kernels = {count: cls(Queries.packed(documents, count)) for count in counts}
        return moved((Groups.of(documents.groups), kernels), device)

    @property
    def queries(self) -> Groups:
        """The rows, in slots."""
        return self.placed.groups

    def forward(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        scale: float,
        hidden: int | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Attend in each group."""
        outputs, logsumexps = [], []
        for index, (query, key, value) in enumerate(zip(queries, keys, values, strict=True)):
            output, logsumexp = torch.empty_like(query), query.new_empty(query.shape[:3], dtype=_wide(query))
            for slots, seen, bias in self._blocks(index, query, hidden):
                asked, seen_key, seen_value = _by_head(query[:, slots], key[:, seen], value[:, seen])
                found, sums = _attend(asked, seen_key, seen_value, bias, scale)
                output[:, slots], logsumexp[:, slots] = found.transpose(1, 2), sums.transpose(1, 2)
            outputs.append(output)
            logsumexps.append(logsumexp)
        return outputs, logsumexps

    def backward(
        self,
        gradients: Sequence[Tensor],
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        outputs: Sequence[Tensor],
        logsumexps: Sequence[Tensor],
        scale: float,
        hidden: int | None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the gradients of queries, keys and values of each group."""
        found: tuple[list[Tensor], list[Tensor], list[Tensor]] = ([], [], [])
        every = zip(gradients, queries, keys, values, outputs, logsumexps, strict=True)
        for index, (gradient, query, key, value, output, logsumexp) in enumerate(every):
            of_query, of_key, of_value = torch.empty_like(query), torch.zeros_like(key), torch.zeros_like(value)
            for slots, seen, bias in self._blocks(index, query, hidden):
                rows = _by_head(gradient[:, slots], query[:, slots], key[:, seen], value[:, seen], output[:, slots])
                own = _gradients((*rows, logsumexp[:, slots].transpose(1, 2)), bias, scale)
                of_query[:, slots] = own[0].transpose(1, 2)
                of_key[:, seen] += own[1].transpose(1, 2)
                of_value[:, seen] += own[2].transpose(1, 2)
            for several, one in zip(found, (of_query, of_key, of_value), strict=True):
                several.append(one)
        return found

    def _blocks(self, index: int, query: Tensor, hidden: int | None) -> Iterator[tuple[slice, slice, Tensor]]:
        """Yield slots of a group's queries, the keys up to the last one, and a summand of the logits."""
        positions, reach = self.placed.positions[index], self.placed.reach[index]
        hides, shows = query.new_full((), float("-inf")), query.new_zeros(())
        for begin in range(0, query.shape[1], QUERIES_PER_MASK):
            slots = slice(begin, begin + QUERIES_PER_MASK)
            length = reach[slots][-1]
            rows, keys = positions[:, None, slots, None], torch.arange(length, device=query.device)
            unseen = keys > rows if hidden is None else (keys > rows) | (keys <= rows - hidden)
            yield slots, slice(length), torch.where(unseen, hides, shows)


@dataclass(frozen=True)
class Sequences:
    """FlashAttention over all documents at once, each a sequence.

    A sequence's queries are its tokens from the first row that is run to its end; a causal mask is aligned there. What
    is not run in between is an empty slot.

    Attributes:
        queries: The rows, in the slots of one group.
        of_queries: The sequences of the slots.
        of_keys: Those of the keys.
    """

    queries: Groups
    of_queries: Ends
    of_keys: Ends

    @classmethod
    def of(
        cls, documents: DocumentLayout, counts: Iterable[int], device: torch.device
    ) -> tuple[Groups, dict[int, Sequences]]:
        """Return where keys are, and the kernel of the first ``count`` rows for each count."""
        every = [rows[rows >= 0] for group in documents.groups for rows in group]
        # Kernels take no empty batch.
        every = [rows for rows in every if len(rows)] or [torch.full((1,), -1)]
        kernels = {count: cls._of_first(every, count) for count in counts}
        return moved((Groups.of([torch.cat(every)[None]]), kernels), device)

    @classmethod
    def _of_first(cls, documents: list[Tensor], count: int) -> Sequences:
        asked = [_from_first(torch.where(rows < count, rows, -1)) for rows in documents]
        ends = (Ends.of(torch.tensor([len(rows) for rows in several])) for several in (asked, documents))
        return cls(Groups.of([torch.cat(asked)[None]]), *ends)

    def forward(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        scale: float,
        hidden: int | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Attend in the one group."""
        output, logsumexp = flash.attend(
            queries[0][0], keys[0][0], values[0][0], self.of_queries, self.of_keys, scale, hidden
        )
        return [output[None]], [logsumexp.T[None]]

    def backward(
        self,
        gradients: Sequence[Tensor],
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        outputs: Sequence[Tensor],
        logsumexps: Sequence[Tensor],
        scale: float,
        hidden: int | None,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
        """Return the gradients of queries, keys and values of the one group."""
        gradient, query, key, value, output = (one[0][0] for one in (gradients, queries, keys, values, outputs))
        sums, ends = logsumexps[0][0].T.contiguous(), (self.of_queries, self.of_keys)
        found = flash.gradients(gradient, query, key, value, output, sums, *ends, scale, hidden)
        of_queries, of_keys, of_values = ([one[None]] for one in found)
        return of_queries, of_keys, of_values


def kernels_for(query: Tensor) -> type[Blocks] | type[Sequences]:
    """Return the kernels for queries [..., D] of a dtype on a device."""
    return Sequences if flash.takes(query) else Blocks


def _is_fused(device: torch.device) -> bool:
    return device.type == "cpu"


def _from_first(rows: Tensor) -> Tensor:
    """Return rows from the first one that is not -1 on; at least the last one, since kernels take no empty sequence."""
    found = (rows[:-1] >= 0).nonzero()
    return rows[int(found[0]) if len(found) else -1 :]


def _attend(query: Tensor, key: Tensor, value: Tensor, bias: Tensor, scale: float) -> tuple[Tensor, Tensor]:
    """Attend by the CPU's kernel or by the formula; return output [G, heads, Q, D] and log-sum-exp [G, heads, Q]."""
    if _is_fused(query.device):
        output, logsumexp = ATTENTION(query, key, value, attn_mask=bias, scale=scale)
        return output, logsumexp
    logits = _logits(query, key, bias, scale)
    logsumexp = logits.logsumexp(-1)
    weights = (logits - logsumexp[..., None]).exp_().to(value.dtype)
    return (weights @ value[:, :, None]).flatten(1, 2), logsumexp.flatten(1, 2)


def _gradients(rows: tuple[Tensor, ...], bias: Tensor, scale: float) -> tuple[Any, ...]:
    """Return the gradients of query, key and value, by the CPU's kernel or by the formula.

    Args:
        rows: The output's gradient, query, key, value, output and log-sum-exp.
        bias: Summand of the logits.
        scale: Factor of the logits.
    """
    gradient, query, key, value, output, logsumexp = rows
    if _is_fused(query.device):
        return tuple(ATTENTION_BACKWARD(*rows, 0.0, False, attn_mask=bias, scale=scale))
    logits = _logits(query, key, bias, scale)
    asked, given = (one.unflatten(1, (key.shape[1], -1)) for one in (query, gradient))
    weights = (logits - logsumexp.view(*logits.shape[:4], 1)).exp_()
    of_weights = (given @ value[:, :, None].transpose(-1, -2)).to(weights.dtype)
    along = (gradient * output).sum(-1, dtype=weights.dtype).view(*logits.shape[:4], 1)
    of_logits = of_weights.sub_(along).mul_(weights).mul_(scale).to(query.dtype)
    of_query = (of_logits @ key[:, :, None]).flatten(1, 2)
    of_key = (of_logits.transpose(-1, -2) @ asked).sum(2)
    of_value = (weights.to(query.dtype).transpose(-1, -2) @ given).sum(2)
    return of_query, of_key, of_value


def _logits(query: Tensor, key: Tensor, bias: Tensor, scale: float) -> Tensor:
    """Return logits [G, key-value heads, heads that share one, Q, L] in at least float32."""
    grouped = query.unflatten(1, (key.shape[1], -1)).to(_wide(query))
    return (grouped @ key[:, :, None].to(_wide(query)).transpose(-1, -2)).mul_(scale).add_(bias[:, :, None])


def _by_head(*tensors: Tensor) -> tuple[Tensor, ...]:
    return tuple(one.transpose(1, 2) for one in tensors)


def _wide(tensor: Tensor) -> torch.dtype:
    return torch.promote_types(tensor.dtype, torch.float32)
