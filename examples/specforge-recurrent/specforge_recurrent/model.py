"""A recurrent draft, after ReDrafter (https://arxiv.org/abs/2403.09919, section 3.1).

With f_t the verifier's last state at token t after its final norm, and e its token embeddings, step k = 0, 1, ... is

    h_{-1} = f_t,    h_k = GRU(e(x_{t+1+k}), h_{k-1}),    logits of x_{t+2+k} = lm_head h_k

These are the rows of ``specforge.models.chain.alignment``.

Letters in shapes: B sequences, T tokens, H the verifier's width, V its vocabulary, W nodes.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor, nn

from specforge.config import SpeculatorModelConfig
from specforge.models.chain.alignment import step_tokens
from specforge.models.draft_rows import DraftRows
from specforge.models.drafter import Drafter
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.features import Features
from specforge_recurrent.config import RecurrentConfig


class RecurrentModel(SpeculatorModel):
    """Drafts with a GRU cell.

    Args:
        config: The draft's configuration.
    """

    config_class: ClassVar[type[SpeculatorModelConfig]] = RecurrentConfig
    config: RecurrentConfig

    def __init__(self, config: RecurrentConfig) -> None:
        super().__init__(config)
        self.cell = nn.GRUCell(config.hidden_size, config.hidden_size)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @torch.no_grad()
    def borrow_weights(self) -> None:
        """Initialise the head from the verifier's."""
        self.lm_head.weight.copy_(self.verifier_parts.lm_head.weight)

    @property
    def head_weights(self) -> Tensor:
        """The matrix of the head, [V, H]."""
        return self.lm_head.weight

    @torch.no_grad()
    def first_state(self, features: Features) -> Tensor:
        """Return h_{-1}, [B, T, H]."""
        last: Tensor = self.verifier_parts.norm(features.last)
        return last.to(self.lm_head.weight.dtype)

    def advance(self, tokens: Tensor, states: Tensor) -> Tensor:
        """Run one step: tokens [N] and states [N, H] to states [N, H]."""
        embedded = self.verifier_parts.embed_tokens(tokens).detach().to(states.dtype)
        new: Tensor = self.cell(embedded, states)
        return new

    def states(self, batch: Mapping[str, Tensor], features: Features, rows: DraftRows) -> Tensor:
        """Run each step at the rows that need it, fed with the true tokens."""
        tokens = step_tokens(batch["input_ids"], len(rows.counts)).flatten(1)[:, rows.order]
        state, found = self.first_state(features).flatten(0, 1)[rows.order], []
        for step, count in enumerate(rows.counts):
            state = self.advance(tokens[step, :count], state[:count])
            found.append(state)
        return torch.cat(found)

    def drafter(self, batch_size: int) -> RecurrentDrafter:
        """Create a drafter for a batch of sequences."""
        return RecurrentDrafter(self)


class RecurrentDrafter(Drafter):
    """Keeps the state of the root and of every node.

    Args:
        network: The network, attached to its verifier.
    """

    def __init__(self, network: RecurrentModel) -> None:
        self._network = network

    @torch.no_grad()
    def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
        """Run step 0 at the last decided token, from the verifier's state before it."""
        rows = torch.arange(len(tokens), device=tokens.device)
        before = self._network.first_state(features)[rows, counts - 1]
        # Of the root, then of the nodes, [B, 1 + W, H].
        self._states = self._network.advance(tokens[rows, counts - 1], before)[:, None]
        self.root = self._network.logits(self._states[:, 0])

    @torch.no_grad()
    def step(self, tokens: Tensor, parents: Tensor) -> Tensor:
        """Run the next step from the parents' states."""
        rows = torch.arange(len(parents), device=parents.device)[:, None]
        parent_states = self._states[rows, parents + 1]
        new = self._network.advance(tokens.flatten(), parent_states.flatten(0, 1)).view_as(parent_states)
        self._states = torch.cat([self._states, new], dim=1)
        return self._network.logits(new)

    def select(self, rows: Tensor) -> None:
        """Continue with some of the sequences; the next ``commit`` replaces their state."""
