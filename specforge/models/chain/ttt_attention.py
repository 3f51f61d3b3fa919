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
        """Attend in one layer.

        Arguments and result are those of ``DraftAttention.attend``; the window counts positions, as in decoding: at
        step k, row t is k positions after its token.
        """
        query, key, value = (computed(one[0].transpose(0, 1)) for one in (query, key, value))
        (keys, values), later = self.test.record_step(self.step, layer, key, value)
        hidden = None if window is None else max(window - self.step, 0)
        own = later[-window:] if window is not None else later
        attended = merged_attention(
            self.test.kernel(query), query, keys, values, [k for k, _ in own], [v for _, v in own], scale, hidden
        )
        return attended.transpose(0, 1)[None]


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
