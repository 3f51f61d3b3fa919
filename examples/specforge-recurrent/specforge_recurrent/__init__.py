"""A recurrent draft for specforge."""

from __future__ import annotations

from collections.abc import Iterable

from specforge.hookspecs import Algorithm, hookimpl


@hookimpl
def specforge_algorithms() -> Iterable[Algorithm]:
    """One cell, run once per drafted token."""
    return [
        Algorithm(
            name="recurrent",
            summary="recurrent: a GRU cell over the drafted tokens, starting from the verifier's last state",
            config="specforge_recurrent.config:RecurrentConfig",
            model="specforge_recurrent.model:RecurrentModel",
            module="specforge_recurrent.module:RecurrentModule",
            data="specforge.data.module:DraftDataModule",
        )
    ]
