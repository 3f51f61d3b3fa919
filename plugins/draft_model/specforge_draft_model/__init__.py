"""Small language models as drafts, distilled on the verifier's text and their own, for specforge."""

from __future__ import annotations

from collections.abc import Iterable

from specforge.hookspecs import Algorithm, CheckpointFormat, hookimpl


@hookimpl
def specforge_algorithms() -> Iterable[Algorithm]:
    """A causal language model with the verifier's tokenizer."""
    return [
        Algorithm(
            name="draft_model",
            summary="draft model: a small language model with the verifier's tokenizer, distilled towards it",
            config="specforge_draft_model.config:DraftModelConfig",
            model="specforge_draft_model.model:DraftModel",
            module="specforge_draft_model.module:DraftModelModule",
            data="specforge.data.module:DraftDataModule",
        )
    ]


@hookimpl
def specforge_checkpoint_formats() -> Iterable[CheckpointFormat]:
    """A plain folder of transformers, and our own layout."""
    return [
        CheckpointFormat(
            "speculators",
            "the speculators layout, as specforge stores it; no engine loads it",
            algorithm="draft_model",
            layout="specforge.checkpoints.speculators:SpeculatorsLayout",
        ),
        CheckpointFormat(
            "transformers",
            "a plain Hugging Face folder: vLLM draft_model, SGLang STANDALONE, llama.cpp -md, assistant_model",
            algorithm="draft_model",
            layout="specforge_draft_model.formats:TransformersLayout",
        ),
    ]
