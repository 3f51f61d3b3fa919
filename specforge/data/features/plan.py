"""Which rows and tokens go into a feature store, and into which shard; every process makes the same plan."""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import sha256
from itertools import pairwise

import numpy as np
import numpy.typing as npt

from specforge.data.features.manifest import FeatureNeeds
from specforge.data.rows.reading import TokenRows

SHARD_BYTES = 2**29  # the most that a killed run loses, and what is held in memory at once


class ShardPlan:
    """Which states of which rows go into a store, and their split into shards.

    Args:
        sources: The rows. Rows with equal tokens are stored once, where they occur first.
        needs: Which of their states are read.
        token_bytes: Bytes per token.
        shard_bytes: Approximate bytes per shard.
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
        """Source index and row index within it of each stored row, int64 [rows, 2]."""
        self.kept: npt.NDArray[np.int64] = longest[order]
        """Number of leading tokens of each row whose states are stored, int64 [rows]."""
        self.digests: npt.NDArray[np.uint64] = digests[chosen]
        """Digests of the rows, uint64 [rows, 2]."""
        self.all_tokens = int(lengths.sum())
        """Number of tokens in all rows of the sources."""
        self.unique_tokens = int(lengths[chosen].sum())
        """Number of tokens in the stored rows, including tokens whose states are not stored."""
        ends = np.cumsum(self.kept) * token_bytes
        cuts = np.searchsorted(ends, np.arange(shard_bytes, ends[-1], shard_bytes), side="right")
        bounds = np.unique([0, *cuts, len(self.kept)])
        self.shards = [range(begin, end) for begin, end in pairwise(bounds.tolist())]
        """Row range of each shard."""
        self.identity = sha256(self.digests.tobytes() + self.kept.tobytes() + bounds.tobytes()).hexdigest()
        """Digest of the rows, their order, their stored lengths and the shard bounds."""

    def tokens(self, shard: range) -> list[npt.NDArray[np.int64]]:
        """Return the tokens with stored states of each row of a shard."""
        found = (self.sources[source][int(row)]["input_ids"].numpy() for source, row in self.rows[shard])
        return [tokens[:kept] for tokens, kept in zip(found, self.kept[shard], strict=True)]
