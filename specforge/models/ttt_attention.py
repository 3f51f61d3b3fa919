"""Attention for training-time test, without a mask that grows with the square of the length.

At TTT step k, row t attends causally to the step-0 keys of its document and to its own key of each later step 1..k
(https://arxiv.org/abs/2503.01840, section 3.2). A mask of L x (k + 1) L would say so. Here each later step is one
extra *selector* key, shared by all rows: a row carries its own logit for that step in an extra feature, the selector is
one-hot in that feature, and its value is one-hot too, so that the output reports the weight which the softmax gave it.
The weight times the row's own value is then added. Selectors stand before the step-0 keys, so plain causal attention
lets every row see all of them.

A step runs the rows that are needed of it alone (``specforge.models.draft_rows``); the others are attended to. On a CPU
a few hundred queries at a time go by a mask of their own; accelerators are faster at all positions without one.

Letters in shapes: N rows (a flattened batch), n rows that a step runs, D width of a head.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import partial
from typing import TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

from specforge.documents import DocumentLayout
from specforge.models.draft_attention import DraftAttention
from specforge.models.draft_rows import DraftRows

# On a CPU: small enough that few keys are looked at in vain, large enough that each product is a large one.
QUERIES_PER_MASK = 256

KeysAndValues = tuple[Tensor, Tensor]
T = TypeVar("T")


class TrainingTimeTest:
    """Keys and values of the steps so far, by layer.

    Args:
        document_ids: Which document a token belongs to, -1 for padding, [B, T].
        rows: The rows that are run, in one row [1, n] each step.
    """

    def __init__(self, document_ids: Tensor, rows: DraftRows) -> None:
        self.layout = DocumentLayout.of(document_ids).in_order(rows.order)
        # At step 0, all layers but the last one run all rows.
        self.queries = {count: self.layout.first(count) for count in {len(rows.order), *rows.counts}}
        self._steps: dict[int, list[KeysAndValues]] = {}
        self._others: dict[int, KeysAndValues] = {}

    def at(self, step: int) -> TrainingTimeStep:
        """Return the attention of a step, 0 for the first one; all earlier ones have run before it is used."""
        return TrainingTimeStep(self, step)

    def leave(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Remember keys and values of the rows behind those that step 0 runs in a layer."""
        self._others[layer] = key, value

    def until(self, step: int, layer: int, key: Tensor, value: Tensor) -> list[KeysAndValues]:
        """Remember a layer's keys and values of a step, and return those of steps 0 .. step.

        Those of step 0 are of all rows, [1, key-value heads, N, D], those of later steps of the n that this one runs.
        """
        own = key, value
        if step == 0 and layer in self._others:
            other_keys, other_values = self._others[layer]
            own = torch.cat([key, other_keys], dim=2), torch.cat([value, other_values], dim=2)
        known = self._steps.setdefault(layer, [])
        # Where activations are recomputed, a step runs again when later ones have run already.
        if len(known) == step:
            known.append(own)
        if step == 0:
            return [own]
        rows = key.shape[2]
        return [known[0], *((k[:, :, :rows], v[:, :, :rows]) for k, v in known[1:step]), own]


@dataclass(frozen=True)
class TrainingTimeStep:
    """Attention of one step (see ``draft_attention`` for how layers call it).

    Attributes:
        test: Keys and values of the steps so far.
        step: Number of this step.
    """

    test: TrainingTimeTest
    step: int

    @torch.compiler.disable  # its lists grow from step to step, and layouts differ from batch to batch
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """Attend in one layer.

        Arguments and result are those of ``DraftAttention.attend``; the window counts positions, as in decoding.
        """
        (keys, values), *later = self.test.until(self.step, layer, key, value)
        repeats = query.shape[1] // key.shape[1]
        # In short types, the logits of the row's own keys must not be rounded before the softmax sees them.
        wide = query.to(torch.promote_types(query.dtype, torch.float32))
        own_logits = [(wide * k.repeat_interleave(repeats, dim=1)).sum(-1) for k, _ in later]
        carried = _high_and_low(own_logits, query)
        attention = partial(_selector_attention, scale=scale, window=window)
        queries = self.test.queries[query.shape[2]]
        output = self.test.layout.attend_at(queries, attention, [query, carried], [keys, values])
        attended = output[..., : query.shape[-1]]
        for number, (_, own_value) in enumerate(later):
            weight = output[..., query.shape[-1] + number, None]
            attended = attended + weight * own_value.repeat_interleave(repeats, dim=1)
        return attended


