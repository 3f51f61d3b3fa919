"""Training a recurrent draft: its settings, and the initial network."""

from __future__ import annotations

from typing import Any

from specforge.bounds import Steps
from specforge.config import SpeculatorsConfig, VerifierConfig
from specforge.data.module import DraftDataModule
from specforge.proposals import GreedyTokenProposalConfig
from specforge.training.module import DraftModule
from specforge.verifier.parts import VerifierParts
from specforge_recurrent.config import RecurrentConfig
from specforge_recurrent.model import RecurrentModel


class RecurrentModule(DraftModule):
    """Trains a recurrent draft.

    Args:
        tokens: Number of tokens drafted per round, and of trained steps.
    """

    draft: RecurrentModel

    def __init__(self, tokens: Steps = 5, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.tokens = tokens

    @property
    def aux_layers(self) -> list[int]:
        """Empty: the draft reads the verifier's last state."""
        return []

    @property
    def num_steps(self) -> int:
        """Number of steps that are trained."""
        return self.tokens

    def build_draft(self, parts: VerifierParts, data: DraftDataModule) -> RecurrentModel:
        """Create the network: a random cell, and the verifier's head."""
        stored = SpeculatorsConfig(
            algorithm=RecurrentConfig.model_type_name,
            proposal_methods=[GreedyTokenProposalConfig(speculative_tokens=self.tokens)],
            default_proposal_method="greedy",
            verifier=VerifierConfig.from_config(self.teacher.config, self.teacher.stored_name),
        )
        sizes = {"hidden_size": parts.config.hidden_size, "vocab_size": parts.config.vocab_size}
        draft = RecurrentModel(RecurrentConfig(speculators_config=stored, **sizes))
        draft.attach_verifier(parts)
        draft.borrow_weights()
        return draft
