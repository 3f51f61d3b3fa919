"""Training EAGLE-3: the network's settings, and one batch."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from specforge.bounds import Count, Layers, Steps, Width
from specforge.data.module import DraftDataModule, data_of
from specforge.errors import UsageError
from specforge.models.base_components import LayerType
from specforge.models.chain.alignment import Alignment, Supervision, align
from specforge.models.vocabulary import DraftVocabulary
from specforge.training.feature_scale import FeatureScale, FeatureScaledModule, check_feature_scale
from specforge.training.losses.comparison import Term
from specforge.training.losses.objectives import Distributions
from specforge.training.module import Batch
from specforge.training.saying import say
from specforge.verifier.features import Features, check_aux_layers
from specforge.verifier.parts import VerifierParts
from specforge_eagle3.config import default_aux_layers
from specforge_eagle3.model import Eagle3DraftModel


class Eagle3DraftSettings(BaseModel):
    """The draft network; its widths, heads and positions are the verifier's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer_type: LayerType = Field(
        default="llama", description="Family of the draft's layers: llama, qwen3, or one that a plugin registers."
    )
    num_layers: Layers = Field(default=1, description="Number of decoder layers.")
    intermediate_size: Width | None = Field(default=None, ge=1, description="Width of the MLPs; null: the verifier's.")
    draft_vocab_size: Count | None = Field(
        default=32000, description="Number of most frequent tokens that the draft can propose; null: all tokens."
    )
    aux_layers: list[int] | None = Field(
        default=None, description="Verifier layers whose inputs are the features, ascending; null: [2, N//2, N-3]."
    )
    norm_before_residual: bool = Field(
        default=False, description="Start the residual stream from the normalised feature."
    )
    norm_before_fc: bool = Field(default=False, description="One norm over all features before they are fused.")
    fc_norm: bool = Field(default=False, description="One norm for each feature before fusing (EAGLE-3.1).")
    norm_output: bool = Field(default=False, description="Feed back the normalised state (EAGLE-3.1).")
    feature_scale: FeatureScale = Field(
        default="auto",
        description="Divisors of the features in training, folded into the written draft: a constant for each aux "
        "layer; auto: measured on the first row, unless a norm precedes the fusion.",
    )
    train_head: bool = Field(default=True, description="Train the draft's head, which starts as the verifier's.")
    train_embeddings: bool = Field(default=False, description="Train token embeddings, from the verifier's.")

    @model_validator(mode="after")
    def _one_norm(self) -> Eagle3DraftSettings:
        if self.norm_before_fc and self.fc_norm:
            raise ValueError("norm_before_fc and fc_norm exclude each other")
        if isinstance(self.feature_scale, list) and self.norms_features:
            raise ValueError("feature_scale has no effect if norm_before_fc or fc_norm normalises the features")
        return self

    @property
    def norms_features(self) -> bool:
        """Whether a norm precedes the fusion."""
        return self.norm_before_fc or self.fc_norm


