"""Export of a draft to a reader's format: checked against its rules, with a card and a probe, written atomically."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from pathlib import Path

import torch

from specforge.checkpoints.card import CARD, card
from specforge.checkpoints.formats import layout_of, read_draft
from specforge.checkpoints.layout import Layout, StoredDraft
from specforge.checkpoints.run_record import find_draft
from specforge.checkpoints.verification.checking import export_faults
from specforge.checkpoints.verification.logits import stand_in_logits
from specforge.checkpoints.verification.probe import PROBE, Probe, digests
from specforge.checkpoints.verification.rules import file_faults
from specforge.checkpoints.verification.served import drafter_agreement, expected_of, probe_prompts
from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.checkpoints.writing import replacing_folder
from specforge.config import SpeculatorModelConfig, VerifierConfig, network_settings, verifier_difference
from specforge.data.text.prompts import Conversation
from specforge.data.text.verifier import VerifierTokenizer
from specforge.decoding.agreement import Agreement
from specforge.errors import SpecforgeError, UsageError
from specforge.models.base_components import plain_rope
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.loading import VerifierLoading, load_config, running_verifier
from specforge.verifier.parts import VerifierParts

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class ExportRequest:
    """Draft and settings of an export.

    Attributes:
        source: Run folder, draft folder or hub id.
        format: Name of the format; None is refused with the list of those of the draft's algorithm.
        output: Folder to write; None for one next to the draft, with the format in its name.
        verifier: Folder or hub id of the verifier; None for the one stored with the draft.
        loading: How to load the verifier.
        dtype: Dtype of the weights; None keeps the stored one.
        runs_verifier: Run the verifier on the probe's prompts.
        prompts: The probe's prompts; None for the first validation prompts of the run, or some plain questions.
        served_from: Folder or hub id that the draft will be served from, for the card; None for the output folder.
    """

    source: str
    format: str | None
    output: Path | None = None
    verifier: str | None = None
    loading: VerifierLoading = field(default_factory=VerifierLoading)
    dtype: torch.dtype | None = None
    runs_verifier: bool = True
    prompts: list[Conversation] | None = None
    served_from: str | None = None


@dataclass(frozen=True)
class Export:
    """Result of an export.

    Attributes:
        folder: The written folder.
        probe: The probe stored in it.
        serving: The command that serves it.
        tokens: Number of tokens that it then drafts in a round.
        agreement: Real decoding of the probe's prompts, compared with replay.
    """

    folder: Path
    probe: Probe
    serving: str
    tokens: int
    agreement: Agreement


def export(request: ExportRequest) -> Export:
    """Write a draft in a format.

    Raises:
        UsageError: The draft or its verifier cannot be read, the format cannot represent the draft, or its reader would
            run it incorrectly.
        SpecforgeError: It cannot be written, or computes something else than the draft when it is read back.
    """
    path, record = find_draft(request.source)
    _, model = read_draft(path)
    layout = layout_of(model.config.speculators_model_type, request.format)
    facts = VerifierFacts.read(_verifier_name(request, model.config), request.loading)
    _require_own_verifier(path, model.config, facts)
    model.attach_verifier(VerifierParts.from_pretrained(facts.name_or_path, request.loading))
    _adapt(model, facts, request)
    layout.prepare(model)
    stored = layout.write(model)
    if faults := [*file_faults(stored), *layout.faults(stored, facts)]:
        raise UsageError(f"this draft cannot be exported as {layout.format.name}: " + "; ".join(faults))
    output = request.output or default_output(request.source, path, layout.format.name)
    with replacing_folder(output, PROBE) as folder:
        layout.save(stored, folder, facts.name_or_path, request.loading)
        layout.write_others(folder, facts.name_or_path, request.loading)
        prompts = request.prompts if request.prompts is not None else record.prompts
        probe, agreement = _probe(model, layout, stored, facts, request, prompts)
        probe.save(folder)
        tokens = chain_length(model)
        served_from = request.served_from or str(output)
        text = card(served_from, stored, layout, probe, record, tokens)
        (folder / CARD).write_text(text, encoding="utf-8")
        if wrong := export_faults(folder):
            raise SpecforgeError(
                f"the {layout.format.name} export of {path} differs from the draft and was deleted: "
                + "; ".join(one.what for one in wrong)
            )
    return Export(output, probe, layout.serving(served_from, facts.name_or_path, tokens), tokens, agreement)


def default_output(source: str, draft: str, format: str) -> Path:
    """Return the default output folder: next to the draft, or in the working directory for a draft of the hub."""
    folder = Path(draft)
    return folder.with_name(f"{folder.name}-{format}") if folder.is_dir() else Path(f"{Path(source).name}-{format}")


def chain_length(model: SpeculatorModel) -> int:
    """Return the length of the greedy chain in the draft's stored proposal methods, by default 3."""
    stored = model.config.speculators_config
    chains = [getattr(one, "speculative_tokens", None) for one in (stored.proposal_methods if stored else [])]
    return next((one for one in chains if one), 3)


