"""``model.draft.feature_scale``: what a draft's first layer divides its inputs by while it is trained.

``specforge.models.scaled_linear`` says why, and how the division folds into the written draft.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Annotated, Literal

from pydantic import Field
from torch import Tensor

from specforge.bounds import Number
from specforge.errors import UsageError
from specforge.models.scaled_linear import ScaledLinear, typical_size
from specforge.training.saying import say
from specforge.training.totals import of_first

Scale = Annotated[float, Field(gt=0, le=1e6), Number]
FeatureScale = Literal["auto", "none"] | list[Scale]


def check_feature_scale(setting: FeatureScale, inputs: Sequence[str]) -> None:
    """Refuse numbers that are not one for each input.

    Args:
        setting: The setting.
        inputs: What the layer reads, in words.

    Raises:
        UsageError: There are more or fewer.
    """
    if isinstance(setting, list) and len(setting) != len(inputs):
        raise UsageError(
            f"model.draft.feature_scale has {len(setting)} numbers; give one for each of: {', '.join(inputs)}; or "
            "auto, or none"
        )


def fit_scale(
    layer: ScaledLinear, setting: FeatureScale, states: Tensor, inputs: Sequence[str], keep_function: bool
) -> None:
    """Let a layer divide its inputs by constants, and say by which.

    Args:
        layer: The layer; all processes hold the same one.
        setting: Numbers, or auto for the typical size of each input times the square root of their number n, so that
            their sum has the size of one.
        states: What the layer reads in the run's first row, [T, n, H]; those of the first process are taken, so that
            nothing depends on how rows are batched and spread.
        inputs: What they are, in words.
        keep_function: Whether the layer goes on computing what it did.
    """
    sizes = of_first(typical_size(states))
    scale = sizes.new_tensor(setting) if isinstance(setting, list) else sizes * len(sizes) ** 0.5
    layer.set_scale(scale, keep_function)
    say(
        f"feature scale: {', '.join(inputs)} are of typical size {_listed(sizes)}; while training they are divided by "
        f"{_listed(scale)}"
    )


def _listed(numbers: Iterable[float]) -> str:
    return ", ".join(f"{float(number):.3g}" for number in numbers)