class Eagle3Module(FeatureScaledModule):
    """Trains an EAGLE-3 draft with teacher-forced training-time test.

    Args:
        draft: The draft network.
        ttt_steps: Number of steps of training-time test.
        supervision: Which positions count in training: those that a decoding round can start at and reach (exact), or
            those of the published trainers (compat). Validation counts the exact ones.
    """

    draft: Eagle3DraftModel
    scaled_layer = "fc"

    def __init__(
        self,
        draft: Eagle3DraftSettings = Eagle3DraftSettings(),
        ttt_steps: Steps = 7,
        supervision: Supervision = "exact",
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.settings = draft
        self.ttt_steps = ttt_steps
        self.supervision = supervision
        self._terms_in_vocabulary = [
            replace(term, function=partial(_in_vocabulary, term.function)) for term in self.terms
        ]
        verifier = self.teacher.config.get_text_config()
        try:
            chosen = draft.aux_layers
            self._aux_layers = default_aux_layers(verifier.num_hidden_layers) if chosen is None else chosen
            check_aux_layers(self._aux_layers, verifier.num_hidden_layers)
        except UsageError as error:
            raise UsageError(f"model.draft.aux_layers: {error}") from None
        self.scaled_inputs = [f"layer {layer}" for layer in self._aux_layers]
        self.feature_scale = "none" if draft.norms_features else draft.feature_scale
        check_feature_scale(self.feature_scale, self.scaled_inputs)
        if draft.draft_vocab_size is not None and draft.draft_vocab_size > verifier.vocab_size:
            raise UsageError(
                f"model.draft.draft_vocab_size is {draft.draft_vocab_size}, but the verifier has only "
                f"{verifier.vocab_size} tokens; give at most that, or null for all of them"
            )

    @property
    def aux_layers(self) -> list[int]:
        """Ids of the verifier layers that features are taken from, ascending."""
        return self._aux_layers

    @property
    def num_steps(self) -> int:
        """Number of steps of training-time test."""
        return self.ttt_steps

    def build_draft(self, parts: VerifierParts, data: DraftDataModule) -> Eagle3DraftModel:
        """Create the network: head and embeddings are initialised from the verifier's, the rest at random."""
        settings = self.settings
        vocabulary = None
        if settings.draft_vocab_size not in (None, parts.config.vocab_size):
            vocabulary = DraftVocabulary.most_frequent(data.vocabulary_counts(), settings.draft_vocab_size)
        draft = Eagle3DraftModel.from_training_args(
            self.teacher.config,
            verifier_name_or_path=self.teacher.stored_name,
            layer_type=settings.layer_type,
            num_layers=settings.num_layers,
            intermediate_size=settings.intermediate_size,
            aux_layer_ids=self._aux_layers,
            norm_before_residual=settings.norm_before_residual,
            norm_before_fc=settings.norm_before_fc,
            fc_norm=settings.fc_norm,
            norm_output=settings.norm_output,
            embed_requires_grad=settings.train_embeddings,
            ttt_steps=self.ttt_steps,
            t2d=None if vocabulary is None else vocabulary.t2d,
        )
        draft.attach_verifier(parts)
        draft.borrow_weights()
        draft.lm_head.requires_grad_(settings.train_head)
        return draft

    def states_read(self, batch: Batch, features: Features) -> Tensor:
        """Return the features that are fused."""
        return features.aux

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Scale the features before the first step, and print the size of the residual stream."""
        super().on_train_batch_start(batch, batch_idx)
        if self.trainer.global_step == 0 and batch_idx == 0 and not self.compile_steps:
            self._print_residual_sizes()

    def _print_residual_sizes(self) -> None:
        def record(layer: nn.Module, read: tuple[Tensor, ...], written: Tensor) -> None:
            feature = read[1][:, : written.shape[1]].detach()
            read_and_added = (feature, written.detach() - feature)
            stream, added = (float(one.float().square().mean().sqrt()) for one in read_and_added)
            say(f"  root mean square of the draft's residual stream: {stream:.3g}; its first layer adds {added:.3g}")
            handle.remove()

        handle = self.draft.layers[0].register_forward_hook(record)

    def summary_text(self) -> str:
        """Return the summary, with the coverage of the draft vocabulary."""
        pruned = self.draft.draft_ids is not None
        counts = data_of(self.trainer).vocabulary_counts()
        coverage = DraftVocabulary.from_t2d(self.draft.t2d.cpu()).coverage(counts) if pruned else 1.0
        size = self.draft.lm_head.out_features
        return f"{super().summary_text()}\n  {size:,} draft tokens cover {coverage:.1%} of the supervised tokens"

    def alignment(self, batch: Batch) -> Alignment:
        """Return targets and counted positions; validation always counts the exact ones."""
        supervision = self.supervision if self.training else "exact"
        return align(batch["loss_mask"], batch["document_ids"], self.ttt_steps, supervision)

    @property
    def loss_terms(self) -> list[Term]:
        """The terms of the objective; with ``compat``, training ignores targets outside the draft vocabulary."""
        return self._terms_in_vocabulary if self.training and self.supervision == "compat" else super().loss_terms


def _in_vocabulary(loss: Callable[[Distributions], Tensor], rows: Distributions) -> Tensor:
    """Compute a loss; 0 for rows whose most probable verifier token is not a draft token."""
    assert rows.verifier_top is not None
    return loss(rows) * (rows.verifier_top >= 0)