def _verifier_name(request: ExportRequest, config: SpeculatorModelConfig) -> str:
    stored = config.speculators_config
    name = request.verifier or (stored.verifier.name_or_path if stored is not None else None)
    if not name:
        raise UsageError("the draft does not name its verifier; give --verifier FOLDER_OR_HUB_ID")
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def _require_own_verifier(path: str, config: SpeculatorModelConfig, facts: VerifierFacts) -> None:
    stored = config.speculators_config.verifier if config.speculators_config is not None else VerifierConfig()
    if None not in (stored.fingerprint, facts.fingerprint) and stored.fingerprint != facts.fingerprint:
        raise UsageError(
            f"{path} was trained for the verifier {stored.name_or_path} ({stored.fingerprint}), not for "
            f"{facts.name_or_path} ({facts.fingerprint}): "
            f"{verifier_difference(str(stored.fingerprint), str(facts.fingerprint))}; give the right one as --verifier"
        )


def _adapt(model: SpeculatorModel, facts: VerifierFacts, request: ExportRequest) -> None:
    """Set the configuration fields that readers rely on, and cast the draft."""
    stored = model.config.speculators_config
    if stored is not None:
        stored.verifier = VerifierConfig.from_config(
            load_config(facts.name_or_path, request.loading), facts.name_or_path
        )
    layers = getattr(model.config, "transformer_layer_config", None)
    if layers is not None:
        # Engines that do not raise a shorter length stop accepting beyond it.
        layers.max_position_embeddings = facts.max_position_embeddings or layers.max_position_embeddings
        layers.tie_word_embeddings = False
        own, expected = plain_rope(layers.rope_parameters), plain_rope(facts.rope, getattr(layers, "head_dim", None))
        if own != expected:
            _log.warning(
                "the draft's rotary embeddings are %s, but the verifier's are %s: the draft's are written",
                own,
                expected,
            )
    if request.dtype is not None:
        model.cast(request.dtype)


def _probe(
    model: SpeculatorModel,
    layout: Layout,
    stored: StoredDraft,
    facts: VerifierFacts,
    request: ExportRequest,
    conversations: list[Conversation] | None,
) -> tuple[Probe, Agreement]:
    """Record the draft's outputs in float32, with weights rounded as written, and compare decoding with replay."""
    written = layout.read(stored, VerifierConfig())
    layers = model.aux_layers
    model.cast(torch.float32)
    alone = stand_in_logits(model, facts)
    served, agreement = None, Agreement()
    if request.runs_verifier:
        loading = request.loading
        text = VerifierTokenizer(facts.name_or_path, loading.revision, loading.trust_remote_code)
        prompts = probe_prompts(text, conversations)
        verifier = running_verifier(facts.name_or_path, loading)
        served = expected_of(model, verifier, prompts)
        agreement = drafter_agreement(model, verifier, served.texts)
    probe = Probe(
        algorithm=layout.format.algorithm,
        format=layout.format.name,
        verifier=facts,
        aux_layers=layers,
        draft=network_settings(written.config),
        digests=digests(written.state_dict()),
        alone=alone,
        served=served,
    )
    return probe, agreement
