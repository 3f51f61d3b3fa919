"""Medusa heads (https://arxiv.org/abs/2401.10774): each head reads only the verifier's last state.

With f_t the verifier's last state after its final norm, head i = 0, 1, ... computes

    h_i = f_t + SiLU(block_i f_t),    logits of x_{t+2+i} = lm_head_i h_i

These are the rows of ``specforge.models.chain.alignment``, except that the heads do not read x_{t+1+i}.

Letters in shapes: B rows, T tokens per row, H the verifier's width, V its vocabulary, K heads.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from specforge.config import SpeculatorModelConfig
from specforge.errors import UsageError
from specforge.models.draft_rows import DraftRows
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.features import Features
from specforge_medusa.config import MedusaConfig
from specforge_medusa.drafter import MedusaDrafter


class MedusaModel(SpeculatorModel):
    """Drafts with independent heads.

    Args:
        config: The draft's configuration.
    """

    config_class: ClassVar[type[SpeculatorModelConfig]] = MedusaConfig
    config: MedusaConfig

    def __init__(self, config: MedusaConfig) -> None:
        super().__init__(config)
        width = config.hidden_size
        self.block = nn.ModuleList(nn.Linear(width, width) for _ in range(config.num_heads))
        self.lm_head = nn.ModuleList(nn.Linear(width, config.vocab_size, bias=False) for _ in range(config.num_heads))

    @torch.no_grad()
    def borrow_weights(self) -> None:
        """Initialise as published: every head starts as the verifier's own head."""
        for block, head in zip(self.block, self.lm_head, strict=True):
            nn.init.zeros_(cast(Tensor, block.weight))
            nn.init.zeros_(cast(Tensor, block.bias))
            cast(Tensor, head.weight).copy_(self.verifier_parts.lm_head.weight)

    @property
    def head_weights(self) -> list[Tensor]:
        """The matrix of each head, [V, H]."""
        return [cast(Tensor, head.weight) for head in self.lm_head]

    @torch.no_grad()
    def first_state(self, features: Features) -> Tensor:
        """Return the input of all heads, [B, T, H]."""
        last: Tensor = self.verifier_parts.norm(features.last)
        return last.to(self.head_weights[0].dtype)

    def advance(self, states: Tensor, step: int) -> Tensor:
        """Return the input of a step's matrix for the verifier's states, [..., H]."""
        return states + F.silu(self.block[step](states))

    def states(self, batch: Mapping[str, Tensor], features: Features, rows: DraftRows) -> Tensor:
        """Run the first heads at the rows that each of them needs; the batch is ignored.

        Raises:
            UsageError: More steps than heads are requested.
        """
        steps = len(rows.counts)
        if steps > self.config.num_heads:
            raise UsageError(f"this draft has {self.config.num_heads} heads, but {steps} steps are requested")
        read = self.first_state(features).flatten(0, 1)[rows.order]
        return torch.cat([self.advance(read[:count], step) for step, count in enumerate(rows.counts)])

    def drafter(self, batch_size: int) -> MedusaDrafter:
        """Create a drafter for a batch of sequences."""
        return MedusaDrafter(self)
