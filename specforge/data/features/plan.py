"""Which rows go into a store, what of each, and in which shard: every process makes the same plan."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from specforge.data.features.manifest import FeatureNeeds
from specforge.data.rows.reading import TokenRows

SHARD_BYTES = 2**29  # what a killed run loses at most, and what is held in memory at once


class ShardPlan:
    """Which states of which rows go into a store, and how they are spread over shards.

    Args:
        sources: The rows; those with equal tokens are stored once, at their first place.
        needs: What of them is read.
        token_bytes: Bytes of a token.
        shard_bytes: Bytes of a shard, about.
    """

    def __init__(
        self, sources: Sequence[TokenRows], needs: FeatureNeeds, token_bytes: int, shard_bytes: int = SHARD_BYTES
    ) -> None:
        self.sources = sources
        digests = np.concatenate([source.digests for source in sources])
        lengths = np.concatenate([source.lengths for source in sources])
        kept = np.concatenate([needs.kept(source.lengths, source.last_supervised) for source in sources])
        _, first, which = np.unique(digests, axis=0, return_index=True, return_inverse=True)
        longest = np.zeros(len(first), np.int64)
        np.maximum.at(longest, which.ravel(), kept)
        order = np.argsort(first)
        chosen = first[order]
        begins = np.cumsum([0, *map(len, sources)])
        source = np.searchsorted(begins, chosen, side="right") - 1
        self.rows = np.stack([source, chosen - begins[source]], axis=1)
        """Source, and row in it, of each row that is stored, int64 [rows, 2]."""
        self.kept: npt.NDArray[np.int64] = longest[order]
        """Tokens of each row whose states are stored, int64 [rows]."""
        self.digests: npt.NDArray[np.uint64] = digests[chosen]
        """Digests of the rows, uint64 [rows, 2]."""
        self.all_tokens = int(lengths.sum())
        """Tokens of all rows of the sources."""
        self.unique_tokens = int(lengths[chosen].sum())
        """Tokens of the rows that are stored, whether or not their states are."""
        ends = np.cumsum(self.kept) * token_bytes
        cuts = np.searchsorted(ends, np.arange(shard_bytes, ends[-1], shard_bytes), side="right")
        bounds = np.unique([0, *cuts, len(self.kept)])
        self.shards = [range(begin, end) for begin, end in pairwise(bounds.tolist())]
        """Rows of each shard."""
        self.identity = sha256(self.digests.tobytes() + self.kept.tobytes() + bounds.tobytes()).hexdigest()
        """Digest of the rows in their order, of what is kept of each, and of the shards."""

    def tokens(self, shard: range) -> list[npt.NDArray[np.int64]]:
        """Return the tokens of the rows of a shard, as far as their states are stored."""
        found = (self.sources[source][int(row)]["input_ids"].numpy() for source, row in self.rows[shard])
        return [tokens[:kept] for tokens, kept in zip(found, self.kept[shard], strict=True)]
