"""Training EAGLE-1 and HASS: the network's settings, its noise, and the loss between features.

EAGLE-1 trains one step: from the verifier's feature of token t and the embedding of token t + 1 to the feature of token
t + 1. HASS continues: each further step reads the features that the draft predicted in the previous steps, without a
gradient through them, exactly as in decoding. In the rows of ``specforge.models.chain.alignment`` (each an anchor t,
whose step k reads token t + 1 + k), its harmonised context is the attention of training-time test: the keys and values
of the true features up to the anchor, then one of each earlier step.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor

from specforge.bounds import Decay, Steps, Weight
from specforge.data.module import DraftDataModule
from specforge.models.chain.alignment import Alignment, Supervision, align
from specforge.models.draft_rows import DraftRows
from specforge.training.feature_scale import FeatureScale, FeatureScaledModule, check_feature_scale
from specforge.training.losses.distillation import DraftSteps
from specforge.training.module import Batch, Drafted
from specforge.training.optimizers import OptimizerSettings
from specforge.training.schedules import ScheduleSettings
from specforge.verifier.features import Features
from specforge.verifier.parts import VerifierParts
from specforge_eagle.model import EagleSpeculator
from specforge_eagle.noise import feature_noise

FEATURE = "feature"


class EagleDraftSettings(BaseModel):
    """The draft network; its width, heads and positions are the verifier's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    transformer_layer_architecture: str = Field(
        default="auto",
        description="Decoder layer of transformers, such as LlamaDecoderLayer; auto: the verifier's, or Llama's if "
        "that family has none for drafts.",
    )
    layernorms: bool = Field(default=False, description="Norms on embeddings, before the layer and before the head.")
    fusion_bias: bool = Field(default=False, description="A bias of the fusion; vLLM does not support it.")
    feature_scale: FeatureScale = Field(
        default="auto",
        description="Divisors of embedding and feature in training, folded into the written draft: two numbers; auto: "
        "measured on the first row.",
    )


class EagleModule(FeatureScaledModule):
    """Trains an EAGLE-1 draft, or with several alignment steps a HASS one.

    Args:
        draft: The draft network.
        alignment_steps: Draft steps that are trained: 1 for EAGLE-1, 3 for HASS as published.
        measured_steps: Draft steps that validation runs: the chain length of the acceptance length.
        feature_weight: Weight of the Smooth-L1 loss between predicted and true features.
        noise: Bound of the uniform noise on the features of a document of 512 tokens; longer ones get less.
        supervision: Which positions count in training: those that a decoding round can start at and reach (exact), or
            those of the published trainers (compat). Validation counts the exact ones.
        objective: Weights of the losses between distributions, by name.
        step_decay: Draft step k is weighted by this number to the power of k.
        optimizer: The optimizer.
        schedule: The learning-rate schedule.
    """

    draft: EagleSpeculator
    scaled_layer = "fusion_fc"
    scaled_inputs = ("embeddings", "features")

    def __init__(
        self,
        draft: EagleDraftSettings = EagleDraftSettings(),
        alignment_steps: Steps = 1,
        measured_steps: Steps = 5,
        feature_weight: Weight = 1.0,
        noise: Weight = 0.1,
        supervision: Supervision = "exact",
        objective: dict[str, float] = {"cross_entropy": 0.1},  # noqa: B006  (shown as the default in --help)
        step_decay: Decay = 1.0,
        optimizer: OptimizerSettings = OptimizerSettings(lr=3e-5, weight_decay=0.01),
        schedule: ScheduleSettings = ScheduleSettings(name="linear", warmup=2000),
        **kwargs: Any,
    ) -> None:
        super().__init__(objective=objective, step_decay=step_decay, optimizer=optimizer, schedule=schedule, **kwargs)
        self.settings = draft
        self.alignment_steps = alignment_steps
        self.measured_steps = measured_steps
        self.feature_weight = feature_weight
        self.noise = noise
        self.supervision = supervision
        self.feature_scale = draft.feature_scale
        check_feature_scale(self.feature_scale, self.scaled_inputs)

    @property
    def aux_layers(self) -> list[int]:
        """Empty: the draft reads the verifier's last state."""
        return []

    @property
    def reads_row_ends(self) -> bool:
        """With ``compat``, the positions reach to the ends of rows."""
        return self.supervision == "compat"

    @property
    def num_steps(self) -> int:
        """Number of alignment steps."""
        return self.alignment_steps

    @property
    def validation_steps(self) -> int:
        """Number of steps that validation runs: at least the trained ones."""
        return max(self.alignment_steps, self.measured_steps)

    @property
    def term_weights(self) -> dict[str, float]:
        """Weights of the feature loss and of the objective."""
        return {FEATURE: self.feature_weight, **super().term_weights}

    def build_draft(self, parts: VerifierParts, data: DraftDataModule) -> EagleSpeculator:
        """Create the network with random weights; embeddings and head are the verifier's."""
        draft = EagleSpeculator.from_training_args(
            self.teacher.config,
            verifier_name_or_path=self.teacher.stored_name,
            **self.settings.model_dump(exclude={"feature_scale"}),
        )
        draft.attach_verifier(parts)
        draft.borrow_weights()
        return draft

    def states_read(self, batch: Batch, features: Features) -> Tensor:
        """Return the fusion's inputs: embeddings and features."""
        feature = self.draft.first_feature(features)
        embedded = self.draft.embed(batch["input_ids"])
        if self.settings.layernorms:  # their weights start at 1 and may be sharded
            embedded = F.rms_norm(embedded, embedded.shape[-1:])
        return torch.stack([embedded, feature.to(embedded.dtype)], dim=-2)

    def alignment(self, batch: Batch) -> Alignment:
        """Return targets and counted positions; validation always counts the exact ones."""
        if not self.training:
            return super().alignment(batch)
        return align(batch["loss_mask"], batch["document_ids"], self.num_steps, self.supervision)

    def states(self, batch: Batch, features: Features, rows: DraftRows) -> Tensor:
        """Predict features step by step; training starts from noisy ones."""
        if not (self.training and self.noise):
            return super().states(batch, features, rows)
        true = self.draft.first_feature(features)
        # Different noise for each batch and rank, but the same in a resumed run.
        number = self.trainer.fit_loop.total_batch_idx * self.trainer.world_size + self.trainer.global_rank
        noise = feature_noise(true, batch["document_ids"], self.noise, (torch.initial_seed() + number) % 2**63)
        return self.draft.chain(batch["input_ids"], true + noise, batch["position_ids"], rows, detached=True)

    def further_losses(self, features: Features, drafted: Drafted, outcome: DraftSteps) -> dict[str, Tensor]:
        """Return the distances between predicted and true features."""
        true = self.draft.first_feature(features).flatten(0, 1)
        return {FEATURE: feature_distances(drafted, true)}


def feature_distances(drafted: Drafted, true: Tensor) -> Tensor:
    """Return the Smooth-L1 distance between features at each row and step, [S, N]; 0 where it does not count.

    Mean over the width, beta 1 (arXiv 2401.15077, section 3.2).

    Args:
        drafted: The draft's features and their targets.
        true: The verifier's features, after its final norm, [N, H].
    """
    steps, rows, states, targets = drafted.counted()
    predicted, true = drafted.states[states], true[targets]
    wide = torch.promote_types(predicted.dtype, torch.float32)
    distances = F.smooth_l1_loss(predicted.to(wide), true.to(wide), reduction="none").mean(-1)
    return distances.new_zeros(drafted.supervised.shape).index_put((steps, rows), distances)
