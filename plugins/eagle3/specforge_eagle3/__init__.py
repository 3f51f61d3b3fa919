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
    """The layouts of the readers of EAGLE-3 heads."""
    return [
        CheckpointFormat(
            "speculators",
            "the speculators layout, 0.9; vLLM and llama.cpp read it",
            algorithm="eagle3",
            layout="specforge_eagle3.formats:Eagle3SpeculatorsLayout",
        ),
        CheckpointFormat(
            "vllm",
            "vLLM, method eagle3: the speculators layout without borrowed embeddings",
            algorithm="eagle3",
            layout="specforge_eagle3.formats:VLLMLayout",
        ),
        CheckpointFormat(
            "sglang",
            "SGLang, algorithm EAGLE3 (midlayer.*)",
            algorithm="eagle3",
            layout="specforge_eagle3.midlayer:SGLangLayout",
        ),
        CheckpointFormat(
            "midlayer",
            "SafeAILab EAGLE-3 (midlayer.*)",
            algorithm="eagle3",
            layout="specforge_eagle3.midlayer:MidlayerLayout",
        ),
    ]
