"""Training EAGLE-3: the network's settings, and which positions count."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, Self

from pydantic import Field, model_validator
from torch import Tensor

from specforge.bounds import Steps
from specforge.data.module import DraftDataModule
from specforge.models.chain.alignment import Alignment, Supervision, align
from specforge.training.losses.comparison import Term
from specforge.training.losses.objectives import Distributions
from specforge.training.module import Batch
from specforge_eagle3.fused import FusedDraftModule, FusedDraftSettings


class Eagle3DraftSettings(FusedDraftSettings):
    """The draft network of EAGLE-3 and EAGLE-3.1."""

    fc_norm: bool = Field(default=False, description="One norm for each feature before fusing (EAGLE-3.1).")
    norm_output: bool = Field(default=False, description="Feed back the normalised state (EAGLE-3.1).")
    train_embeddings: bool = Field(default=False, description="Train token embeddings, from the verifier's.")

    @model_validator(mode="after")
    def _one_norm(self) -> Self:
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm exclude each other")
        return self

    @property
    def norms_features(self) -> bool:
        """Whether a norm precedes the fusion."""
        return self.norm_before_fc or self.fc_norm


class Eagle3Module(FusedDraftModule):
    """Trains an EAGLE-3 draft with teacher-forced training-time test.

    Args:
        draft: The draft network.
        ttt_steps: Number of steps of training-time test.
        supervision: Which positions count in training: those that a decoding round can start at and reach (exact), or
            those of the published trainers (compat). Validation counts the exact ones.
    """

    def __init__(
        self,
        draft: Eagle3DraftSettings = Eagle3DraftSettings(),
        ttt_steps: Steps = 7,
        supervision: Supervision = "exact",
        **kwargs: Any,
    ) -> None:
        super().__init__(draft=draft, **kwargs)
        self.ttt_steps = ttt_steps
        self.supervision = supervision
        self._options = {
            "fc_norm": draft.fc_norm,
            "norm_output": draft.norm_output,
            "embed_requires_grad": draft.train_embeddings,
        }
        self._terms_in_vocabulary = [
            replace(term, function=partial(_in_vocabulary, term.function)) for term in self.terms
        ]

    @property
    def reads_row_ends(self) -> bool:
        """With ``compat``, the positions reach to the ends of rows."""
        return self.supervision == "compat"

    @property
    def num_steps(self) -> int:
        """Number of steps of training-time test."""
        return self.ttt_steps

    def network_options(self, data: DraftDataModule) -> dict[str, Any]:
        """Return the arguments of the network that only this algorithm has."""
        return self._options

    def alignment(self, batch: Batch) -> Alignment:
        """Return targets and counted positions; validation always counts the exact ones."""
        supervision = self.supervision if self.training else "exact"
        return align(batch["loss_mask"], batch["document_ids"], self.num_steps, supervision)

    @property
    def loss_terms(self) -> list[Term]:
        """The terms of the objective; with ``compat``, training ignores targets outside the draft vocabulary."""
        return self._terms_in_vocabulary if self.training and self.supervision == "compat" else super().loss_terms


def _in_vocabulary(loss: Callable[[Distributions], Tensor], rows: Distributions) -> Tensor:
    """Compute a loss; 0 for rows whose most probable verifier token is not a draft token."""
    assert rows.verifier_top is not None
    return loss(rows) * (rows.verifier_top >= 0)
