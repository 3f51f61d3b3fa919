"""Rules that every reader of a block draft has."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.errors import UsageError
from specforge.verifier.features import check_aux_layers

SLIDING = "sliding_attention"


def layer_id_faults(ids: Any, verifier: VerifierFacts | None) -> Iterator[str]:
    """Yield what is wrong with the ids of the layers before which features are taken.

    Args:
        ids: As specforge counts them: k is the state before decoder layer k.
        verifier: What is known of the verifier; None where nothing is.
    """
    if not isinstance(ids, list) or not ids:
        yield "the layers that features are taken from are not listed; readers would assume their own default"
        return
    number = verifier.num_hidden_layers if verifier is not None else max(ids) + 1
    try:
        check_aux_layers(ids, number)
    except UsageError as error:
        yield str(error)
    if ids[-1] == number:
        yield (
            f"features are taken after the last layer, {number}: engines have that state after the final norm, or not "
            "at all; train with lower model.draft.aux_layers"
        )


def mask_token_faults(token: Any, size: int | None) -> Iterator[str]:
    """Yield what is wrong with the mask token.

    Args:
        token: Its id in ``config.json``.
        size: Number V of the verifier's ids; None where it is not known.
    """
    if not isinstance(token, int):
        yield "mask_token_id is missing: readers would assume an id of another verifier"
    elif size is not None and not 0 <= token < size:
        yield f"mask_token_id {token} is outside the verifier's table of {size} tokens"


def window_faults(layers: dict[str, Any]) -> Iterator[str]:
    """Yield layers that slide without a window."""
    if SLIDING in kinds_of(layers) and not layers.get("sliding_window"):
        yield "layer_types has sliding layers, but sliding_window is not set"


def kinds_of(layers: dict[str, Any]) -> Sequence[str]:
    """Return what each decoder layer attends to: ``full_attention`` where nothing is listed."""
    return layers.get("layer_types") or ["full_attention"] * int(layers.get("num_hidden_layers", 1))
