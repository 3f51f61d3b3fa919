"""Draft models as plain folders of transformers, which engines and llama.cpp load like any other model."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import cast

import torch
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from specforge.checkpoints.layout import Layout, StoredDraft
from specforge.checkpoints.plain import NON_LAYER_FIELDS, with_legacy_rope
from specforge.checkpoints.speculators import TYPE
from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.config import VerifierConfig
from specforge.data.text.verifier import VerifierTokenizer
from specforge.errors import UsageError
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.loading import VerifierLoading
from specforge_draft_model.config import DraftModelConfig
from specforge_draft_model.model import DraftModel, proposals_for

PREFIX = "language_model."


class TransformersLayout(Layout):
    """What ``AutoModelForCausalLM.from_pretrained`` reads, with the verifier's tokenizer beside it."""

    def recognises(self, stored: StoredDraft) -> bool:
        """Tell by the architecture, which is that of the model type, and names of tensors that begin as its do."""
        architecture = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(stored.config.get("model_type"))
        if TYPE in stored.config or architecture is None or stored.config.get("architectures") != [architecture]:
            return False
        return any(name.startswith(("model.layers.0.", "transformer.h.0.")) for name in stored.tensors)

    def read(self, stored: StoredDraft, verifier: VerifierConfig) -> DraftModel:
        """Build the draft; a head that is tied may be stored twice."""
        values = {name: one for name, one in stored.config.items() if name not in NON_LAYER_FIELDS}
        config = DraftModelConfig.from_dict({"language_model": values}, stored.config_where)
        config.speculators_config = proposals_for(verifier)
        state = {PREFIX + name: tensor for name, tensor in stored.tensors.items()}
        with torch.device("meta"):
            own = DraftModel(config).state_dict().keys()
        tables = [tensor for name, tensor in state.items() if name in own and tensor.ndim == 2]
        for name in [one for one in state if one not in own]:
            if any(one.shape == state[name].shape and torch.equal(one, state[name]) for one in tables):
                del state[name]
        return DraftModel.from_state(config, state, stored.where)

    def write(self, model: SpeculatorModel) -> StoredDraft:
        """Return tensors and configuration under the names of transformers; a head that is tied is left out."""
        draft = cast(DraftModel, model)
        own = draft.config.language_model
        config = {
            **with_legacy_rope(draft.config.serialize_language_model(own)),
            "architectures": [type(draft.language_model).__name__],
            "dtype": str(draft.dtype).removeprefix("torch."),
        }
        tensors = {name.removeprefix(PREFIX): tensor for name, tensor in draft.state_dict().items()}
        return StoredDraft(config, tensors)

    def write_others(self, folder: Path, verifier: str, loading: VerifierLoading) -> None:
        """Write the verifier's tokenizer, which llama.cpp's converter and transformers ask for; if it has one."""
        try:
            tokenizer = VerifierTokenizer(verifier, loading.revision, loading.trust_remote_code).tokenizer
        except UsageError:  # a verifier of rows of tokens
            return
        tokenizer.save_pretrained(folder)

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield what readers would refuse or take otherwise."""
        config = stored.config
        expected = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.get("model_type"))
        if config.get("architectures") != [expected]:
            yield f"architectures is {config.get('architectures')}, not [{expected!r}]"
        if verifier is not None and (config.get("vocab_size") or 0) > verifier.vocab_size:
            yield f"vocab_size is {config.get('vocab_size')}, but the verifier has only {verifier.vocab_size} tokens"

    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return the command of vLLM."""
        speculative = json.dumps({"method": "draft_model", "model": draft, "num_speculative_tokens": tokens})
        return f"vllm serve {verifier} --speculative-config '{speculative}'"
