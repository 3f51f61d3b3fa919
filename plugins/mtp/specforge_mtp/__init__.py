"""Fine-tuning of the multi-token-prediction heads that verifiers ship with, for specforge."""

from __future__ import annotations

from collections.abc import Iterable

from specforge.hookspecs import Algorithm, CheckpointFormat, hookimpl


@hookimpl
def specforge_algorithms() -> Iterable[Algorithm]:
    """The verifier's own multi-token-prediction head."""
    return [
        Algorithm(
            name="mtp",
            summary="MTP: the verifier's own multi-token-prediction head, fine-tuned",
            config="specforge_mtp.config:MtpSpeculatorConfig",
            model="specforge_mtp.model:MtpDraftModel",
            module="specforge_mtp.module:MtpModule",
            data="specforge.data.module:DraftDataModule",
        )
    ]


@hookimpl
def specforge_checkpoint_formats() -> Iterable[CheckpointFormat]:
    """The verifier's folder with another head, and the layout of speculators."""
    return [
        CheckpointFormat(
            "native",
            "the verifier's folder with this head: vLLM method mtp, SGLang, llama.cpp's converter",
            algorithm="mtp",
            layout="specforge_mtp.formats:NativeLayout",
        ),
        CheckpointFormat(
            "speculators",
            "the speculators layout, 0.9; its stitch-mtp reads it, no engine does",
            algorithm="mtp",
            layout="specforge.checkpoints.speculators:SpeculatorsLayout",
        ),
    ]
