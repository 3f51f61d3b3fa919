"""EAGLE-1 (https://arxiv.org/abs/2401.15077), EAGLE-2 (2406.16858) and HASS (2408.15766) for specforge."""

from __future__ import annotations

from collections.abc import Iterable

from specforge.hookspecs import Algorithm, CheckpointFormat, Objective, hookimpl


@hookimpl
def specforge_algorithms() -> Iterable[Algorithm]:
    """EAGLE-1; proposed by a dynamic tree it is EAGLE-2, trained on its own features HASS."""
    return [
        Algorithm(
            name="eagle",
            summary="EAGLE-1, EAGLE-2, HASS: the verifier's last feature, its embeddings and its head",
            config="specforge_eagle.config:EagleSpeculatorConfig",
            model="specforge_eagle.model:EagleSpeculator",
            module="specforge_eagle.module:EagleModule",
            data="specforge.data.module:DraftDataModule",
        )
    ]


@hookimpl
def specforge_objectives() -> Iterable[Objective]:
    """What HASS adds to the losses of the core."""
    return [
        Objective(
            "top_k",
            "cross-entropy over the verifier's ten most probable tokens",
            "specforge_eagle.objectives:top_k_distillation",
        )
    ]


@hookimpl
def specforge_checkpoint_formats() -> Iterable[CheckpointFormat]:
    """The layout of the published EAGLE-1 heads."""
    return [
        CheckpointFormat(
            name="eagle",
            summary="SafeAILab EAGLE-1, vLLM and SGLang naming (fc.*, layers.0.*)",
            reads="specforge_eagle.raw:read",
            writes="specforge_eagle.raw:write",
        )
    ]
