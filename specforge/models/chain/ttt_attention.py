"""Attention for training-time test, without a mask that grows with the square of the length.

At TTT step k, row t attends causally to the step-0 keys of its document and to its own key of each later step 1..k
(https://arxiv.org/abs/2503.01840, section 3.2). The obvious implementation is a mask of L x (k + 1) L. Here each later
step is one extra *selector* key, shared by all rows: a row carries its own logit for that step in an extra feature, the
selector is one-hot in that feature, and its value is also one-hot, so that the output contains the selector's softmax
weight. This weight times the row's own value is then added. Selectors precede the step-0 keys, so plain causal
attention lets every row see all of them; the selector of step 1 is last, so that the keys of step k are a view.

A step runs only the rows that it needs (``specforge.models.draft_rows``); the others are attended to. There are two
kernels, because their costs differ by device:

* On a CPU, a few hundred queries at a time attend with a mask, to the keys up to the last of them: the time grows with
  the number of queries.
* Accelerators have fast kernels for causal attention without a mask. Queries are placed at their keys, and slots
  without a query are wasted. A sliding window needs a mask there, too.

Letters in shapes: N rows (a flattened batch), n rows that a step runs, D width of a head; G documents of a group, with
Q slots for queries and L for keys.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge.documents import Groups
from specforge.models.chain.queries import Queries
from specforge.models.draft_attention import DraftAttention
from specforge.models.draft_rows import DraftRows
from specforge.models.masked_attention import masked_attention
from specforge.moving import moved

# On a CPU: small enough that few masked keys are computed, large enough for efficient matrix products.
QUERIES_PER_MASK = 256

KeysAndValues = tuple[Tensor, Tensor]


class TrainingTimeTest:
    """Keys and values of the steps so far, by layer.

    Args:
        rows: The rows to run; each step runs its n rows as one row [1, n].
    """

    def __init__(self, rows: DraftRows) -> None:
        documents, device = rows.documents, rows.order.device
        find = Queries.packed if _attends_by_masks(device) else Queries.at_their_keys
        # At step 0, all layers but the last one run all rows.
        queries = {count: find(documents, count) for count in {len(rows.order), *rows.counts}}
        self.keys, self.queries = moved((Groups.of(documents.groups), queries), device)
        self.later_steps = len(rows.counts) - 1
        self._first: dict[int, list[KeysAndValues]] = {}
        self._later: dict[int, list[KeysAndValues]] = {}
        self._others: dict[int, KeysAndValues] = {}

    def at(self, step: int) -> TrainingTimeStep:
        """Return the attention of a step, counted from 0; use it after all earlier steps have run."""
        return TrainingTimeStep(self, step)

    def record_others(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store keys and values of the rows after those that step 0 runs in a layer."""
        self._others[layer] = key, value

    def record_step(
        self, step: int, layer: int, key: Tensor, value: Tensor
    ) -> tuple[list[KeysAndValues], list[KeysAndValues]]:
        """Store a layer's keys and values of a step, and return those of steps 0 .. step.

        Returns:
            First, for each group of documents, step 0's keys and values of all rows, after the selectors of steps
            1 .. step. Then, for each later step, those of the n rows that this step runs, [1, key-value heads, n, D].
        """
        # With recomputed activations, a step runs again after later ones.
        if step == 0:
            first, later = self._with_selectors(layer, key, value), []
            self._first.setdefault(layer, first)
        else:
            first, known = self._first[layer], self._later.setdefault(layer, [])
            if len(known) < step:
                known.append((key, value))
            rows = key.shape[2]
            later = [*((k[:, :, :rows], v[:, :, :rows]) for k, v in known[: step - 1]), (key, value)]
        to_come = self.later_steps - step
        return [(keys[:, :, to_come:], values[:, :, to_come:]) for keys, values in first], later

    def _with_selectors(self, layer: int, key: Tensor, value: Tensor) -> list[KeysAndValues]:
        """Gather the keys and values of all rows by group, with every selector in front of them."""
        if layer in self._others:
            other_keys, other_values = self._others[layer]
            key, value = torch.cat([key, other_keys], dim=2), torch.cat([value, other_values], dim=2)
        number, width = self.later_steps, key.shape[3]
        extra = _extra_features(number, key.dtype)
        selector = torch.arange(number, device=key.device)
        found = []
        gathered = (self.keys.gather(one[0].transpose(0, 1)) for one in (key, value))
        for of_group in zip(*gathered, strict=True):
            keys, values = (F.pad(one.transpose(1, 2), (0, extra, number, 0)) for one in of_group)
            keys[:, :, number - 1 - selector, width + selector] = 1
            values[:, :, number - 1 - selector, width + selector] = 1
            if _is_short(key.dtype):
                keys[:, :, number - 1 - selector, width + number + selector] = 1
            found.append((keys, values))
        return found


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
        first, later = self.test.record_step(self.step, layer, key, value)
        width, groups = query.shape[3], key.shape[1]
        carrying = _carry(_own_logits(query, [own_key for own_key, _ in later]), query, self.test.later_steps)
        queries = self.test.queries[query.shape[2]]
        attention = partial(_selector_attention, steps=self.step, scale=scale, window=window)
        gathered = queries.groups.gather(carrying[0].transpose(0, 1))
        outputs = [
            attention(own.transpose(1, 2), *keys, positions, reach).transpose(1, 2)
            for own, keys, positions, reach in zip(gathered, first, queries.positions, queries.reach, strict=True)
        ]
        flat = queries.groups.scatter(outputs, query.shape[2])
        output = flat.transpose(0, 1)[None].unflatten(1, (groups, -1))
        attended = output[..., :width]
        for number, (_, own_value) in enumerate(later):
            attended = attended + output[..., width + number, None] * own_value[:, :, None]
        return attended.flatten(1, 2)


