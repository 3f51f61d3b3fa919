"""EAGLE-3 (https://arxiv.org/abs/2503.01840) and EAGLE-3.1 for specforge."""

from __future__ import annotations

from collections.abc import Iterable

from specforge.hookspecs import Algorithm, CheckpointFormat, hookimpl


@hookimpl
def specforge_algorithms() -> Iterable[Algorithm]:
    """EAGLE-3; its norm options make it EAGLE-3.1."""
    return [
        Algorithm(
            name="eagle3",
            summary="EAGLE-3: features of several verifier layers, training-time test, draft vocabulary",
            config="specforge_eagle3.config:Eagle3SpeculatorConfig",
            model="specforge_eagle3.model:Eagle3DraftModel",
            module="specforge_eagle3.module:Eagle3Module",
            data="specforge.data.module:DraftDataModule",
        )
    ]


@hookimpl
def specforge_checkpoint_formats() -> Iterable[CheckpointFormat]:
    """The layout of the published EAGLE-3 heads."""
    return [
        CheckpointFormat(
            name="midlayer",
            summary="SafeAILab EAGLE-3 and SGLang naming (midlayer.*)",
            reads="specforge_eagle3.midlayer:read",
            writes="specforge_eagle3.midlayer:write",
        )
    ]
