"""Which rows go into a store, what of each, and in which shard: every process makes the same plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from hashlib import sha256
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from specforge.data.features.manifest import FeatureNeeds
from specforge.data.rows import TokenRows

SHARD_BYTES = 2**29  # what a killed run loses at most, and what is held in memory at once


@dataclass(frozen=True)
class Plan:
    """Which states of which rows go into a store, and how they are spread over shards.

    Attributes:
        sources: The rows; those with equal tokens are stored once.
        needs: What of them is read.
        token_bytes: Bytes of a token.
        shard_bytes: Bytes of a shard, about.
    """

    sources: Sequence[TokenRows]
    needs: FeatureNeeds
    token_bytes: int
    shard_bytes: int = SHARD_BYTES

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """Source and row in it of each row that is stored, int64 [rows, 2]."""
        return self._unique[0]

    @cached_property
    def kept(self) -> npt.NDArray[np.int64]:
        """Tokens of each row whose states are stored, int64 [rows]."""
        return self._unique[1]

    @cached_property
    def digests(self) -> npt.NDArray[np.uint64]:
        """Digests of the rows, uint64 [rows, 2]."""
        return self._unique[2]

    @cached_property
    def shards(self) -> list[range]:
        """Rows of each shard."""
        ends = np.cumsum(self.kept) * self.token_bytes
        cuts = np.searchsorted(ends, np.arange(self.shard_bytes, ends[-1], self.shard_bytes), side="right")
        bounds = np.unique([0, *cuts, len(self.kept)]).tolist()
        return [range(begin, end) for begin, end in pairwise(bounds)]

    @cached_property
    def identity(self) -> str:
        """Digest of the rows in their order, what is kept of each, and the shards."""
        bounds = np.array([[one.start, one.stop] for one in self.shards])
        return sha256(self.digests.tobytes() + self.kept.tobytes() + bounds.tobytes()).hexdigest()

    @property
    def row_tokens(self) -> int:
        """Tokens of all rows of the sources."""
        return int(sum(source.lengths.sum() for source in self.sources))

    @property
    def unique_tokens(self) -> int:
        """Tokens of the rows that are stored, whether or not their states are."""
        return int(sum(self.sources[source].lengths[row] for source, row in self.rows))

    def tokens(self, shard: range) -> list[npt.NDArray[np.int64]]:
        """Return the tokens of the rows of a shard, as far as their states are stored."""
        found = (self.sources[source][int(row)]["input_ids"].numpy() for source, row in self.rows[shard])
        return [tokens[:kept] for tokens, kept in zip(found, self.kept[shard], strict=True)]

    @cached_property
    def _unique(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        digests = np.concatenate([source.digests for source in self.sources])
        kept = np.concatenate([self.needs.kept(source.lengths, source.last_supervised) for source in self.sources])
        _, first, which = np.unique(digests, axis=0, return_index=True, return_inverse=True)
        longest = np.zeros(len(first), np.int64)
        np.maximum.at(longest, which.ravel(), kept)
        order = np.argsort(first)
        chosen = first[order]
        sizes = np.cumsum([len(source) for source in self.sources])
        source = np.searchsorted(sizes, chosen, side="right")
        places = np.stack([source, chosen - np.concatenate([[0], sizes])[source]], axis=1)
        return places, longest[order], digests[chosen]
