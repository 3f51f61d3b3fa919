"""Training drafts that fuse features of several verifier layers, as EAGLE-3 and its successors do."""

from __future__ import annotations

from abc import abstractmethod
from typing import Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field, model_validator
from torch import Tensor, nn

from specforge.bounds import Count, Layers, Width
from specforge.data.module import DraftDataModule, data_of
from specforge.errors import UsageError
from specforge.models.base_components import LayerType
from specforge.training.draft_vocabulary import check_size, chosen_vocabulary, coverage_text
from specforge.training.feature_scale import FeatureScale, FeatureScaledModule, check_feature_scale
from specforge.training.module import Batch
from specforge.training.saying import say
from specforge.verifier.features import Features, check_aux_layers
from specforge.verifier.parts import VerifierParts
from specforge_eagle3.config import default_aux_layers
from specforge_eagle3.model import Eagle3DraftModel


class FusedDraftSettings(BaseModel):
    """A draft network that fuses features of several layers; its widths, heads and positions are the verifier's."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    layer_type: LayerType = Field(
        default="llama", description="Family of the draft's layers: llama, qwen3, or one that a plugin registers."
    )
    num_layers: Layers = Field(default=1, description="Number of decoder layers.")
    intermediate_size: Width | None = Field(default=None, ge=1, description="Width of the MLPs; null: the verifier's.")
    draft_vocab_size: Count | None = Field(
        default=32000, description="Most frequent tokens that the draft can propose; null: all of them."
    )
    aux_layers: list[int] | None = Field(
        default=None, description="Verifier layers before which features are taken, ascending; null: [2, N//2, N-3]."
    )
    norm_before_residual: bool = Field(default=False, description="Start the residual stream normalised.")
    norm_before_fc: bool = Field(default=False, description="One norm over all features before they are fused.")
    feature_scale: FeatureScale = Field(
        default="auto",
        description="What features are divided by while training, folded into the written draft: a constant for each "
        "aux layer; auto: found on the first row, where no norm comes before the fusion.",
    )
    train_head: bool = Field(default=True, description="Train the draft's head, which starts as the verifier's.")

    @model_validator(mode="after")
    def _scale_has_effect(self) -> Self:
        if isinstance(self.feature_scale, list) and self.norms_features:
            raise ValueError("feature_scale has no effect if a norm comes before the features are fused")
        return self

    @property
    def norms_features(self) -> bool:
        """Whether a norm comes before the fusion."""
        return self.norm_before_fc


class FusedDraftModule(FeatureScaledModule):
    """Trains a draft that fuses features of several verifier layers.

    Args:
        draft: The draft network.
    """

    network: ClassVar[type[Eagle3DraftModel]] = Eagle3DraftModel
    draft: Eagle3DraftModel
    scaled_layer = "fc"

    def __init__(self, draft: FusedDraftSettings, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.settings = draft
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
        check_size(draft.draft_vocab_size, verifier.vocab_size)

    @property
    def aux_layers(self) -> list[int]:
        """Ids of the verifier layers that features are taken from, ascending."""
        return self._aux_layers

    def build_draft(self, parts: VerifierParts, data: DraftDataModule) -> Eagle3DraftModel:
        """Create the network: head and embeddings start as the verifier's, the rest at random."""
        settings = self.settings
        vocabulary = chosen_vocabulary(settings.draft_vocab_size, parts.config.vocab_size, data)
        draft = self.network.from_training_args(
            self.teacher.config,
            verifier_name_or_path=self.teacher.stored_name,
            layer_type=settings.layer_type,
            num_layers=settings.num_layers,
            intermediate_size=settings.intermediate_size,
            aux_layer_ids=self._aux_layers,
            norm_before_residual=settings.norm_before_residual,
            norm_before_fc=settings.norm_before_fc,
            ttt_steps=self.num_steps,
            t2d=None if vocabulary is None else vocabulary.t2d,
            **self.network_options(data),
        )
        draft.attach_verifier(parts)
        draft.borrow_weights()
        draft.lm_head.requires_grad_(settings.train_head)
        return draft

    @abstractmethod
    def network_options(self, data: DraftDataModule) -> dict[str, Any]:
        """Return the arguments of the network that only this algorithm has.

        Args:
            data: The data, set up.
        """

    def states_read(self, batch: Batch, features: Features) -> Tensor:
        """Return the features that are fused."""
        return features.aux

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Scale the features before the first step, and say what they make of the draft."""
        super().on_train_batch_start(batch, batch_idx)
        if self.trainer.global_step == 0 and batch_idx == 0 and not self.compile_steps:
            self._print_residual_sizes()

    def _print_residual_sizes(self) -> None:
        def tell(layer: nn.Module, read: tuple[Tensor, ...], written: Tensor) -> None:
            feature = read[1][:, : written.shape[1]].detach()
            read_and_added = (feature, written.detach() - feature)
            stream, added = (float(one.float().square().mean().sqrt()) for one in read_and_added)
            say(f"  root mean square of the draft's residual stream: {stream:.3g}; its first layer adds {added:.3g}")
            handle.remove()

        handle = self.draft.layers[0].register_forward_hook(tell)

    def summary_text(self) -> str:
        """Return the summary, with the coverage of the draft vocabulary."""
        return f"{super().summary_text()}\n  {coverage_text(self.draft, data_of(self.trainer))}"