def run_first(run: Callable[[slice, DraftAttention], T], attention: DraftAttention, rows: int, wanted: int | None) -> T:
    """Run a layer for its first rows alone, where the others are only attended to.

    Args:
        run: Runs the layer on some of its rows, by the attention that is given.
        attention: What the rows see: at step 0 of training, where fewer than all rows are wanted.
        rows: How many rows there are.
        wanted: How many of them are wanted; None for all.

    Returns:
        What ``run`` returns for the first ones.
    """
    if wanted is not None and wanted < rows:
        assert isinstance(attention, TrainingTimeStep) and attention.step == 0
        with suppress(_KeysTaken):
            run(slice(wanted, rows), _KeysAlone(attention.test))
    return run(slice(wanted), attention)


@dataclass(frozen=True)
class _KeysAlone:
    """Takes the keys and values of rows in a layer, and leaves the layer before anything else is computed."""

    test: TrainingTimeTest

    @torch.compiler.disable
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        self.test.leave(layer, key, value)
        raise _KeysTaken


class _KeysTaken(Exception):
    """What is wanted of a layer has been computed."""


def _high_and_low(logits: list[Tensor], query: Tensor) -> Tensor:
    """Stack one logit a later step as features [..., 2n]; in short types, a second half carries the rounding rest."""
    if not logits:
        return query.new_zeros(*query.shape[:-1], 0)
    exact = torch.stack(logits, dim=-1)
    high = exact.to(query.dtype)
    low = (exact - high).to(query.dtype)
    return torch.cat([high, low], dim=-1)


def _selector_attention(
    query: Tensor, carried: Tensor, key: Tensor, value: Tensor, positions: Tensor, *, scale: float, window: int | None
) -> Tensor:
    """Causal attention of some tokens of each document, with selectors in front of the keys.

    Args:
        query: [G, heads, Q, D].
        carried: Own logits of n later steps as high and low halves, [G, heads, Q, 2n].
        key: [G, key-value heads, L, D].
        value: [G, key-value heads, L, D].
        positions: Where the queries stand among the L keys, int64 [G, Q].
        scale: Factor of the logits.
        window: Sliding window over positions, or None.

    Returns:
        [G, heads, Q, D + n]: attended step-0 values, then the weights of the n later steps.
    """
    width, steps = key.shape[3], carried.shape[3] // 2
    # Fused kernels want head sizes in multiples of 8.
    extra = -(-2 * steps // 8) * 8
    queries = F.pad(torch.cat([query, carried], dim=-1), (0, extra - 2 * steps))
    keys = F.pad(key, (0, extra, steps, 0))
    values = F.pad(value, (0, extra, steps, 0))
    if steps:
        selector = torch.arange(steps, device=key.device)
        keys[:, :, selector, width + selector] = 1
        keys[:, :, selector, width + steps + selector] = 1
        values[:, :, selector, width + selector] = 1
    attend = partial(F.scaled_dot_product_attention, scale=scale, enable_gqa=True)
    is_short = window is not None and window < keys.shape[2]
    kernel = _in_blocks if query.device.type == "cpu" or is_short else _at_all_positions
    return kernel(attend, queries, keys, values, positions, steps, window)[..., : width + steps]


def _in_blocks(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    steps: int,
    window: int | None,
) -> Tensor:
    """Attend some queries at a time, by masks over the keys up to the last of them: nothing is square."""
    if not positions.numel():
        return query
    outputs = []
    for some, own in zip(query.split(QUERIES_PER_MASK, 2), positions.split(QUERIES_PER_MASK, 1), strict=True):
        length = int(own.max()) + 1
        seen = slice(steps + length)
        mask = _visible(own, length, steps, window)[:, None]
        outputs.append(attend(some, key[:, :, seen], value[:, :, seen], attn_mask=mask))
    return torch.cat(outputs, dim=2)


def _at_all_positions(
    attend: Callable[..., Tensor],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    steps: int,
    window: int | None,
) -> Tensor:
    """Attend at every key's position without a mask, as the fastest kernels of accelerators do, and keep the queries'.

    Rows in front of the first position stand where the selectors do, and rows without a query are zero.
    """
    index = (steps + positions)[:, None, :, None].expand_as(query)
    every = query.new_zeros(*query.shape[:2], *key.shape[2:]).scatter(2, index, query)
    return attend(every, key, value, is_causal=True).gather(2, index)


def _visible(positions: Tensor, length: int, steps: int, window: int | None) -> Tensor:
    """Return what queries see of n selectors and L step-0 keys, bool [G, Q, n + L].

    At step n, row t stands n positions behind its token: with a sliding window it sees step-0 keys after
    t + n - window and, of its own later keys, the last ``window``.
    """
    rows = positions[..., None]
    keys = torch.arange(-steps, length, device=positions.device)
    seen = keys <= rows
    if window is not None:
        # Selector -n holds the key of step 1, selector -1 that of step n.
        seen = seen & torch.where(keys < 0, keys >= -window, keys > rows + steps - window)
    return seen
