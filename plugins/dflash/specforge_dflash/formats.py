"""Block drafts in the ``speculators`` layout, as the package of that name reads it and as vLLM does."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any, cast

from specforge.checkpoints.layout import StoredDraft
from specforge.checkpoints.plain import width_faults
from specforge.checkpoints.speculators import LAYERS, SpeculatorsLayout
from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.errors import UsageError
from specforge.models.speculator import SpeculatorModel
from specforge.models.vocabulary import token_map_faults
from specforge_dflash.model import DFlashDraftModel
from specforge_dflash.rules import SLIDING, kinds_of, layer_id_faults, mask_token_faults, window_faults

LAYER_IDS = "aux_hidden_state_layer_ids"
WHOLE_BLOCKS = "sliding_window_non_causal"
FROM_ANCHOR = "sample_from_anchor"
TEMPERATURES = "confidence_temperatures"


class BlockSpeculatorsLayout(SpeculatorsLayout):
    """The layout of speculators 0.9; nothing is left to what a reader takes for granted."""

    def write(self, model: SpeculatorModel) -> StoredDraft:
        """Return tensors and configuration, without what only specforge drafts by."""
        draft = cast(DFlashDraftModel, model)
        stored = super().write(draft)
        stored.config[LAYER_IDS] = draft.aux_layers
        stored.config[LAYERS]["tie_word_embeddings"] = False
        stored.config.pop(TEMPERATURES, None)
        if SLIDING not in kinds_of(stored.config[LAYERS]):
            # The flag does not concern such layers, but vLLM makes them causal without it.
            stored.config[WHOLE_BLOCKS] = True
        return stored

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield what speculators would refuse, or run otherwise."""
        yield from super().faults(stored, verifier)
        config = stored.config
        layers: dict[str, Any] = config.get(LAYERS) or {}
        if layers.get("model_type") != "qwen3":
            yield f"{LAYERS}.model_type is {layers.get('model_type')!r}; readers have block drafts with qwen3 layers"
        for name in (FROM_ANCHOR, WHOLE_BLOCKS):
            if not isinstance(config.get(name), bool):
                yield f"{name} is not set; readers assume different defaults"
        if not isinstance(config.get("block_size"), int):
            yield "block_size is missing"
        yield from layer_id_faults(config.get(LAYER_IDS), verifier)
        yield from mask_token_faults(config.get("mask_token_id"), layers.get("vocab_size"))
        yield from window_faults(layers)
        yield from width_faults(config.get("target_hidden_size") or layers.get("hidden_size"), verifier)
        yield from token_map_faults(stored.tensors, config.get("draft_vocab_size"), layers.get("vocab_size"))
        if "d2t" in stored.tensors and "lm_head.weight" not in stored.tensors:
            yield "d2t is there, but lm_head.weight, the head of the draft vocabulary, is missing"
        if any(name.startswith(("embed_tokens.", "verifier_")) for name in stored.tensors):
            yield "the file holds the verifier's own embeddings or head; readers share those, and vLLM refuses them"


class VLLMBlockLayout(BlockSpeculatorsLayout):
    """The same, within what vLLM runs right (0.32 and 0.33)."""

    def recognises(self, stored: StoredDraft) -> bool:
        """Never: it is the speculators layout."""
        return False

    def write(self, model: SpeculatorModel) -> StoredDraft:
        """Return tensors and configuration.

        Raises:
            UsageError: vLLM would refuse the draft, or run its layers causally or otherwise than trained.
        """
        stored = super().write(model)
        if faults := list(self._engine_faults(stored)):
            raise UsageError(f"{faults[0]}; --format speculators writes the draft as it is")
        return stored

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield what vLLM would refuse, or run otherwise."""
        yield from super().faults(stored, verifier)
        yield from self._engine_faults(stored)

    def _engine_faults(self, stored: StoredDraft) -> Iterator[str]:
        config = stored.config
        kinds, whole = set(kinds_of(config.get(LAYERS) or {})), config.get(WHOLE_BLOCKS)
        if self.format.algorithm == "dspark":
            if SLIDING in kinds and whole:
                yield f"{WHOLE_BLOCKS} is true, but vLLM runs sliding layers of dspark causally within a block"
            if (kind := config.get("markov_head_type", "vanilla")) != "vanilla":
                yield f"markov_head_type is {kind!r}, and vLLM has parameters for 'vanilla' only"
            return
        if config.get(FROM_ANCHOR):
            yield f"{FROM_ANCHOR} is true, which vLLM refuses for {self.format.algorithm}"
        if "full_attention" in kinds and not whole:
            yield f"{WHOLE_BLOCKS} is false, so vLLM would run layers with full attention causally within a block"

    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return the command of vLLM; its method dflash serves DFlash2 too, by the architecture."""
        method = "dspark" if self.format.algorithm == "dspark" else "dflash"
        speculative = json.dumps({"model": draft, "method": method, "num_speculative_tokens": tokens})
        return f"vllm serve {verifier} --speculative-config '{speculative}'"
