"""Checks of an export, on its own or with its verifier: its reader's rules, settings, tensors and outputs."""

from __future__ import annotations

import os
from collections.abc import Iterator

import torch

from specforge.checkpoints.formats import layout_of
from specforge.checkpoints.layout import Layout, StoredDraft
from specforge.checkpoints.verification import diagnosis
from specforge.checkpoints.verification.diagnosis import Fault
from specforge.checkpoints.verification.logits import attach_stand_in, difference
from specforge.checkpoints.verification.probe import Probe, digests
from specforge.checkpoints.verification.rules import file_faults
from specforge.checkpoints.verification.served import served_differences
from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.config import VerifierConfig, network_settings, verifier_difference
from specforge.errors import UsageError
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.loading import VerifierLoading, running_verifier


def export_faults(
    export: str | os.PathLike[str], verifier: str | None = None, loading: VerifierLoading | None = None
) -> list[Fault]:
    """Find all faults of an export.

    Args:
        export: Folder or hub id of an export by ``specforge export``.
        verifier: Folder or hub id of the verifier, to run the draft with it; None runs the draft on its own.
        loading: How to load the verifier.

    Raises:
        UsageError: There is no probe or no such verifier.
    """
    probe = Probe.load(export)
    layout = layout_of(probe.algorithm, probe.format)
    try:
        stored = layout.part_of(export) or StoredDraft.read(export)
    except UsageError as error:
        return [Fault(str(error), diagnosis.FILES)]
    faults = [Fault(one, f"a rule of the format {probe.format}") for one in _broken_rules(layout, stored, probe)]
    try:
        model = layout.read(stored, VerifierConfig())
    except UsageError as error:
        return [*faults, Fault(str(error), diagnosis.READING)]
    faults += _changes(model, probe)
    model.cast(torch.float32)
    faults += _computed(model, probe, explained=bool(faults))
    if verifier is not None:
        faults += _run_with_verifier(model, probe, verifier, loading)
    return faults


def _broken_rules(layout: Layout, stored: StoredDraft, probe: Probe) -> Iterator[str]:
    yield from file_faults(stored)
    yield from layout.faults(stored, probe.verifier)


def _changes(model: SpeculatorModel, probe: Probe) -> Iterator[Fault]:
    """Yield settings and tensors that have changed."""
    found = network_settings(model.config)
    # Fields that only one version of a library writes do not count.
    for name in sorted(found.keys() & probe.draft.keys()):
        if found[name] != probe.draft[name]:
            yield Fault(
                f"{name} is {found[name]}, but the draft was trained with {probe.draft[name]}",
                diagnosis.cause_of_setting(name),
            )
    stored = model.config.speculators_config
    named = stored.verifier.name_or_path if stored is not None else None
    if named is not None and named != probe.verifier.name_or_path:
        yield Fault(
            f"config.json names the verifier {named}, but the draft was trained for {probe.verifier.name_or_path}",
            diagnosis.VERIFIER,
        )
    changed = [name for name, one in digests(model.state_dict()).items() if one != probe.digests.get(name)]
    if changed:
        more = f" and {len(changed) - 4} more" if len(changed) > 4 else ""
        yield Fault(f"tensors differ from those that were exported: {', '.join(changed[:4])}{more}", diagnosis.TENSORS)


def _computed(model: SpeculatorModel, probe: Probe, explained: bool) -> Iterator[Fault]:
    """Yield differences of the draft's outputs on the stand-in's states."""
    try:
        tokens, features = attach_stand_in(model, probe.verifier)
        if model.aux_layers != probe.aux_layers:
            yield Fault(
                f"features are the inputs of layers {model.aux_layers}, but the draft was trained on "
                f"{probe.aux_layers}",
                diagnosis.cause_of_setting("layer_ids"),
            )
            return
        differs = difference(model, tokens, features, probe.alone)
    except (UsageError, RuntimeError) as error:  # a network of other sizes than the probe's
        differs = f"the draft cannot be run: {str(error).splitlines()[0]}"
    if differs:
        yield Fault(f"on the probe, {differs}", "see above" if explained else diagnosis.COMPUTED)


def _verifier_difference(there: VerifierFacts, here: VerifierFacts) -> str:
    if there.fingerprint is None or here.fingerprint is None:
        return "the weights of one of them could not be read"
    return verifier_difference(there.fingerprint, here.fingerprint)


def _run_with_verifier(
    model: SpeculatorModel, probe: Probe, verifier: str, loading: VerifierLoading | None
) -> Iterator[Fault]:
    """Yield differences of the draft's behaviour with its verifier."""
    facts = VerifierFacts.read(verifier, loading)
    if facts.fingerprint != probe.verifier.fingerprint:
        yield Fault(
            f"{verifier} is not the verifier that the draft was trained for, {probe.verifier.name_or_path}: "
            f"{_verifier_difference(probe.verifier, facts)}",
            diagnosis.VERIFIER,
        )
        return
    if probe.served is None:
        yield Fault(
            "the probe has no record of the draft with its verifier",
            "the export was made with --skip_verifier; export again without it",
        )
        return
    for one in served_differences(model, running_verifier(verifier, loading), probe.served):
        yield Fault(one, diagnosis.WITH_VERIFIER)
