"""DSpark at work: a block drafter that knows how far its chains are likely to be accepted."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specforge.errors import UsageError
from specforge.models.block.drafter import BlockDrafter

if TYPE_CHECKING:
    from specforge_dflash.dspark import DSparkDraftModel


class DSparkDrafter(BlockDrafter):
    """Drafts with DSpark's blocks.

    Args:
        network: The network, attached to its verifier.
        batch_size: Number B of sequences.
        device: Where the network is.
    """

    def __init__(self, network: DSparkDraftModel, batch_size: int, device: torch.device) -> None:
        super().__init__(network, batch_size, device)
        self._dspark = network

    @torch.no_grad()
    def survival(self, before: Tensor) -> Tensor:
        """Return how probable it is that a chain's tokens up to each one are accepted, [B, W].

        Args:
            before: The token before each of the chain, the first one the root: the verifier's ids, int64 [B, W].

        Raises:
            UsageError: The draft was trained without a confidence.
        """
        config, width = self._dspark.config, before.shape[1]
        if not config.enable_confidence_head:
            raise UsageError("this draft has no confidence head; train it with model.draft.confidence_head: true")
        log_odds = self._dspark.confidence(self.states[:, :width], before)
        temperatures = log_odds.new_tensor(config.confidence_temperatures or [1.0] * width)
        return (log_odds / temperatures[:width]).sigmoid().cumprod(1)
