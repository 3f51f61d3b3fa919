"""DSpark's Markov heads: what the token before a slot adds to the slot's logits.

Letters in shapes: H width, r rank, D draft vocabulary, P pairs of row and step.
"""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn

from specforge_dflash.config import MarkovHead

# Its rows are seen once a token: they start as small as speculators' do.
EMBEDDING_DEVIATION = 0.01


class Markov(nn.Module):
    """Embeds the token before, and turns it into a *latent* whose product with ``markov_w2`` is added to logits.

    Args:
        kind: What the latent is made of; see ``DSparkSpeculatorConfig``.
        tokens: Number V of the verifier's tokens.
        draft_tokens: Number D of draft tokens.
        width: Width H of the slots' states.
        rank: Width r of embeddings and latents.
    """

    def __init__(self, kind: MarkovHead, tokens: int, draft_tokens: int, width: int, rank: int) -> None:
        super().__init__()
        self.kind = kind
        self.markov_w1 = nn.Embedding(tokens, rank)
        self.markov_w2 = nn.Linear(rank, draft_tokens, bias=False)
        if kind == "gated":
            self.gate_proj = nn.Linear(width + rank, rank)
        if kind == "rnn":
            self.joint_proj = nn.Linear(width + 2 * rank, 3 * rank)

    @property
    def memory_size(self) -> int:
        """Width of what is carried from slot to slot."""
        return self.markov_w2.in_features if self.kind == "rnn" else 0

    def forward(self, states: Tensor, embedded: Tensor, memory: Tensor) -> tuple[Tensor, Tensor]:
        """Return latents [..., r] and what the slots carry on.

        Args:
            states: Of the slots, [..., H].
            embedded: Tokens before them, by ``markov_w1``, [..., r].
            memory: What the slots before carried on, [..., r or 0]; zeros at the first slot.
        """
        if self.kind == "vanilla":
            return embedded, memory
        if self.kind == "gated":
            return torch.sigmoid(self.gate_proj(torch.cat([states, embedded], dim=-1))) * embedded, memory
        joined = self.joint_proj(torch.cat([memory, embedded, states], dim=-1))
        gate, candidate, output = joined.chunk(3, dim=-1)
        gate = torch.sigmoid(gate)
        carried = gate * memory + (1 - gate) * torch.tanh(candidate)
        return torch.tanh(output), carried

    def chain(self, states: Tensor, embedded: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Return the latents of blocks in training, [P, r].

        Args:
            states: One step after the other, [P, H].
            embedded: Tokens before them, [P, r].
            counts: How many rows each step runs; those of a step are the first ones of the step before.
        """
        memory = states.new_zeros(counts[0], self.memory_size)
        latents = []
        for own, before in zip(states.split(counts), embedded.split(counts), strict=True):
            latent, memory = self(own, before, memory[: len(own)])
            latents.append(latent)
        return torch.cat(latents)

    def bias(self, latents: Tensor) -> Tensor:
        """Turn latents [..., r] into what is added to logits, [..., D]."""
        return cast(Tensor, self.markov_w2(latents))
