"""A drafter that runs all depths in the forward pass that takes in the committed tokens."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specforge.models.drafter import Drafter
from specforge.models.tree_cache import TreeCache
from specforge.verifier.features import Features
from specforge_eagle3.model import FIRST_POSITION

if TYPE_CHECKING:
    from specforge_peagle.model import PEagleDraftModel


class ParallelDrafter(Drafter):
    """Drafts K tokens in one forward pass. A node's logits are those of its depth: no depth reads the drafted tokens.

    Args:
        network: The network, attached to its verifier.
        batch_size: Number B of sequences.
        device: Where the network is.
    """

    reads_weights_once = True

    def __init__(self, network: PEagleDraftModel, batch_size: int, device: torch.device) -> None:
        self._network = network
        self._cache = TreeCache(batch_size, device)
        self.draft_ids = network.draft_ids
        self.max_depth = network.config.num_depths

    @torch.no_grad()
    def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
        """Run the committed tokens, and the mask tokens of all later depths after the last of them."""
        network, (batch, width) = self._network, tokens.shape
        masks = self.max_depth - 1 if self.max_depth else 0
        mask_tokens = tokens.new_full((batch, masks), network.config.mask_token_id)
        mask_features = network.mask_feature().expand(batch, masks, -1)
        rows = torch.arange(batch, device=tokens.device)
        nodes = torch.arange(width + masks, device=tokens.device).expand(batch, -1) - 1
        self._cache.drop()
        if self._cache.is_empty:
            # A prompt may be long: it is attended to causally, without a mask that grows with its square.
            prompt = self._run(tokens, network.first_feature(features), self._cache.extend(width))
            self._cache.keep_first(counts)
            last = prompt[rows, counts - 1]
            later = self._run(mask_tokens, mask_features, self._cache.append(nodes[:, :masks])) if masks else None
            self._cache.drop()
        else:
            # The first mask token is a child of the last committed token, which differs by sequence.
            parents = nodes.clone()
            if masks:
                parents[:, width] = counts - 1
            index = self._cache.append(parents)
            read = torch.cat([network.first_feature(features), mask_features], dim=1)
            states = self._run(torch.cat([tokens, mask_tokens], dim=1), read, index)
            self._cache.keep_first(counts)
            last, later = states[rows, counts - 1], states[:, width:]
        found = last[:, None] if later is None else torch.cat([last[:, None], later], dim=1)
        self._by_depth = network.state_logits(found)
        # Of the root, then of the nodes.
        self._depths = torch.zeros_like(tokens[:, :1])
        self.root = self._by_depth[:, 0]

    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Return the logits of the nodes' depths."""
        rows = torch.arange(len(parents), device=parents.device)[:, None]
        depths = self._depths[rows, parents + 1] + 1
        self._depths = torch.cat([self._depths, depths], dim=1)
        return self._by_depth[rows, depths]

    def select(self, rows: Tensor) -> None:
        """Continue with some of the sequences."""
        self._cache.drop()
        self._cache.select(rows)

    def _run(self, tokens: Tensor, feature: Tensor, index: Tensor) -> Tensor:
        return self._network.run(tokens, feature, index + FIRST_POSITION, self._cache)
