"""P-EAGLE (parallel EAGLE-3) for specforge: all tokens of a draft in one forward pass."""

from __future__ import annotations

from collections.abc import Iterable

from specforge.hookspecs import Algorithm, CheckpointFormat, hookimpl


@hookimpl
def specforge_algorithms() -> Iterable[Algorithm]:
    """EAGLE-3's network, with a mask token and a mask state at every drafted token but the first."""
    return [
        Algorithm(
            name="peagle",
            summary="P-EAGLE: EAGLE-3 that drafts all of its tokens in one forward pass",
            config="specforge_peagle.config:PEagleSpeculatorConfig",
            model="specforge_peagle.model:PEagleDraftModel",
            module="specforge_peagle.module:PEagleModule",
            data="specforge.data.module:DraftDataModule",
        )
    ]


@hookimpl
def specforge_checkpoint_formats() -> Iterable[CheckpointFormat]:
    """The layout that readers of P-EAGLE heads want."""
    return [
        CheckpointFormat(
            "speculators",
            "the speculators layout, 0.9; vLLM reads it",
            algorithm="peagle",
            layout="specforge_peagle.formats:PEagleSpeculatorsLayout",
        )
    ]
