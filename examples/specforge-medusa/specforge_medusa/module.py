"""Training Medusa heads: the settings, and the initial network."""

from __future__ import annotations

from typing import Any

from jsonargparse.typing import PositiveInt

from specforge.bounds import Decay
from specforge.config import SpeculatorsConfig, VerifierConfig
from specforge.data.module import DraftDataModule
from specforge.proposals import GreedyTokenProposalConfig
from specforge.training.module import DraftModule
from specforge.training.optimizers import OptimizerSettings
from specforge.training.schedules import ScheduleSettings
from specforge.verifier.parts import VerifierParts
from specforge_medusa.config import MedusaConfig
from specforge_medusa.model import MedusaModel
from specforge_medusa.proposal import SparseTreeTokenProposalConfig


class MedusaModule(DraftModule):
    """Trains Medusa heads for a frozen verifier.

    Args:
        heads: Number of heads, the maximum tokens drafted per round.
        objective: Weights of the losses, by name; text is the published hard cross-entropy.
        step_decay: Head k is weighted by this number to the power of k.
        optimizer: The optimizer.
        schedule: The learning-rate schedule.
    """

    draft: MedusaModel

    def __init__(
        self,
        heads: PositiveInt = 3,
        objective: dict[str, float] = {"text": 1.0},  # noqa: B006  (never changed; shown as the default in --help)
        step_decay: Decay = 0.8,
        optimizer: OptimizerSettings = OptimizerSettings(lr=1e-3),
        schedule: ScheduleSettings = ScheduleSettings(warmup=0.1),
        **kwargs: Any,
    ) -> None:
        super().__init__(objective=objective, step_decay=step_decay, optimizer=optimizer, schedule=schedule, **kwargs)
        self.heads = heads

    @property
    def aux_layers(self) -> list[int]:
        """Empty: the heads read the verifier's last state."""
        return []

    @property
    def num_steps(self) -> int:
        """Number of heads."""
        return self.heads

    def build_draft(self, parts: VerifierParts, data: DraftDataModule) -> MedusaModel:
        """Create the heads, initialised from the verifier's own."""
        draft = MedusaModel(
            MedusaConfig(
                hidden_size=parts.config.hidden_size,
                vocab_size=parts.config.vocab_size,
                num_heads=self.heads,
                speculators_config=SpeculatorsConfig(
                    algorithm=MedusaConfig.model_type_name,
                    proposal_methods=[
                        GreedyTokenProposalConfig(speculative_tokens=self.heads),
                        SparseTreeTokenProposalConfig(depth=self.heads),
                    ],
                    default_proposal_method="greedy",
                    verifier=VerifierConfig.from_config(self.teacher.config, self.teacher.stored_name),
                ),
            )
        )
        draft.attach_verifier(parts)
        draft.borrow_weights()
        return draft
