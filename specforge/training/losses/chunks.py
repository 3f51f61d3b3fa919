"""Splits the pairs of row and step that count into chunks of rows, each row with all its steps.

A chunk holds few enough logits to fit into memory, and whole chains, so that a loss can weight a step by the results of
the steps before it. Consecutive rows of a text share targets, so neighbouring chunks share up to S - 1.

Letters in shapes: S steps, N rows (a flattened batch), R rows and C targets of a chunk, M pairs that count.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextvars import ContextVar
from dataclasses import dataclass, replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from specforge.moving import moved

# Logits of one chunk, draft and verifier together: 16 MiB in float32, but enough targets that heads are not read again
# for a handful of rows. Accelerators read a head in the time of about 200 rows of its product, and hold 16 times more.
LOGITS_PER_CHUNK = 2**22
LOGITS_PER_CHUNK_OF_ACCELERATORS = 2**26
# Kernels copy no logits: 512 MiB in bfloat16, and the heads' gradients are added to less often.
LOGITS_PER_FUSED_CHUNK = 2**28
LEAST_TARGETS = 64
# Logits that a CPU compares at a time: 1 MiB in float32.
LOGITS_PER_BLOCK = 2**18
# Set if a step for an accelerator is simulated on the CPU.
for_accelerator: ContextVar[bool] = ContextVar("for_accelerator", default=False)


@dataclass(frozen=True)
class Chunk:
    """Some rows, all their pairs of row and step that count, and the targets of these pairs.

    Attributes:
        targets: Rows of the verifier's states, ascending, [C].
        shared: Number of first targets that are also the last ones of the previous chunk.
        steps: Step of each pair, ascending, [M].
        rows: Row of each pair, [M].
        state_of: Index of each pair's state in the input of the draft's head, [M].
        target_of: Index of each pair's target within ``targets``, [M].
        row_of: Index of each pair's row within the chunk, [M].
        size: Number R of rows.
        by_step: Number of pairs of each step.
    """

    targets: Tensor
    shared: int
    steps: Tensor
    rows: Tensor
    state_of: Tensor
    target_of: Tensor
    row_of: Tensor
    size: int
    by_step: tuple[int, ...]

    def part(self, pairs: slice) -> Chunk:
        """Return a chunk of some of the pairs, with all targets."""
        by_pair = ("steps", "rows", "state_of", "target_of", "row_of")
        return replace(self, **{name: getattr(self, name)[pairs] for name in by_pair})

    def by_head(self, heads: int) -> list[slice]:
        """Return the pairs of each head: all pairs for a single head, one step's pairs for each of several."""
        if heads == 1:
            return [slice(len(self.steps))]
        return [slice(*ends) for ends in pairwise(accumulate(self.by_step, initial=0))]


def chunks(
    supervised: Tensor,
    targets: Tensor,
    state_index: Tensor,
    verifier_size: int,
    draft_size: int,
    device: torch.device,
    copies: bool = True,
) -> list[Chunk]:
    """Split all pairs that count into chunks of rows. The arguments are on the CPU, the chunks on the device.

    Args:
        supervised: Which rows count, bool [S, N].
        targets: Row of the verifier's states that each row and step is compared with, int64 [S, N].
        state_index: Index of each row's and step's state in the input of the draft's head, int64 [S, N].
        verifier_size: Number of the verifier's tokens.
        draft_size: Number of draft tokens.
        device: Device of the states.
        copies: Whether logits are copied in float32; kernels copy none.
    """
    rows, steps = supervised.T.nonzero(as_tuple=True)
    distinct, row_of = rows.unique_consecutive(return_inverse=True)
    if not len(distinct):
        return []
    every, target_of = targets[steps, rows].unique(return_inverse=True)
    count = len(supervised)
    size = _rows_per_chunk(
        len(distinct), len(every), verifier_size, count * draft_size, _logits_per_chunk(device, copies)
    )
    number, chunk_of = -(-len(distinct) // size), row_of // size
    # A chunk has all targets between its first and last one, even if only a neighbour needs some of them.
    first = target_of.new_full((number,), len(every)).scatter_reduce(0, chunk_of, target_of, "amin")
    last = target_of.new_zeros(number).scatter_reduce(0, chunk_of, target_of, "amax")
    # Within a chunk, pairs are in the order of their steps, so that each head reads one slice.
    group = chunk_of * count + steps
    order = group.argsort(stable=True)
    by_pair = [steps, rows, state_index[steps, rows], target_of - first[chunk_of], row_of % size]
    every, by_pair = moved((every, [one[order] for one in by_pair]), device)
    by_step = group.bincount(minlength=number * count).view(number, count)
    sizes = by_step.sum(1).tolist()
    bounds = zip(first.tolist(), (last + 1).tolist(), by_step.tolist(), strict=True)
    found = []
    begin = before = known = 0
    for index, (low, high, own) in enumerate(bounds):
        steps, rows, state_of, target_of, row_of = (one[begin : begin + sizes[index]] for one in by_pair)
        shared = known - low if before <= low <= known <= high else 0
        left = len(distinct) - index * size
        found.append(
            Chunk(every[low:high], shared, steps, rows, state_of, target_of, row_of, min(size, left), tuple(own))
        )
        begin, before, known = begin + sizes[index], low, high
    return found


def blocks(logits: Tensor) -> Iterator[slice]:
    """Split rows of logits into blocks that fit into a processor's cache.

    There is at least one block; it may be empty.
    """
    size = max(1, LOGITS_PER_BLOCK // logits.shape[1]) if _is_for_cpu(logits.device) else len(logits)
    return (slice(begin, begin + size) for begin in range(0, max(1, len(logits)), max(1, size)))


def _rows_per_chunk(rows: int, targets: int, verifier_size: int, draft_logits: int, most: int) -> int:
    """Return the maximum number of rows of a chunk.

    Args:
        rows: Number of all rows.
        targets: Number of all targets: about one per consecutive row, S per row if no targets are shared.
        verifier_size: Number of the verifier's logits for each target.
        draft_logits: Largest number of draft logits of a row.
        most: Logits that a chunk may hold, draft and verifier together.
    """
    targets_per_row = targets / rows
    return max(1, int(LEAST_TARGETS / targets_per_row), int(most / (verifier_size * targets_per_row + draft_logits)))


def _logits_per_chunk(device: torch.device, copies: bool) -> int:
    if not copies:
        return LOGITS_PER_FUSED_CHUNK
    return LOGITS_PER_CHUNK if _is_for_cpu(device) else LOGITS_PER_CHUNK_OF_ACCELERATORS


def _is_for_cpu(device: torch.device) -> bool:
    return device.type == "cpu" and not for_accelerator.get()
