"""EAGLE-3 drafts in the ``speculators`` layout, which vLLM loads unchanged."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import cast

from specforge.checkpoints.layout import StoredDraft
from specforge.checkpoints.plain import width_faults
from specforge.checkpoints.speculators import LAYERS, SpeculatorsLayout
from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.models.speculator import SpeculatorModel
from specforge_eagle3.model import Eagle3DraftModel
from specforge_eagle3.rules import EMBEDDINGS, LAYER_IDS, layer_id_faults, tensor_faults

NUM_AUX = "num_aux_hidden_states"


class Eagle3SpeculatorsLayout(SpeculatorsLayout):
    """The layout of speculators 0.9, with every value explicit.

    It includes token embeddings, even those borrowed from the verifier: the published package leaves them uninitialised
    if a file has none (it looks for NaN, which transformers 5 no longer fills in).
    """

    def prepare(self, model: SpeculatorModel) -> None:
        """Give the draft its own copy of borrowed embeddings."""
        cast(Eagle3DraftModel, model).own_embeddings()

    def write(self, model: SpeculatorModel) -> StoredDraft:
        """Return tensors and configuration, including the layer ids and their number."""
        draft = cast(Eagle3DraftModel, model)
        stored = super().write(draft)
        # For verifiers with few layers, engines cannot use the default.
        stored.config[LAYER_IDS] = draft.aux_layers
        # vLLM assumes 3 for Llama layers.
        stored.config[LAYERS][NUM_AUX] = len(draft.aux_layers)
        stored.config[LAYERS]["tie_word_embeddings"] = False
        return stored

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield what vLLM or speculators would refuse, leave random, or run differently."""
        if EMBEDDINGS not in stored.tensors:
            yield f"{EMBEDDINGS} is missing: speculators would leave it uninitialised"
        yield from self.engine_faults(stored, verifier)

    def engine_faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield faults that also concern engines."""
        yield from super().faults(stored, verifier)
        config = stored.config
        layers = config.get(LAYERS) or {}
        if not isinstance(config.get("norm_before_residual"), bool):
            yield "norm_before_residual is not set: vLLM assumes true, speculators false"
        if any(name.startswith("midlayer.") for name in stored.tensors):
            yield "tensors are named midlayer.*: speculators would leave the decoder layer random"
        if layers.get("model_type") not in ("llama", "qwen3"):
            yield f"{LAYERS}.model_type is {layers.get('model_type')!r}; vLLM has drafts with llama and qwen3 layers"
        ids = config.get(LAYER_IDS)
        if not ids:
            yield f"{LAYER_IDS} is not set: engines use [2, N // 2, N - 3], which small verifiers do not have"
        else:
            yield from layer_id_faults(ids, verifier)
            if layers.get("model_type") == "llama" and layers.get(NUM_AUX, 3) != len(ids):
                yield f"{LAYERS}.{NUM_AUX} is {layers.get(NUM_AUX)}, but {LAYER_IDS} has {len(ids)} ids"
        yield from width_faults(config.get("target_hidden_size") or layers.get("hidden_size"), verifier)
        yield from tensor_faults(stored.tensors, config.get("draft_vocab_size"), layers.get("vocab_size"))

    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return the command of vLLM; the method is always given, because vLLM otherwise guesses it from the path."""
        speculative = json.dumps({"model": draft, "method": "eagle3", "num_speculative_tokens": tokens})
        return f"vllm serve {verifier} --speculative-config '{speculative}'"


class VLLMLayout(Eagle3SpeculatorsLayout):
    """The same layout without borrowed embeddings: vLLM shares the verifier's if a file has none."""

    def recognises(self, stored: StoredDraft) -> bool:
        """Never: it is recognised as the speculators layout."""
        return False

    def prepare(self, model: SpeculatorModel) -> None:
        """Do nothing: the draft may keep borrowing."""

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield what vLLM would refuse, leave random, or run differently."""
        yield from self.engine_faults(stored, verifier)
