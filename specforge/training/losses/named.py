"""Losses and weightings by the names that a configuration gives."""

from __future__ import annotations

from collections.abc import Mapping

from specforge.errors import UsageError
from specforge.hookspecs import Objective, Weighting
from specforge.registry import installed
from specforge.training.losses.comparison import Term
from specforge.training.losses.weightings import ChainWeighting


def objective_terms(objective: Mapping[str, float]) -> list[Term]:
    """Look up the losses of an objective.

    Args:
        objective: Weights by name.

    Raises:
        UsageError: The objective is empty, a name is unknown, or a weight is not positive.
    """
    if not objective:
        raise UsageError("model.objective is empty; give at least one loss, for example {kl: 1.0}")
    terms = []
    for name, weight in objective.items():
        if not 0 < weight <= 1e6:
            raise UsageError(f"model.objective.{name} must be positive, and at most 1e6, got {weight}")
        try:
            descriptor = installed().find(Objective, name)
        except UsageError as error:
            raise UsageError(f"model.objective: {error}") from None
        function = installed().load(descriptor, "function")
        reads = descriptor.uses_mean_acceptance, descriptor.uses_text, descriptor.closed_form
        terms.append(Term(name, weight, function, *reads))
    return terms


def chain_weighting(name: str) -> ChainWeighting:
    """Look up a weighting.

    Args:
        name: Its name.

    Raises:
        UsageError: The name is unknown.
    """
    try:
        descriptor = installed().find(Weighting, name)
    except UsageError as error:
        raise UsageError(f"model.weighting: {error}") from None
    function, statistic = (installed().load(descriptor, one) for one in ("function", "statistic"))
    return ChainWeighting(function, statistic, descriptor.uses_text, descriptor.closed_form)
