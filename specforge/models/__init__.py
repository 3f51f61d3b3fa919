"""Draft networks: shared code, and the classes of the installed plugins.

``from specforge.models import NAME`` loads the class of that name from the plugin that provides it, on first use.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from specforge.errors import nearest_name
from specforge.hookspecs import Algorithm
from specforge.registry import installed

if TYPE_CHECKING:
    from specforge.models.speculator import SpeculatorModel

__all__ = ["SpeculatorModel"]


def __getattr__(name: str) -> Any:
    if name == "SpeculatorModel":  # on first use: the registry imports this package without torch
        from specforge.models.speculator import SpeculatorModel

        return SpeculatorModel
    references = {}
    for algorithm in installed().all(Algorithm).values():
        for attribute in ("model", "config"):
            references[getattr(algorithm, attribute).rpartition(":")[2]] = (algorithm, attribute)
    if name not in references:
        hint = nearest_name(name, references)
        raise AttributeError(
            f"no installed plugin provides {name!r}; installed: {', '.join(sorted(references))}.{hint}"
        )
    return installed().load(*references[name])
