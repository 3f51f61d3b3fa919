"""Attention for training-time test, without a mask that grows with the square of the length.

At TTT step k, row t attends causally to the step-0 keys of its document and to its own key of each later step 1..k
(https://arxiv.org/abs/2503.01840, section 3.2). The obvious implementation is a mask of L x (k + 1) L. Here a kernel
attends to the step-0 keys (``specforge.models.chain.kernels``), and own keys are merged in
(``specforge.models.chain.merging``). A step runs only the rows that it needs (``specforge.models.draft_rows``); the
others are attended to.

Letters in shapes: N rows (a flattened batch), n rows that a step runs, D width of a head; G documents of a group, with
L slots for keys.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from specforge.documents import Groups
from specforge.models.chain.kernels import kernels_for
from specforge.models.chain.merging import Kernel, merged_attention
from specforge.models.draft_attention import DraftAttention
from specforge.models.draft_rows import DraftRows
from specforge.precision import computed

KeysAndValues = tuple[Tensor, Tensor]


class TrainingTimeTest:
    """Keys and values of the steps so far, by layer.

    Args:
        rows: The rows to run; each step runs its n rows as one row [1, n].
    """

    def __init__(self, rows: DraftRows) -> None:
        self._rows = rows
        self._planned: dict[Any, tuple[Groups, dict[int, Any]]] = {}
        self._first: dict[int, tuple[list[Tensor], list[Tensor]]] = {}
        self._later: dict[int, list[KeysAndValues]] = {}
        self._others: dict[int, KeysAndValues] = {}

    def at(self, step: int) -> TrainingTimeStep:
        """Return the attention of a step, counted from 0; use it after all earlier steps have run."""
        return TrainingTimeStep(self, step)

    def at_once(self) -> TrainingTimeSteps:
        """Return the attention of all steps in one pass through the layers."""
        return TrainingTimeSteps(self, self._rows.counts)

    def attend(
        self, step: int, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None
    ) -> Tensor:
        """Attend with the n rows of a step in one layer, after all earlier steps.

        Args:
            step: The step.
            layer: Index of the layer.
            query: [n, heads, D].
            key: [n, key-value heads, D].
            value: The same.
            scale: Factor of the logits.
            window: Number of last positions that a row sees, as in decoding: at step k, row t is k positions after its
                token; None for all.

        Returns:
            [n, heads, D].
        """
        (keys, values), later = self.record_step(step, layer, key, value)
        hidden = None if window is None else max(window - step, 0)
        own = later[-window:] if window is not None else later
        own_keys, own_values = [k for k, _ in own], [v for _, v in own]
        return merged_attention(self.kernel(query), query, keys, values, own_keys, own_values, scale, hidden)

    def kernel(self, query: Tensor) -> Kernel:
        """Return the kernel for queries of the first n rows, [n, heads, D]."""
        kernel: Kernel = self._plan(query)[1][len(query)]
        return kernel

    def record_others(self, layer: int, key: Tensor, value: Tensor) -> None:
        """Store keys and values of the rows after those that step 0 runs in a layer."""
        self._others[layer] = key, value

    def record_step(
        self, step: int, layer: int, key: Tensor, value: Tensor
    ) -> tuple[tuple[list[Tensor], list[Tensor]], list[KeysAndValues]]:
        """Store a layer's keys and values of a step, and return those of steps 0 .. step.

        Args:
            step: The step.
            layer: Index of the layer.
            key: Of the n rows that the step runs, [n, key-value heads, D].
            value: The same.

        Returns:
            First, step 0's keys and values of all rows, in the kernel's groups. Then, for each later step, those of the
            n rows that this step runs, [n, key-value heads, D].
        """
        # With recomputed activations, a step runs again after later ones.
        if step == 0:
            first = self._of_all(layer, key, value)
            self._first.setdefault(layer, first)
            return first, []
        known = self._later.setdefault(layer, [])
        if len(known) < step:
            known.append((key, value))
        rows = len(key)
        return self._first[layer], [*((k[:rows], v[:rows]) for k, v in known[: step - 1]), (key, value)]

    def _of_all(self, layer: int, key: Tensor, value: Tensor) -> tuple[list[Tensor], list[Tensor]]:
        """Gather the keys and values of all rows by group."""
        if layer in self._others:
            others = (one[0].transpose(0, 1).to(key.dtype) for one in self._others[layer])
            key, value = (torch.cat(both) for both in zip((key, value), others, strict=True))
        groups, _ = self._plan(key)
        return groups.gather(key), groups.gather(value)

    def _plan(self, like: Tensor) -> tuple[Groups, dict[int, Any]]:
        """Return where keys are, and the kernels by number of rows, for tensors like one."""
        kind = kernels_for(like)
        if kind not in self._planned:
            # At step 0, all layers but the last one run all rows.
            counts = {len(self._rows.order), *self._rows.counts}
            self._planned[kind] = kind.of(self._rows.documents, counts, like.device)
        return self._planned[kind]


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
        """Attend in one layer; arguments and result are those of ``DraftAttention.attend``."""
        query, key, value = (computed(one[0].transpose(0, 1)) for one in (query, key, value))
        return self.test.attend(self.step, layer, query, key, value, scale, window).transpose(0, 1)[None]


@dataclass(frozen=True)
class TrainingTimeSteps:
    """Attention of all steps in one pass through the layers, for networks whose steps read no state of another.

    The rows are those that each step runs, step by step; then those that only step 0 runs, except where a layer records
    their keys.

    Attributes:
        test: Keys and values by layer.
        counts: Number of rows of each step.
    """

    test: TrainingTimeTest
    counts: tuple[int, ...]

    @torch.compiler.disable
    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """Attend in one layer; arguments and result are those of ``DraftAttention.attend``."""
        rows = [computed(one[0].transpose(0, 1)) for one in (query, key, value)]
        parts = (one.split([*self.counts, len(one) - sum(self.counts)]) for one in rows)
        *steps, others = zip(*parts, strict=True)
        steps[0] = tuple(torch.cat(both) for both in zip(steps[0], others, strict=True))
        found = [self.test.attend(step, layer, q, k, v, scale, window) for step, (q, k, v) in enumerate(steps)]
        needed = self.counts[0]
        return torch.cat([found[0][:needed], *found[1:], found[0][needed:]]).transpose(0, 1)[None]


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
        attention: Attention of the rows before them; must run step 0.
        **options: Further arguments that the layer passes to the module, for these rows.
    """
    assert isinstance(attention, TrainingTimeStep | TrainingTimeSteps)
    module(states, attention_mask=None, draft_attention=_RecordKeysOnly(attention.test), **options)