@dataclass(frozen=True)
class _RecordKeysOnly:
    """Stores keys and values instead of attending."""

    test: TrainingTimeTest

    @torch.compiler.disable
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        self.test.record_others(layer, key, value)
        return torch.zeros_like(query)


def record_keys(module: nn.Module, states: Tensor, attention: DraftAttention, **options: Any) -> None:
    """Compute a layer's keys and values of rows that it does not run, before it runs the rows before them.

    The attention module is the family's own, so its output projection also runs, on zeros and without a gradient.

    Args:
        module: The layer's attention module.
        states: The module's input for these rows, [1, N - n, H].
        attention: Attention of the rows before them; must be step 0.
        **options: Further arguments that the layer passes to the module, for these rows.
    """
    assert isinstance(attention, TrainingTimeStep) and attention.step == 0
    module(states, attention_mask=None, draft_attention=_RecordKeysOnly(attention.test), **options)


def _own_logits(query: Tensor, keys: list[Tensor]) -> list[Tensor]:
    """Multiply queries [1, heads, n, D] with each step's own keys [1, key-value heads, n, D], to [1, heads, n]."""
    # With short dtypes, the logits of the row's own keys must not be rounded before the softmax.
    wide = query.to(torch.promote_types(query.dtype, torch.float32))
    return [(wide.unflatten(1, (key.shape[1], -1)) * key[:, :, None]).sum(-1).flatten(1, 2) for key in keys]


def _is_short(dtype: torch.dtype) -> bool:
    return dtype.itemsize < 4


def _extra_features(number: int, dtype: torch.dtype) -> int:
    """Return the number of extra features of queries, keys and values for ``number`` selectors."""
    # Fused kernels want head sizes in multiples of 8.
    return -(-number * (1 + _is_short(dtype)) // 8) * 8


def _carry(logits: list[Tensor], query: Tensor, number: int) -> Tensor:
    """Append one logit per later step to queries [..., D], as features for ``number`` selectors.

    With short dtypes, as many further features carry the rounding remainders.
    """
    if not logits:
        return query
    exact = torch.stack(logits, dim=-1)
    high = exact.to(query.dtype)
    parts = [query, F.pad(high, (0, number - len(logits)))]
    if _is_short(query.dtype):
        parts.append((exact - high).to(query.dtype))
    together = torch.cat(parts, dim=-1)
    width = query.shape[-1] + _extra_features(number, query.dtype)
    return F.pad(together, (0, width - together.shape[-1]))


def _attends_by_masks(device: torch.device) -> bool:
    return device.type == "cpu"


def _selector_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor | None,
    reach: Sequence[int],
    *,
    steps: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Causal attention of some tokens of each document, with n selectors in front of the keys.

    Args:
        query: Queries, with extra features if there are selectors, [G, heads, Q, D or D + extra].
        key: Keys, [G, key-value heads, n + L, D + extra].
        value: Values, [G, key-value heads, n + L, D + extra].
        positions: See ``Queries``.
        reach: See ``Queries``.
        steps: Number n of selectors.
        scale: Factor of the logits.
        window: Sliding window over positions, or None.

    Returns:
        Attended step-0 values, then the weights of the n later steps, together as wide as the query.
    """
    key, value = key[..., : query.shape[3]], value[..., : query.shape[3]]
    slides = window is not None and window < key.shape[2]
    if positions is None and not slides:
        return _at_all_keys(query, key, value, steps, scale)
    if positions is None:
        positions = torch.arange(query.shape[2], device=query.device).expand(len(query), -1)
    return _in_blocks(query, key, value, positions, reach, steps, scale, window)


def _in_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    positions: Tensor,
    reach: Sequence[int],
    steps: int,
    scale: float,
    window: int | None,
) -> Tensor:
    """Attend in blocks of queries, with masks over the keys up to the block's last query, to avoid square masks."""
    if not positions.numel():
        return query
    outputs = []
    for begin in range(0, query.shape[2], QUERIES_PER_MASK):
        block = slice(begin, begin + QUERIES_PER_MASK)
        length = reach[block][-1]
        seen = slice(steps + length)
        visible = partial(_visible, positions[:, block], length, steps, window)
        outputs.append(masked_attention(query[:, :, block], key[:, :, seen], value[:, :, seen], visible, scale))
    return torch.cat(outputs, dim=2)


def _at_all_keys(query: Tensor, key: Tensor, value: Tensor, steps: int, scale: float) -> Tensor:
    """Attend without a mask, with a query at each key; the queries at the selectors are zero and dropped."""
    every = F.pad(query, (0, 0, steps, 0))
    attended = F.scaled_dot_product_attention(every, key, value, is_causal=True, scale=scale, enable_gqa=True)
    return attended[:, :, steps:]


def _visible(positions: Tensor, length: int, steps: int, window: int | None) -> Tensor:
    """Return which of n selectors and L step-0 keys the queries see, bool [G, 1, Q, n + L].

    At step n, row t is n positions after its token: with a sliding window it sees step-0 keys after t + n - window and
    the last ``window`` of its own later keys.
    """
    rows = positions[:, None, :, None]
    keys = torch.arange(-steps, length, device=positions.device)
    seen = keys <= rows
    if window is not None:
        # Selector -1 holds the key of step 1, selector -n that of step n.
        seen = seen & torch.where(keys < 0, keys < window - steps, keys > rows + steps - window)
    return seen
