"""Attention to two sets of keys as one operation: those of the documents, and each row's own.

A softmax over two sets is the merge of both by their log-sum-exps. A kernel attends to the documents' keys; its
gradient is computed with the merged output and the merged log-sum-exp, so that the probabilities that it recomputes are
those of the complete softmax (as in ring attention, https://arxiv.org/abs/2310.01889).

Letters in shapes: n rows, S own keys of each row, D width of a head, g heads that share a key-value head.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from specforge.documents import Groups

# Log-sum-exp of rows outside all documents: their own keys get no weight, and their output stays zero.
_NOWHERE = 1e30


class Kernel(Protocol):
    """Attention of some rows to the keys of their documents.

    Attributes:
        queries: The rows, in slots.
    """

    @property
    def queries(self) -> Groups:
        """The rows, in slots; an empty slot has a zero query and a zero gradient."""

    def forward(
        self,
        queries: Sequence[Tensor],
        keys: Sequence[Tensor],
        values: Sequence[Tensor],
        scale: float,
        hidden: int | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """Attend in each group.

        Args:
            queries: [G, Q, heads, D] of each group.
            keys: [G, L, key-value heads, D] of each group.
            values: The same.
            scale: Factor of the logits.
            hidden: Distance from which on a row does not see a key before it; None if it sees all before it.

        Returns:
            The outputs, [G, Q, heads, D], and log-sum-exps, [G, Q, heads] in at least float32, of each group.
        """

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
        """Return the gradients of queries, keys and values of each group, from those of the outputs."""


def merged_attention(
    kernel: Kernel,
    query: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    own_keys: Sequence[Tensor],
    own_values: Sequence[Tensor],
    scale: float,
    hidden: int | None = None,
) -> Tensor:
    """Attend to the keys of the documents and to own keys.

    Args:
        kernel: Attends to the documents' keys.
        query: [n, heads, D].
        keys: The documents' keys in the kernel's groups, [G, L, key-value heads, D] each.
        values: The same.
        own_keys: Further keys of the rows, [n, key-value heads, D] each.
        own_values: The same.
        scale: Factor of the logits.
        hidden: See ``Kernel.forward``; 0 if the rows see only their own keys.

    Returns:
        [n, heads, D]; zero at rows that are in no document.
    """
    parts = len(keys), len(own_keys)
    tensors = *keys, *values, *own_keys, *own_values
    return cast(Tensor, _Merged.apply(query, kernel, scale, hidden, parts, *tensors))


class _Merged(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        kernel: Kernel,
        scale: float,
        hidden: int | None,
        parts: tuple[int, int],
        *tensors: Tensor,
    ) -> Tensor:
        keys, values, own_keys, own_values = _split(tensors, parts)
        output, logsumexp = _of_documents(kernel, query, keys, values, scale, hidden)
        if own_keys:
            logits = _own_logits(query, own_keys, scale)
            total = torch.cat([logsumexp[..., None], logits.flatten(1, 2)], dim=-1).logsumexp(-1)
            weights = _own_weights(logits, total).to(query.dtype)
            kept = (logsumexp - total).exp_().to(query.dtype)[..., None]
            output = (output * kept).view_as(query) + (weights @ _stacked(own_values)).flatten(1, 2)
            logsumexp = total
        ctx.save_for_backward(query, output, logsumexp, *tensors)
        ctx.rest = kernel, scale, hidden, parts
        return output

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Any, ...]:
        kernel, scale, hidden, parts = ctx.rest
        query, output, logsumexp, *tensors = ctx.saved_tensors
        keys, values, own_keys, own_values = _split(tensors, parts)
        gradient = gradient.contiguous()
        if hidden == 0:
            of_query, *found = (torch.zeros_like(one) for one in (query, *keys, *values))
        else:
            groups = kernel.queries
            rows = [groups.gather(one) for one in (gradient, query, output, logsumexp)]
            of_queries, of_keys, of_values = kernel.backward(
                rows[0], rows[1], keys, values, rows[2], rows[3], scale, hidden
            )
            of_query, found = groups.scatter(of_queries, len(query)), [*of_keys, *of_values]
        if own_keys:
            logits = _own_logits(query, own_keys, scale)
            weights = _own_weights(logits, logsumexp)
            grouped = gradient.unflatten(1, (own_keys[0].shape[1], -1))
            along = (gradient * output).sum(-1, dtype=logsumexp.dtype).view(*grouped.shape[:3], 1)
            of_weights = (grouped @ _stacked(own_values).transpose(-1, -2)).to(weights.dtype)
            of_logits = (of_weights.sub_(along).mul_(weights).mul_(scale)).to(query.dtype)
            of_query += (of_logits @ _stacked(own_keys)).flatten(1, 2)
            found += (of_logits.transpose(-1, -2) @ query.view_as(grouped)).unbind(2)
            found += (weights.to(query.dtype).transpose(-1, -2) @ grouped).unbind(2)
        return of_query, None, None, None, None, *found


def _of_documents(
    kernel: Kernel, query: Tensor, keys: Sequence[Tensor], values: Sequence[Tensor], scale: float, hidden: int | None
) -> tuple[Tensor, Tensor]:
    """Return the output [n, heads, D] and log-sum-exp [n, heads] of the documents' keys."""
    wide = torch.promote_types(query.dtype, torch.float32)
    logsumexp = query.new_full(query.shape[:2], _NOWHERE, dtype=wide)
    groups = kernel.queries
    if hidden == 0:
        logsumexp[groups.rows] = float("-inf")
        return torch.zeros_like(query), logsumexp
    outputs, found = kernel.forward(groups.gather(query), keys, values, scale, hidden)
    flat = torch.cat([one.flatten(0, 1) for one in found])
    filled = flat if groups.slots is None else flat.index_select(0, groups.slots)
    return groups.scatter(outputs, len(query)), logsumexp.index_copy_(0, groups.rows, filled.to(wide))


def _own_logits(query: Tensor, keys: Sequence[Tensor], scale: float) -> Tensor:
    """Return the logits of the rows' own keys, [n, key-value heads, g, S], in at least float32."""
    # They must not be rounded before the softmax, which the kernel computes in float32, too.
    wide = torch.promote_types(query.dtype, torch.float32)
    grouped = query.to(wide).unflatten(1, (keys[0].shape[1], -1))
    return (grouped @ _stacked(keys).to(wide).transpose(-1, -2)).mul_(scale)


def _own_weights(logits: Tensor, logsumexp: Tensor) -> Tensor:
    return (logits - logsumexp.view(*logits.shape[:3], 1)).exp_()


def _stacked(own: Sequence[Tensor]) -> Tensor:
    """Stack keys or values of each step, [n, key-value heads, S, D]."""
    return torch.stack(list(own), dim=2)


def _split(tensors: Sequence[Tensor], parts: tuple[int, int]) -> tuple[list[Tensor], ...]:
    groups, own = parts
    ends = (groups, 2 * groups, 2 * groups + own, 2 * groups + 2 * own)
    return tuple(list(tensors[begin:end]) for begin, end in zip((0, *ends[:-1]), ends, strict=True))
