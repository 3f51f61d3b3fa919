"""Finding the format that is asked for, or the one that a draft is in."""

from __future__ import annotations

from specforge.checkpoints.layout import Layout, StoredDraft
from specforge.config import VerifierConfig
from specforge.errors import UsageError, nearest_name
from specforge.hookspecs import CheckpointFormat
from specforge.models.speculator import SpeculatorModel
from specforge.registry import installed


def layout_of(algorithm: str, name: str) -> Layout:
    """Return a format of an algorithm's drafts.

    Raises:
        UsageError: The algorithm has no such format; those that it has are listed.
    """
    own = [one for one in installed().all(CheckpointFormat).values() if one.algorithm == algorithm]
    for one in own:
        if one.name == name:
            return _load(one)
    listed = "".join(f"\n  {one.name:<16} {one.summary}" for one in own) or " none"
    raise UsageError(
        f"--format: drafts of {algorithm} have no format {name!r}.{nearest_name(name, [one.name for one in own])} "
        f"They can be written as:{listed}"
    )


def layout_in(stored: StoredDraft, name: str | None = None) -> Layout:
    """Return the format that a draft is in.

    Args:
        stored: What its files hold.
        name: Which it is to be read as; it must be that of one algorithm alone. None to find out.

    Raises:
        UsageError: No installed format recognises it, or there is none of that name.
    """
    layouts = [_load(one) for one in installed().all(CheckpointFormat).values()]
    found = [one for one in layouts if one.recognises(stored)]
    if name is not None:
        # The same name may stand for several algorithms: the draft itself tells which.
        algorithms = {one.format.algorithm for one in found}
        named = [one for one in layouts if one.format.name == name and one.format.algorithm in algorithms]
        found = named or [one for one in layouts if one.format.name == name]
    if len(found) == 1:
        return found[0]
    if found:
        several = ", ".join(f"{one.format.algorithm}/{one.format.name}" for one in found)
        raise UsageError(f"{stored.where} may be in any of several formats: {several}; give one as --format")
    names = sorted({one.format.name for one in layouts})
    known = ", ".join(names)
    if name is not None:
        raise UsageError(f"--format: there is no format {name!r}; installed: {known}.{nearest_name(name, names)}")
    raise UsageError(
        f"{stored.where} is in no known format: config.json says {_says(stored)}, and the tensors begin with "
        f"{', '.join(sorted(stored.tensors)[:4]) or 'none'}. Known formats: {known}"
    )


def read_draft(
    name_or_path: str, verifier: VerifierConfig | None = None, format: str | None = None
) -> tuple[Layout, SpeculatorModel]:
    """Read a draft in any format.

    Args:
        name_or_path: Folder or hub id.
        verifier: Its verifier; None for what the files say.
        format: Name of the format that it is in; None to find out.

    Returns:
        The format, and the draft, detached.

    Raises:
        UsageError: It is in no known format, or does not fit the one that it is in.
    """
    stored = StoredDraft.read(name_or_path)
    layout = layout_in(stored, format)
    return layout, layout.read(stored, verifier or VerifierConfig())


def _load(format: CheckpointFormat) -> Layout:
    layout: Layout = installed().load(format, "layout")(format)
    return layout


def _says(stored: StoredDraft) -> str:
    told = {name: stored.config.get(name) for name in ("speculators_model_type", "model_type", "architectures")}
    return ", ".join(f"{name} {value!r}" for name, value in told.items() if value is not None) or "nothing of its kind"
