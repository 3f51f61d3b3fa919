"""Which verifier layers a block drafter reads where none are chosen."""

from __future__ import annotations


def spread_aux_layers(verifier_layers: int, number: int) -> list[int]:
    """Spread aux layers evenly, as the published DFlash drafts do (z-lab/dflash).

    Args:
        verifier_layers: Number N of the verifier's decoder layers.
        number: Number n of aux layers.

    Returns:
        Ids of the layers before which features are taken, ascending: 2 + round(i (N - 4) / (n - 1)), or the middle one
        for a single layer; fewer than n where the verifier has not so many.
    """
    if number == 1:
        return [min(verifier_layers // 2 + 1, verifier_layers)]
    last = max(verifier_layers - 4, 0)
    spread = {2 + round(index * last / (number - 1)) for index in range(number)}
    return sorted({min(layer, verifier_layers) for layer in spread})


def usual_aux_layers(verifier_layers: int) -> list[int]:
    """Return what speculators and vLLM read if a configuration lists no layers: [2, N // 2, N - 3].

    Args:
        verifier_layers: Number N of the verifier's decoder layers.
    """
    return [2, verifier_layers // 2, verifier_layers - 3]
