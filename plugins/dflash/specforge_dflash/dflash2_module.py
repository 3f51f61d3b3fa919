"""Training DFlash2: DFlash, and a selector that learns to choose among the candidates of each slot.

The objective trains the head's logits; the selector's loss is a cross-entropy with the verifier's most probable token
over the K candidates, of which the last gives way to that token where it is missing. Validation counts what the
selector chooses, as decoding does.

Letters in shapes: S steps, N rows, P pairs of row and step that are run, K candidates.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from specforge.bounds import Weight
from specforge.training.losses.distillation import DraftSteps
from specforge.training.losses.objectives import Distributions
from specforge.training.module import Batch, Drafted
from specforge.verifier.features import Features
from specforge_dflash.dflash2 import DFlash2DraftModel
from specforge_dflash.model import DFlashDraftModel
from specforge_dflash.module import DFlashModule
from specforge_dflash.selected import selected_steps
from specforge_dflash.settings import DFlash2DraftSettings

SELECTOR = "selector"


class DFlash2Module(DFlashModule):
    """Trains a DFlash2 draft.

    Args:
        draft: The draft network.
        selector_weight: Weight of the selector's loss beside the objective.
    """

    network: ClassVar[type[DFlashDraftModel]] = DFlash2DraftModel
    draft: DFlash2DraftModel
    settings: DFlash2DraftSettings

    def __init__(
        self, draft: DFlash2DraftSettings = DFlash2DraftSettings(), selector_weight: Weight = 1.0, **kwargs: Any
    ) -> None:
        super().__init__(draft=draft, **kwargs)
        self.selector_weight = selector_weight

    def network_fields(self) -> dict[str, Any]:
        """Return the fields of the convolutions and the selector."""
        names = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
        return {name: getattr(self.settings, name) for name in names}

    @property
    def candidates(self) -> int:
        """Number K of candidates."""
        return self.settings.selector_top_k

    @property
    def term_weights(self) -> dict[str, float]:
        """Weights of the objective and of the selector's loss."""
        return {**super().term_weights, SELECTOR: self.selector_weight}

    def measured(self, batch: Batch, features: Features, drafted: Drafted, outcome: DraftSteps) -> DraftSteps:
        """Return what the selector's choice comes to; in training, where nothing is decided by it, that of the head."""
        labels = self.labels(batch)
        if self.training or labels is None:
            return outcome
        return selected_steps(self.draft, drafted, features.last.flatten(0, 1), self.teacher.parts, labels, outcome)

    def further_losses(self, features: Features, drafted: Drafted, outcome: DraftSteps) -> dict[str, Tensor]:
        """Return the selector's cross-entropy."""
        assert outcome.candidates is not None and outcome.verifier_tops is not None
        steps, rows, pairs, _ = drafted.counted()
        candidates, index = with_target(outcome.candidates[pairs], outcome.verifier_tops[pairs])
        log_q = self.draft.candidate_scores(drafted.states[pairs], candidates).log_softmax(-1)
        losses = -log_q.gather(1, index[:, None]).squeeze(1)
        empty = torch.zeros_like(outcome.acceptance)
        values = empty.index_put((steps, rows), losses.to(empty.dtype))
        if self.training and self.weighting is not None:
            found = Distributions(log_q.detach(), log_q.detach(), log_q.detach(), text=index, verifier_top=index)
            statistic = empty.index_put((steps, rows), self.weighting.statistic(found).to(empty.dtype))
            values = values * self.weighting.function(statistic, outcome.supervised)
        return {SELECTOR: values}


def with_target(candidates: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Replace the last candidate by the target if that is missing; return candidates and the target's index, int64 [m].

    Args:
        candidates: The most probable tokens, best first, int64 [m, K].
        targets: The verifier's most probable token, int64 [m].
    """
    found = candidates == targets[:, None]
    last = torch.where(found.any(1), candidates[:, -1], targets)
    candidates = torch.cat([candidates[:, :-1], last[:, None]], dim=1)
    return candidates, (candidates == targets[:, None]).to(torch.int8).argmax(1)
