"""Key-value cache of sequences that grow by trees of tokens, of which one path is kept.

A row of the cache holds a sequence's committed tokens, then *pending* nodes: undecided tokens, each with a parent. A
node sees the committed tokens of its row, its ancestors and itself. ``keep`` commits a path and drops the other nodes.
Rows may have different lengths: slots after a row's committed tokens are never seen.

Letters in shapes: B rows, Q new nodes, P pending nodes, S slots, A kept nodes, D head width.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import DynamicCache


def ancestors_of(parents: Tensor) -> Tensor:
    """Return which nodes are on the path to each node, including itself, bool [B, P, P].

    Args:
        parents: Parent of each node, int64 [B, P]; -1 for none.
    """
    nodes = torch.arange(parents.shape[1], device=parents.device)
    paths = ((parents[..., None] == nodes) | (nodes[:, None] == nodes)).float()
    reach = 1
    # Each squaring doubles the number of generations that a path covers.
    while reach < parents.shape[1]:
        paths = (paths @ paths).clamp(max=1)
        reach *= 2
    return paths.bool()


class TreeCache(DynamicCache):
    """A transformers cache of B sequences with pending nodes.

    Args:
        batch_size: Number B of sequences.
        device: Device of the sequences.
    """

    def __init__(self, batch_size: int, device: torch.device) -> None:
        super().__init__()
        self.lengths = torch.zeros(batch_size, dtype=torch.int64, device=device)
        """Committed tokens of each sequence, [B]."""
        self._slots = 0
        self._ancestors: Tensor | None = None
        self._announce(self.lengths.new_empty(batch_size, 0), new=0)

    @property
    def is_empty(self) -> bool:
        """Whether no token has been committed to any sequence."""
        return self._slots == 0

    def extend(self, length: int) -> Tensor:
        """Announce a chain of tokens after the committed ones; there must be no pending nodes.

        Args:
            length: Number Q of tokens; shorter rows are padded on the right, and ``keep`` drops the padding.

        Returns:
            Index of each token in its sequence, int64 [B, Q].
        """
        indices = torch.arange(length, device=self.lengths.device).expand(len(self.lengths), -1)
        if self._slots:
            return self.append(indices - 1)
        # Prompts may be long; plain causal attention covers them without [Q, Q] tensors.
        self._ancestors, self._depths, self._new = None, indices, length
        return indices

    def append(self, parents: Tensor) -> Tensor:
        """Announce nodes whose keys and values the next forward pass computes.

        Args:
            parents: Parent of each node among all pending ones, int64 [B, Q]; -1 is the last committed token.

        Returns:
            Index of each node in its sequence, counted from 0, int64 [B, Q]: committed tokens plus depth.
        """
        self._announce(torch.cat([self._parents, parents], dim=1), new=parents.shape[1])
        return self.lengths[:, None] + self._depths[:, -parents.shape[1] :]

    @property
    def is_plain(self) -> bool:
        """Whether plain causal attention is right for the announced tokens, apart from a window."""
        return self._ancestors is None

    def visible(self, window: int | None = None, chunk: int | None = None) -> Tensor | None:
        """Return which slots the announced nodes see, bool [B, Q, S]; None if plain causal attention is right.

        Args:
            window: Number of last tokens of its sequence that a node sees, including itself; None for all.
            chunk: Length of the chunks that sequences are divided into; a node sees only its own chunk. None for no
                chunks.
        """
        depths = self._depths[:, -self._new :]
        if self._ancestors is None:
            if (window is None or window >= self._new) and (chunk is None or chunk >= self._new):
                return None
            pending = depths[..., None] >= self._depths[:, None, :]
        else:
            pending = self._ancestors[:, -self._new :]
        slots = torch.arange(self._slots, device=self.lengths.device)
        committed = (slots < self.lengths[:, None])[:, None].expand(-1, self._new, -1)
        if window is not None:
            index = self.lengths[:, None] + depths
            committed = committed & (slots > index[..., None] - window)
            pending = pending & (self._depths[:, None, :] > depths[..., None] - window)
        if chunk is not None:
            own = (self.lengths[:, None] + depths)[..., None] // chunk
            committed = committed & (slots // chunk == own)
            pending = pending & ((self.lengths[:, None] + self._depths)[:, None] // chunk == own)
        return torch.cat([committed, pending], dim=-1)

    def attend(
        self, layer: int, query: Tensor, key: Tensor, value: Tensor, scale: float, window: int | None = None
    ) -> Tensor:
        """Attend in one layer of a draft (see ``specforge.models.draft_attention``) and cache keys and values."""
        keys, values = self.update(key, value, layer)
        visible = self.visible(window)
        mask = None if visible is None else visible[:, None]
        return F.scaled_dot_product_attention(
            query, keys, values, attn_mask=mask, is_causal=mask is None, scale=scale, enable_gqa=True
        )

    def keep(self, nodes: Tensor, counts: Tensor) -> None:
        """Commit a path of pending nodes and drop the others.

        Args:
            nodes: Pending nodes of each row from the top down, int64 [B, A].
            counts: Number of them that each row commits, int64 [B].
        """
        index = torch.arange(nodes.shape[1], device=nodes.device)
        wanted = index < counts[:, None]
        source, target = self._slots + nodes, self.lengths[:, None] + index
        rows, columns = ((source != target) & wanted).nonzero(as_tuple=True)
        self.lengths = self.lengths + counts
        self._slots = int(self.lengths.max())
        for layer in self.layers:
            if not layer.is_initialized:
                continue
            if rows.numel():
                for states in (layer.keys, layer.values):
                    states[rows, :, target[rows, columns]] = states[rows, :, source[rows, columns]]
            layer.keys = layer.keys[:, :, : self._slots]
            layer.values = layer.values[:, :, : self._slots]
        self._announce(self.lengths.new_empty(len(self.lengths), 0), new=0)

    def keep_first(self, counts: Tensor) -> None:
        """Commit the first ``counts`` pending nodes of each row, int64 [B], and drop the others."""
        nodes = torch.arange(self._depths.shape[1], device=counts.device)
        self.keep(nodes.expand(len(counts), -1), counts)

    def drop(self) -> None:
        """Drop all pending nodes."""
        self.keep_first(torch.zeros_like(self.lengths))

    def select(self, rows: Tensor) -> None:
        """Continue with some of the sequences, int64 [rows]; there must be no pending nodes."""
        self.batch_select_indices(rows)
        self.lengths = self.lengths[rows]
        self._announce(self.lengths.new_empty(len(rows), 0), new=0)

    def _announce(self, parents: Tensor, new: int) -> None:
        """Set all pending nodes; the last ``new`` have no keys and values yet."""
        self._parents = parents
        ancestors = ancestors_of(parents)
        self._ancestors, self._depths, self._new = ancestors, ancestors.sum(-1) - 1, new
