"""States computed by a running verifier, on packed rows so that little of a forward pass is padding."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from specforge.data.features.plan import ShardPlan
from specforge.data.packing import pack


@dataclass(frozen=True)
class LiveStates:
    """States computed by verifier forward passes.

    Attributes:
        run: Maps tokens and positions, [B, T] each, to states [B, T, L, H]; positions that restart at 0 begin a
            document.
        batch_tokens: Tokens per forward pass; a longer row gets its own pass.
    """

    run: Callable[[Tensor, Tensor], Tensor]
    batch_tokens: int

    def __call__(self, plan: ShardPlan, shard: range) -> Iterator[tuple[int, Tensor]]:
        """Yield the number and states [T, L, H] of each row of a shard, longest first."""
        rows = plan.tokens(shard)
        lengths = np.array([len(row) for row in rows])
        longest = int(lengths.max())
        bins = pack(lengths, longest)
        bins_per_pass = max(1, self.batch_tokens // longest)
        for begin in range(0, len(bins), bins_per_pass):
            batch = bins[begin : begin + bins_per_pass]
            ids = [torch.from_numpy(np.concatenate([rows[row] for row in one])) for one in batch]
            positions = [torch.cat([torch.arange(lengths[row]) for row in one]) for one in batch]
            states = self.run(pad_sequence(ids, batch_first=True), pad_sequence(positions, batch_first=True))
            for packed, one in zip(states, batch, strict=True):
                sizes = lengths[one].tolist()
                yield from zip(one, packed[: sum(sizes)].split(sizes), strict=True)
