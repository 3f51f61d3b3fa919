"""Writing a draft in the form that a reader wants: held to its rules, with a card and a probe, whole or not at all."""

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
from specforge.checkpoints.writing import written_whole
from specforge.config import SpeculatorModelConfig, VerifierConfig, meaning, verifier_difference
from specforge.data.text.prompts import Conversation
from specforge.data.text.verifier import VerifierTokenizer
from specforge.decoding.agreement import Agreement
from specforge.errors import SpecforgeError, UsageError
from specforge.models.base_components import plain_rope
from specforge.models.speculator import SpeculatorModel
from specforge.models.storage import write_checkpoint
from specforge.verifier.loading import VerifierLoading, load_config, running_verifier
from specforge.verifier.parts import VerifierParts

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Order:
    """What is to be exported, and how.

    Attributes:
        source: Run folder, draft folder or hub id.
        format: Name of the format.
        output: Folder to write; None for one beside the draft, with the format in its name.
        verifier: Folder or hub id of the verifier; None for the one that the draft names.
        loading: How to load it.
        dtype: Type of the weights; as stored when None.
        runs_verifier: Run the verifier on the probe's prompts.
        prompts: The probe's prompts; when None, the first that the run was validated on, or some plain questions.
        served_from: Where the draft will be served from, for the card; the folder when None.
    """

    source: str
    format: str
    output: Path | None = None
    verifier: str | None = None
    loading: VerifierLoading = field(default_factory=VerifierLoading)
    dtype: torch.dtype | None = None
    runs_verifier: bool = True
    prompts: list[Conversation] | None = None
    served_from: str | None = None


@dataclass(frozen=True)
class Export:
    """What was written.

    Attributes:
        folder: Where.
        probe: What travels with it.
        serving: The command that serves it.
        tokens: Tokens that it then drafts in a round.
        agreement: Real decoding of the probe's prompts beside replay.
    """

    folder: Path
    probe: Probe
    serving: str
    tokens: int
    agreement: Agreement


def export(order: Order) -> Export:
    """Write a draft in a format.

    Raises:
        UsageError: The draft or its verifier cannot be read, the format does not hold the draft, or its reader would
            run it wrong.
        SpecforgeError: It cannot be written, or does not compute what the draft does once it is read again.
    """
    path, record = find_draft(order.source)
    _, model = read_draft(path)
    layout = layout_of(model.config.speculators_model_type, order.format)
    facts = VerifierFacts.read(_verifier_name(order, model.config), order.loading)
    _require_own_verifier(path, model.config, facts)
    model.attach_verifier(VerifierParts.from_pretrained(facts.name_or_path, order.loading))
    _adapt(model, facts, order)
    layout.prepare(model)
    stored = layout.write(model)
    if faults := [*file_faults(stored), *layout.faults(stored, facts)]:
        raise UsageError(f"this draft cannot be exported as {order.format}: " + "; ".join(faults))
    output = order.output or default_output(order.source, path, order.format)
    with written_whole(output, PROBE) as folder:
        write_checkpoint(folder, stored.config, stored.tensors)
        layout.write_others(folder, facts.name_or_path, order.loading)
        prompts = order.prompts if order.prompts is not None else record.prompts
        probe, agreement = _probe(model, layout, stored, facts, order, prompts)
        probe.save(folder)
        tokens = chain_length(model)
        served_from = order.served_from or str(output)
        text = card(served_from, stored, layout, probe, record, tokens)
        (folder / CARD).write_text(text, encoding="utf-8")
        if wrong := export_faults(folder):
            raise SpecforgeError(
                f"the {order.format} export of {path} is not the draft that it was made from, and is not kept: "
                + "; ".join(one.what for one in wrong)
            )
    return Export(output, probe, layout.serving(served_from, facts.name_or_path, tokens), tokens, agreement)


def default_output(source: str, draft: str, format: str) -> Path:
    """Return the folder beside a draft that an export of it goes to; for one of the hub, in the working directory."""
    folder = Path(draft)
    return folder.with_name(f"{folder.name}-{format}") if folder.is_dir() else Path(f"{Path(source).name}-{format}")


def chain_length(model: SpeculatorModel) -> int:
    """Return how many tokens the greedy chain drafts that a draft is meant for."""
    stored = model.config.speculators_config
    chains = [getattr(one, "speculative_tokens", None) for one in (stored.proposal_methods if stored else [])]
    return next((one for one in chains if one), 3)


def _verifier_name(order: Order, config: SpeculatorModelConfig) -> str:
    stored = config.speculators_config
    name = order.verifier or (stored.verifier.name_or_path if stored is not None else None)
    if not name:
        raise UsageError("which verifier? the draft names none; give --verifier FOLDER_OR_HUB_ID")
    return str(Path(name).absolute()) if Path(name).is_dir() else name


def _require_own_verifier(path: str, config: SpeculatorModelConfig, facts: VerifierFacts) -> None:
    stored = config.speculators_config.verifier if config.speculators_config is not None else VerifierConfig()
    if None not in (stored.fingerprint, facts.fingerprint) and stored.fingerprint != facts.fingerprint:
        raise UsageError(
            f"{path} was trained for the verifier {stored.name_or_path} ({stored.fingerprint}), not for "
            f"{facts.name_or_path} ({facts.fingerprint}): "
            f"{verifier_difference(str(stored.fingerprint), str(facts.fingerprint))}; give its own as --verifier"
        )


def _adapt(model: SpeculatorModel, facts: VerifierFacts, order: Order) -> None:
    """Make a draft say what readers rely on, and cast it."""
    stored = model.config.speculators_config
    if stored is not None:
        stored.verifier = VerifierConfig.from_config(load_config(facts.name_or_path, order.loading), facts.name_or_path)
    layers = getattr(model.config, "transformer_layer_config", None)
    if layers is not None:
        # Engines that do not raise a shorter length stop accepting behind it.
        layers.max_position_embeddings = facts.max_position_embeddings or layers.max_position_embeddings
        layers.tie_word_embeddings = False
        own, expected = plain_rope(layers.rope_parameters), plain_rope(facts.rope, getattr(layers, "head_dim", None))
        if own != expected:
            _log.warning(
                "the draft's rotary positions are %s, and the verifier's %s: they are written as the draft has them",
                own,
                expected,
            )
    if order.dtype is not None:
        model.cast(order.dtype)


def _probe(
    model: SpeculatorModel,
    layout: Layout,
    stored: StoredDraft,
    facts: VerifierFacts,
    order: Order,
    conversations: list[Conversation] | None,
) -> tuple[Probe, Agreement]:
    """Record what the trained draft computes, rounded as it is written, in float32; and whether decoding does that."""
    written = layout.read(stored, VerifierConfig())
    layers = model.aux_layers
    model.cast(torch.float32)
    alone = stand_in_logits(model, facts)
    served, agreement = None, Agreement()
    if order.runs_verifier:
        loading = order.loading
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
        draft=meaning(written.config),
        digests=digests(written.state_dict()),
        alone=alone,
        served=served,
    )
    return probe, agreement
