"""Lookup of checkpoint formats by name, and detection of a draft's format."""

from __future__ import annotations

from specforge.checkpoints.layout import Layout, StoredDraft
from specforge.config import VerifierConfig
from specforge.errors import UsageError, nearest_name
from specforge.hookspecs import Algorithm, CheckpointFormat
from specforge.models.speculator import SpeculatorModel
from specforge.registry import installed


def layout_of(algorithm: str, name: str | None) -> Layout:
    """Return a format of an algorithm's drafts.

    Raises:
        UsageError: No name is given, or the algorithm has no such format; the message lists the existing ones.
    """
    own = [one for one in installed().all(CheckpointFormat).values() if one.algorithm == algorithm]
    for one in own:
        if one.name == name:
            return _load(one)
    listed = "".join(f"\n  {one.name:<16} {one.summary}" for one in own) or " none"
    if name is None:
        raise UsageError(f"--format: is required; drafts of {algorithm} can be written as:{listed}")
    raise UsageError(
        f"--format: drafts of {algorithm} have no format {name!r}.{nearest_name(name, [one.name for one in own])} "
        f"They can be written as:{listed}"
    )


def layout_in(stored: StoredDraft, name: str | None = None) -> Layout:
    """Return the format of a draft.

    Args:
        stored: The contents of its files.
        name: Name of the format to read it as, which must be unambiguous; None to detect it.

    Raises:
        UsageError: No installed format recognises it, or there is no format of that name.
    """
    layouts = [_load(one) for one in installed().all(CheckpointFormat).values()]
    found = [one for one in layouts if one.recognises(stored)]
    if name is not None:
        # Several algorithms may have a format of this name; the draft itself decides.
        algorithms = {one.format.algorithm for one in found}
        named = [one for one in layouts if one.format.name == name and one.format.algorithm in algorithms]
        found = named or [one for one in layouts if one.format.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(f"{one.format.algorithm}/{one.format.name}" for one in found)
        raise UsageError(f"{stored.where} matches several formats: {several}; give one as --format")
    names = sorted({one.format.name for one in layouts})
    known = ", ".join(names)
    if name is not None:
        raise UsageError(f"--format: there is no format {name!r}; installed: {known}.{nearest_name(name, names)}")
    algorithm = stored.config.get("speculators_model_type")
    of_formats = {one.format.algorithm for one in layouts}
    if isinstance(algorithm, str) and algorithm in installed().all(Algorithm) and algorithm not in of_formats:
        raise UsageError(
            f"{stored.where} is a draft of {algorithm!r}, and no installed plugin has a checkpoint format for it; its "
            "own plugin can register one, which docs/checkpoints.md explains under 'A format of your own'"
        )
    raise UsageError(
        f"the format of {stored.where} is unknown: config.json has {_type_fields(stored)}, and the first tensors are "
        f"{', '.join(sorted(stored.tensors)[:4]) or 'none'}. Known formats: {known}"
    )


def read_draft(
    name_or_path: str, verifier: VerifierConfig | None = None, format: str | None = None
) -> tuple[Layout, SpeculatorModel]:
    """Read a draft in any format.

    Args:
        name_or_path: Folder or hub id.
        verifier: Its verifier; None for the one named in the files.
        format: Name of its format; None to detect it.

    Returns:
        The format, and the draft, detached.

    Raises:
        UsageError: The format is unknown, or the files violate it.
    """
    verifier = verifier or VerifierConfig()
    for one in installed().all(CheckpointFormat).values():
        if one.name == format and (stored := (layout := _load(one)).part_of(name_or_path)) is not None:
            return layout, layout.read(stored, verifier)
    stored = StoredDraft.read(name_or_path)
    layout = layout_in(stored, format)
    return layout, layout.read(stored, verifier)


def _load(format: CheckpointFormat) -> Layout:
    layout: Layout = installed().load(format, "layout")(format)
    return layout


def _type_fields(stored: StoredDraft) -> str:
    fields = {name: stored.config.get(name) for name in ("speculators_model_type", "model_type", "architectures")}
    return ", ".join(f"{name} {value!r}" for name, value in fields.items() if value is not None) or "no model type"
