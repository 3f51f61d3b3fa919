"""``model.draft.feature_scale``: divisors of the inputs of a draft's first layer during training.

``specforge.models.scaled_linear`` explains why, and how the divisors are folded into the written draft.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, ClassVar, Literal

import torch.nn.functional as F
from pydantic import Field
from torch import Tensor, nn

from specforge.bounds import Number
from specforge.errors import UsageError
from specforge.models.scaled_linear import ScaledLinear, largest_share, typical_size
from specforge.training.module import Batch, DraftModule
from specforge.training.saying import say
from specforge.training.totals import of_first
from specforge.verifier.features import Features

# In the quickstart's verifier, which gains from scaling, no channel holds more than 3 %; in SmolLM2, which loses, some
# hold 34 to 55 % (docs/algorithms/measured.md).
CROWDED = 0.25

Scale = Annotated[float, Field(gt=0, le=1e6), Number]
FeatureScale = Literal["auto", "none"] | list[Scale]


class FeatureScaledModule(DraftModule):
    """Trains a draft with a layer that reads raw verifier states, and divides them by constants during training.

    A subclass sets the three attributes before the run starts, and returns the layer's input (``states_read``).

    Attributes:
        scaled_layer: Name of the linear layer in the draft.
        scaled_inputs: Names of its n inputs, for messages.
        feature_scale: One number for each input, ``"auto"`` or ``"none"``.
    """

    scaled_layer: ClassVar[str]
    scaled_inputs: Sequence[str]
    feature_scale: FeatureScale

    @abstractmethod
    def states_read(self, batch: Batch, features: Features) -> Tensor:
        """Return the layer's input for a batch, [B, T, n, H].

        Args:
            batch: See ``draft_steps``.
            features: The verifier's states over the batch.
        """

    def adapt_draft(self) -> None:
        """Let the layer divide its inputs, unless scaling is off."""
        layer = self.draft.get_submodule(self.scaled_layer)
        if self.feature_scale != "none":
            assert isinstance(layer, nn.Linear)
            self.draft.set_submodule(self.scaled_layer, ScaledLinear.of(layer))

    def on_train_batch_start(self, batch: Batch, batch_idx: int) -> None:
        """Set the scale before the first step; a resumed run has it already."""
        layer = self.draft.get_submodule(self.scaled_layer)
        if self.trainer.global_step == 0 and batch_idx == 0 and isinstance(layer, ScaledLinear):
            states = self.states_read(batch, self.features_ahead(batch))[0, read_of_first_row(batch)]
            keeps_function = self.starts_from is not None
            fit_scale(layer, self.feature_scale, states, self.scaled_inputs, keeps_function)


def check_feature_scale(setting: FeatureScale, inputs: Sequence[str]) -> None:
    """Refuse a list of numbers whose length is not the number of inputs.

    Args:
        setting: The setting.
        inputs: Names of the layer's inputs, for the message.

    Raises:
        UsageError: The lengths differ.
    """
    if isinstance(setting, list) and len(setting) != len(inputs):
        raise UsageError(
            f"model.draft.feature_scale has {len(setting)} numbers; give one for each of {', '.join(inputs)}, or "
            "auto or none"
        )


def read_of_first_row(batch: Mapping[str, Tensor]) -> Tensor:
    """Return which states of a batch's first row are always stored: those before a supervised token.

    Args:
        batch: ``loss_mask`` and ``document_ids``, [B, T] each.

    Returns:
        bool [T].
    """
    supervised, documents = batch["loss_mask"][0], batch["document_ids"][0]
    read = F.pad(supervised[1:] & (documents[1:] == documents[:-1]), (0, 1))
    return read if read.any() else documents >= 0


def fit_scale(
    layer: ScaledLinear, setting: FeatureScale, states: Tensor, inputs: Sequence[str], keep_function: bool
) -> None:
    """Set the constants that a layer divides its inputs by, and print them.

    Args:
        layer: The layer; all processes hold the same one.
        setting: Numbers, or auto for the typical size of each input times the square root of their number n, so that
            their sum has the size of a single input; nothing is divided if one channel holds much of an input's energy.
        states: The layer's input for the run's first row, [T, n, H]; the first process's states are used, so that the
            scale does not depend on batch size or number of processes.
        inputs: Names of the n inputs, for the message.
        keep_function: Whether to rescale the weights so that the layer computes the same function as before.
    """
    share, largest = of_first(largest_share(states)).max(dim=0)
    if setting == "auto" and share > CROWDED:
        say(
            f"feature scale: none, as one channel holds {float(share):.0%} of the energy of {inputs[int(largest)]}: "
            "drafts for such verifiers learn faster from unscaled features (model.draft.feature_scale)"
        )
        return
    sizes = of_first(typical_size(states))
    scale = sizes.new_tensor(setting) if isinstance(setting, list) else sizes * len(sizes) ** 0.5
    layer.set_scale(scale, keep_function)
    say(
        f"feature scale: {', '.join(inputs)} have typical size {_listed(sizes)}; in training they are divided by "
        f"{_listed(scale)}"
    )


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{float(number):.3g}" for number in numbers)
