"""A recurrent draft for specforge."""

from __future__ import annotations

from collections.abc import Iterable

from specforge.hookspecs import Algorithm, hookimpl


@hookimpl
def specforge_algorithms() -> Iterable[Algorithm]:
    """One cell, run once for each drafted token."""
    return [
        Algorithm(
            name="recurrent",
            summary="recurrent: a GRU cell that reads the drafted tokens, from the verifier's last state on",
            config="specforge_recurrent.config:RecurrentConfig",
            model="specforge_recurrent.model:RecurrentModel",
            module="specforge_recurrent.module:RecurrentModule",
            data="specforge.data.module:DraftDataModule",
        )
    ]
