"""A trained head as engines load it: in its verifier's folder."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

from specforge.checkpoints.layout import StoredDraft
from specforge.checkpoints.speculators import LAYERS, SpeculatorsLayout
from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.config import CONFIG_NAME, VerifierConfig, find_file, read_json
from specforge.errors import UsageError
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.loading import VerifierLoading
from specforge_mtp.config import MtpSpeculatorConfig
from specforge_mtp.families import COUNTS, FAMILIES, FAMILY_OF, stated_heads
from specforge_mtp.model import proposals_for
from specforge_mtp.native import PROJECTION, NativeNames, read_head
from specforge_mtp.stitching import write_with_head

# Heads in the form of Qwen3-Next's, which trainers know and no engine does.
NOT_SERVED = "qwen3"
# Engines take it that these have one head.
WITHOUT_NUMBER = ("qwen3_next",)
# Not trained, and stored wider than the rest of the head.
ROUTER_BIAS = "e_score_correction_bias"


class NativeLayout(SpeculatorsLayout):
    """The verifier's folder, with this head's tensors in place of its own."""

    def recognises(self, stored: StoredDraft) -> bool:
        """Never: to other formats, such a folder is a language model."""
        return False

    def part_of(self, name_or_path: str | os.PathLike[str]) -> StoredDraft:
        """Return the head in a verifier's folder, in the dtype of its projection."""
        where = str(name_or_path)
        values = read_json(find_file(where, CONFIG_NAME))
        config = MtpSpeculatorConfig.of_verifier(values.get("text_config") or values)
        config.speculators_config = proposals_for(VerifierConfig())
        tensors = read_head(config, where, VerifierLoading())
        dtype = tensors[PROJECTION].dtype
        stored = config.to_dict() | {"dtype": str(dtype).removeprefix("torch.")}
        return StoredDraft(stored, {name: one.to(dtype) for name, one in tensors.items()}, where)

    def save(self, stored: StoredDraft, folder: Path, verifier: str, loading: VerifierLoading) -> None:
        """Write the verifier's folder, with links to the files that do not hold the head."""
        config = MtpSpeculatorConfig.from_dict(stored.config, stored.config_where)
        names = NativeNames.of(config, verifier, loading)
        head = names.split({name: one.detach().cpu() for name, one in stored.tensors.items()})
        kept = {name for name in head if name.endswith(ROUTER_BIAS)} & set(names.stored)
        write_with_head(folder, verifier, loading.revision, {one: head[one] for one in head.keys() - kept})

    def write(self, model: SpeculatorModel) -> StoredDraft:
        """Return tensors and configuration.

        Raises:
            UsageError: No engine would run the head.
        """
        config = cast(MtpSpeculatorConfig, model.config)
        kind = config.transformer_layer_config.model_type
        read_as = [config.family.read_as or one for one, name in FAMILY_OF.items() if FAMILIES[name] is config.family]
        if kind == NOT_SERVED or kind not in read_as:
            raise UsageError(
                f"no engine runs a prediction head of {kind} verifiers, and all would leave it out; specforge itself "
                "drafts with it, and --format speculators stores it"
            )
        return super().write(model)

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield why engines would not look for the head."""
        layers: dict[str, Any] = stored.config.get(LAYERS) or {}
        if stated_heads(layers) is None and layers.get("model_type") not in WITHOUT_NUMBER:
            yield (
                f"the verifier's {CONFIG_NAME} gives no number of heads ({', '.join(COUNTS)}), so engines would not "
                "look for one; add it there"
            )

    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return the command of vLLM, which serves the folder in place of the verifier."""
        options = {"method": "mtp", "num_speculative_tokens": tokens}
        return f"vllm serve {draft} --speculative-config '{json.dumps(options)}'"
