"""P-EAGLE drafts in the ``speculators`` layout, which vLLM loads as it is."""

from __future__ import annotations

import json
from collections.abc import Iterator

from specforge.checkpoints.layout import StoredDraft
from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge_eagle3.formats import Eagle3SpeculatorsLayout

MASK_STATE, MASK_TOKEN = "mask_hidden", "mask_token_id"


class PEagleSpeculatorsLayout(Eagle3SpeculatorsLayout):
    """EAGLE-3's layout, with the mask token and its state."""

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield what vLLM or speculators would refuse, leave at random, or run otherwise."""
        yield from super().faults(stored, verifier)
        config = stored.config
        if config.get("fc_norm"):
            yield "fc_norm is set: vLLM does not read it from a P-EAGLE draft, and would run the draft without"
        if MASK_STATE not in stored.tensors:
            yield f"{MASK_STATE} is missing: vLLM refuses a P-EAGLE draft without it"
        mask, size = config.get(MASK_TOKEN), (config.get("transformer_layer_config") or {}).get("vocab_size")
        if not isinstance(mask, int) or isinstance(mask, bool) or mask < 0:
            yield f"{MASK_TOKEN} is {mask!r}, and has to be the id of the mask token"
        elif isinstance(size, int) and mask >= size:
            yield f"{MASK_TOKEN} is {mask}, and the embeddings have {size} rows"
        elif mask == (config.get("transformer_layer_config") or {}).get("pad_token_id"):
            yield f"{MASK_TOKEN} is {mask}, the padding token, whose embedding trainers leave as it is"

    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return the command of vLLM; method and parallel drafting are set, as it asks for a named draft."""
        options = {"model": draft, "method": "eagle3", "parallel_drafting": True, "num_speculative_tokens": tokens}
        return f"vllm serve {verifier} --speculative-config '{json.dumps(options)}'"
