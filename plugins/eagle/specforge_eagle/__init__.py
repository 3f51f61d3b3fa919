"""EAGLE-1 (https://arxiv.org/abs/2401.15077), EAGLE-2 (2406.16858) and HASS (2408.15766) for specforge."""

from __future__ import annotations

from collections.abc import Iterable

from specforge.hookspecs import Algorithm, CheckpointFormat, Objective, hookimpl


@hookimpl
def specforge_algorithms() -> Iterable[Algorithm]:
    """EAGLE-1; with a dynamic tree it is EAGLE-2, trained on its own features it is HASS."""
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
    """The loss of HASS."""
    return [
        Objective(
            "top_k",
            "cross-entropy over the verifier's ten most probable tokens",
            "specforge_eagle.objectives:top_k_distillation",
            closed_form=True,
        )
    ]


@hookimpl
def specforge_checkpoint_formats() -> Iterable[CheckpointFormat]:
    """The layouts of the readers of EAGLE-1 and HASS heads."""
    return [
        CheckpointFormat(
            "speculators",
            "the speculators layout, 0.4; no engine loads it",
            algorithm="eagle",
            layout="specforge.checkpoints.speculators:SpeculatorsLayout",
        ),
        CheckpointFormat(
            "vllm",
            "vLLM, method eagle (fc.*, layers.0.*; no bias)",
            algorithm="eagle",
            layout="specforge_eagle.raw:VLLMLayout",
        ),
        CheckpointFormat(
            "sglang",
            "SGLang, algorithm EAGLE (fc.*, layers.0.*; always a bias)",
            algorithm="eagle",
            layout="specforge_eagle.raw:SGLangLayout",
        ),
        CheckpointFormat(
            "eagle",
            "SafeAILab EAGLE-1 (fc.*, layers.0.*; a bias if config.json says so)",
            algorithm="eagle",
            layout="specforge_eagle.raw:SafeAILabLayout",
        ),
        CheckpointFormat(
            "hass",
            "the published HASS code (fc.*, layers.0.*; always a bias)",
            algorithm="eagle",
            layout="specforge_eagle.raw:HassLayout",
        ),
    ]
