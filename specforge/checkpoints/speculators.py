"""The ``speculators`` layout, specforge's own format for drafts of every algorithm."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from specforge.checkpoints.layout import Layout, StoredDraft
from specforge.checkpoints.plain import position_faults, with_legacy_rope
from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.config import SpeculatorModelConfig, VerifierConfig
from specforge.models.speculator import SpeculatorModel, network_of

LAYERS = "transformer_layer_config"
TYPE = "speculators_model_type"


class SpeculatorsLayout(Layout):
    """Stores all tensors under their own names, and all fields that readers of the layout assume."""

    def recognises(self, stored: StoredDraft) -> bool:
        """Return whether the type field names the algorithm."""
        return bool(stored.config.get(TYPE) == self.format.algorithm)

    def read(self, stored: StoredDraft, verifier: VerifierConfig) -> SpeculatorModel:
        """Build the draft; the given verifier takes precedence over the one named in the files."""
        config = SpeculatorModelConfig.from_dict(stored.config, stored.config_where)
        if verifier.name_or_path and config.speculators_config is not None:
            config.speculators_config.verifier = verifier
        return network_of(config).from_state(config, stored.tensors, stored.where)

    def write(self, model: SpeculatorModel) -> StoredDraft:
        """Return tensors and configuration."""
        config = model.stored_config()
        # It names Python files that only the original writer had.
        config.pop("auto_map", None)
        if LAYERS in config:
            config[LAYERS] = with_legacy_rope(config[LAYERS])
        return StoredDraft(config, model.state_dict())

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield missing and harmful fields."""
        if "model_type" in stored.config:
            yield (
                f"config.json has a top-level model_type, {stored.config['model_type']!r}: vLLM reads the layout "
                "only without one"
            )
        if stored.config.get(TYPE) != self.format.algorithm:
            yield f"{TYPE} is {stored.config.get(TYPE)!r}, not {self.format.algorithm!r}"
        speculators: dict[str, Any] = stored.config.get("speculators_config") or {}
        if not (speculators.get("verifier") or {}).get("name_or_path"):
            yield "speculators_config.verifier.name_or_path is missing: readers cannot find the verifier"
        if isinstance(stored.config.get(LAYERS), dict):
            yield from position_faults(stored.config[LAYERS], verifier)

    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return the command to use the draft with specforge: no engine loads the layout for every algorithm."""
        return f"specforge generate {draft} --verifier {verifier}"
