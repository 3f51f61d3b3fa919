"""The files of a run, and how to find a checkpoint among them.

``<output_dir>/version_N/``, or ``<output_dir>/NAME/`` for a run with a ``run_name``, holds ``config.yaml``, the
logger's files, ``checkpoints/`` with ``last.ckpt``, the one before it in ``previous.ckpt``, and ``best.ckpt``, and, at
the end, the best draft in ``draft/``.
"""

from __future__ import annotations

import logging
import re
import zipfile
from pathlib import Path

import torch
from lightning.pytorch.utilities import rank_zero_only

from specforge.errors import UsageError

_log = logging.getLogger(__name__)

CHECKPOINTS = "checkpoints"
CONFIG = "config.yaml"
VERSION = re.compile(r"version_(\d+)")
LAST, PREVIOUS, BEST = "last.ckpt", "previous.ckpt", "best.ckpt"
NAMES = {"last": (LAST, PREVIOUS), "best": (BEST,), "auto": (LAST, PREVIOUS)}


def resolve_checkpoint(wanted: str, output_dir: Path, name: str | None = None) -> Path | None:
    """Find a complete checkpoint.

    Args:
        wanted: A file; or ``"last"`` or ``"best"`` of the newest run that has one; or ``"auto"``, which is ``"last"``
            if there is one. Damaged files and files that are not checkpoints are skipped with a warning.
        output_dir: Folder of the runs.
        name: ``run_name``; if given, only this run is searched.

    Returns:
        The file; None to start a new run, only for ``"auto"``.

    Raises:
        UsageError: There is none, or the given file is damaged or not a checkpoint.
    """
    if wanted not in NAMES:
        if wanted and Path(wanted).is_dir():
            raise UsageError(_instead_of_folder(Path(wanted)))
        if not Path(wanted).is_file():
            raise UsageError(f"--ckpt_path {wanted}: there is no such file; give a file or one of: {', '.join(NAMES)}")
        check_checkpoint(Path(wanted))
        return Path(wanted)
    for path in (run / CHECKPOINTS / file for run in reversed(runs(output_dir, name)) for file in NAMES[wanted]):
        try:
            if path.is_file():
                check_checkpoint(path)
                return path
        except UsageError as error:
            rank_zero_only(_log.warning)("skipped: %s", error)
    if wanted == "auto":
        return None
    raise UsageError(
        f"no run in {output_dir} has a complete checkpoint {wanted!r}; start one without --ckpt_path, give a file, or "
        "set --output_dir or --run_name to find the run"
    )


def _instead_of_folder(folder: Path) -> str:
    """Return what to give as ``--ckpt_path`` instead of a folder."""
    is_draft = (folder / "model.safetensors").is_file()
    checkpoints = (folder.parent if is_draft else folder) / CHECKPOINTS
    found = next((path for path in (checkpoints / LAST, checkpoints / BEST) if path.is_file()), None)
    example = f", such as {found}" if found else ""
    message = f"--ckpt_path {folder} is a folder; give a file{example}, or one of: {', '.join(NAMES)}"
    if is_draft:
        message += f". To train on from the weights of this draft: --model.init_from {folder}"
    return message


def check_checkpoint(path: Path) -> None:
    """Refuse a file that is not a complete checkpoint of a run, before anything else is loaded.

    Raises:
        UsageError: The file is damaged or not a checkpoint.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch itself compares no checksums
        content = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # damaged files fail in many ways
        reason = str(error).partition("\n")[0] or type(error).__name__
        raise UsageError(f"{path} is damaged or not a checkpoint of a run: {reason}") from error
    if damaged is not None:
        raise UsageError(f"{path} is damaged: the checksum of {damaged} in it is wrong")
    if not isinstance(content, dict) or not {"state_dict", "loops", "pytorch-lightning_version"} <= content.keys():
        raise UsageError(f"{path} is not a checkpoint of a run; runs write checkpoints/{LAST} and {BEST}")


def runs(output_dir: Path, name: str | None = None) -> list[Path]:
    """Return the folders of the runs in a folder, oldest first.

    Args:
        output_dir: The folder.
        name: ``run_name``; if given, only the run of this name, otherwise the runs without a name.
    """
    if name is not None:
        return [output_dir / name] if (output_dir / name).is_dir() else []
    numbered = {
        int(match[1]): path
        for path in (output_dir.iterdir() if output_dir.is_dir() else [])
        if (match := VERSION.fullmatch(path.name))
    }
    return [numbered[number] for number in sorted(numbered)]


def check_name(name: str) -> None:
    """Refuse a ``run_name`` that is not a valid folder name, or of the form ``version_N``.

    Raises:
        UsageError: The name is refused.
    """
    if not re.fullmatch(r"\w[\w.+=@-]{0,199}", name) or VERSION.fullmatch(name):
        raise UsageError(
            f"run_name: {name!r} is not allowed; use at most 200 letters, digits and _ . + = @ -, and "
            "not version_N, which is the name of runs without a run_name"
        )


def next_number(output_dir: Path) -> int:
    """Return N of the next new run without a name."""
    return max((int(run.name.removeprefix("version_")) for run in runs(output_dir)), default=-1) + 1


def run_of(checkpoint: Path | None, output_dir: Path) -> Path | None:
    """Return the folder of the run that a checkpoint belongs to; None to start a new run."""
    if checkpoint is None:
        return None
    run = output_dir / checkpoint.absolute().parent.parent.name
    is_below = checkpoint.absolute().parent.parent.parent == output_dir.absolute()
    return run if is_below and (VERSION.fullmatch(run.name) or (run / CONFIG).is_file()) else None
