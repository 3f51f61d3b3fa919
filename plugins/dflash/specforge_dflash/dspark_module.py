"""Training DSpark: DFlash, and a confidence that learns how probable acceptance is."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn import functional as F

from specforge.bounds import Weight
from specforge.training.losses.distillation import DraftSteps
from specforge.training.module import Batch, Drafted
from specforge.verifier.features import Features
from specforge_dflash.calibration import ConfidenceRecord
from specforge_dflash.dspark import DSparkDraftModel
from specforge_dflash.model import DFlashDraftModel
from specforge_dflash.module import DFlashModule
from specforge_dflash.settings import DSparkDraftSettings

CONFIDENCE = "confidence"


class DSparkModule(DFlashModule):
    """Trains a DSpark draft.

    Args:
        draft: The draft network.
        confidence_weight: Weight of the confidence's loss beside the objective.
    """

    network: ClassVar[type[DFlashDraftModel]] = DSparkDraftModel
    drafts_from_anchor: ClassVar[bool] = True
    draft: DSparkDraftModel
    settings: DSparkDraftSettings

    def __init__(
        self, draft: DSparkDraftSettings = DSparkDraftSettings(), confidence_weight: Weight = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(draft=draft, **kwargs)
        self.confidence_weight = confidence_weight
        # Of the validation under way.
        self._record: ConfidenceRecord | None = None

    def network_fields(self) -> dict[str, Any]:
        """Return the fields of the Markov head and the confidence head."""
        settings = self.settings
        return {
            "markov_rank": settings.markov_rank,
            "markov_head_type": settings.markov_head_type,
            "enable_confidence_head": settings.confidence_head,
            "confidence_head_with_markov": settings.confidence_with_markov,
        }

    @property
    def term_weights(self) -> dict[str, float]:
        """Weights of the objective and, where there is that head, of the confidence's loss."""
        own = {CONFIDENCE: self.confidence_weight} if self.settings.confidence_head else {}
        return {**super().term_weights, **own}

    def on_validation_epoch_start(self) -> None:
        """Begin to record the confidence."""
        if self.settings.confidence_head:
            self._record = ConfidenceRecord()

    def measured(self, batch: Batch, features: Features, drafted: Drafted, outcome: DraftSteps) -> DraftSteps:
        """Record what the draft was confident of in validation, and what became of it."""
        if self._record is not None:
            self._record.add(drafted, outcome.drawn)
        return outcome

    def on_validation_epoch_end(self) -> None:
        """Log the metrics, calibrate the confidence, and log how well it fits."""
        super().on_validation_epoch_end()
        if self._record is None:
            return
        found, self._record = self._record.calibrated(), None
        self.draft.config.confidence_temperatures = found.temperatures
        self.log_dict({"val/confidence_ece": found.error, "val/confidence_ece_raw": found.raw_error})

    def further_losses(self, features: Features, drafted: Drafted, outcome: DraftSteps) -> dict[str, Tensor]:
        """Return the cross-entropy of confidence and the probability of acceptance."""
        if not self.settings.confidence_head:
            return {}
        return {CONFIDENCE: confidence_losses(drafted, outcome.acceptance)}


def confidence_losses(drafted: Drafted, acceptance: Tensor) -> Tensor:
    """Return the binary cross-entropy of each pair's confidence, [S, N]; 0 where it does not count.

    Args:
        drafted: What the draft computed; the last column of its states is the confidence, in log-odds.
        acceptance: How probable it is that each pair's token is accepted, [S, N].
    """
    counted = drafted.supervised.nonzero(as_tuple=True)
    log_odds = drafted.states[drafted.places[counted], -1].to(acceptance.dtype)
    losses = F.binary_cross_entropy_with_logits(log_odds, acceptance[counted], reduction="none")
    return torch.zeros_like(acceptance).index_put(counted, losses)
