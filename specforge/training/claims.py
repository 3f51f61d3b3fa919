"""A live run's folder belongs to one process: on one machine, with several ranks, on shared file systems.

A new folder is claimed by ``mkdir``, which on every file system succeeds for only one process. A lock on the file
``.lock`` in it is then held until the run ends. It is a POSIX record lock: the operating system releases it when the
process dies for any reason; NFS and other shared file systems propagate it to other machines; and the DataLoader's
worker processes do not inherit it, so none of them keeps it after the run is killed. The locks of filelock do not do
this: before version 4 forked processes inherit them, and without file system locks they are files that outlive a
process.
"""

from __future__ import annotations

import errno
import fcntl
import logging
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from specforge.errors import UsageError, describe_os_error
from specforge.training.runs import CHECKPOINTS, NAMES, next_number, run_of, runs

_log = logging.getLogger(__name__)

LOCK = ".lock"
# Set to 0 in the first process of a job by the launchers: Lightning's own, torchrun, srun, MPI.
RANKS = (
    *("RANK", "LOCAL_RANK", "NODE_RANK", "GROUP_RANK"),
    *("SLURM_PROCID", "PMI_RANK", "OMPI_COMM_WORLD_RANK", "JSM_NAMESPACE_RANK"),
)
_UNSUPPORTED = {errno.ENOSYS, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOLCK}
# Locks of this kind do not exclude the process that holds them.
_held: set[Path] = set()


def is_first_process() -> bool:
    """Return whether this process is the one of its job that claims and writes the run's folder."""
    return all(os.environ.get(name, "0") == "0" for name in RANKS)


def claim(held: ExitStack, output_dir: Path, name: str | None, wanted: str | None, checkpoint: Path | None) -> Path:
    """Claim the folder of a run: the folder of the checkpoint's run, or a new one.

    Args:
        held: Keeps the claim until it is closed.
        output_dir: Folder of the runs.
        name: ``run_name``, if one is set.
        wanted: The value of ``--ckpt_path``.
        checkpoint: The file that it resolves to.

    Returns:
        The folder. Only the first process of a job claims it; the others return a guess, until Lightning tells them
        where the first one saves.

    Raises:
        UsageError: Another process holds the run, the name is taken, or the checkpoint's run has another name.
    """
    run = run_of(checkpoint, output_dir)
    if not is_first_process():
        return run or output_dir / (name or f"version_{next_number(output_dir)}")
    if wanted in NAMES:
        _refuse_live(output_dir, name, wanted, run)
    if run is not None:
        if name is not None and name != run.name:
            raise UsageError(
                f"run_name: {name}, but --ckpt_path {wanted} resumes the run {run.name}; omit --run_name, or "
                "start a new run from its draft with --model.init_from"
            )
        if not held.enter_context(claimed(run, new=False)):
            raise UsageError(_live(wanted, run))
        return run
    if name is not None:
        return _claim_named(held, output_dir / name)
    number = next_number(output_dir)
    while not held.enter_context(claimed(output_dir / f"version_{number}", new=True)):
        number += 1
    return output_dir / f"version_{number}"


def _claim_named(held: ExitStack, run: Path) -> Path:
    if not held.enter_context(claimed(run, new=False)):
        raise UsageError(f"run_name: the run {run} is live: another process is writing it; choose another name")
    if (run / CHECKPOINTS).exists():
        raise UsageError(
            f"run_name: the run {run} exists already; choose another name, or resume it with --ckpt_path last"
        )
    return run


def _refuse_live(output_dir: Path, name: str | None, wanted: str, run: Path | None) -> None:
    """Refuse to resume an older run, or to start one, while a newer run is live and has saved nothing yet."""
    for other in reversed(runs(output_dir, name)):
        if is_live(other):
            raise UsageError(_live(wanted, other))
        if other == run:
            return


def _live(wanted: str | None, run: Path) -> str:
    return (
        f"--ckpt_path {wanted}: the run {run} is live: another process is writing it. Wait until it ends, or stop it; "
        "to start another run meanwhile, omit --ckpt_path"
    )


@contextmanager
def claimed(folder: Path, *, new: bool) -> Iterator[bool]:
    """Hold a run's folder for this process; a folder that is still empty at the end is removed.

    Args:
        folder: The folder of the run, which is created if it is missing.
        new: Whether the folder must not exist yet.

    Yields:
        Whether the folder is held; False if another process holds it or has created it first.

    Raises:
        UsageError: The folder cannot be created.
    """
    folder = folder.absolute()
    made = [one for one in (folder, *folder.parents) if not one.exists()]
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        folder.mkdir(exist_ok=not new)
        lock = None if folder in _held else _lock(folder / LOCK, os.O_CREAT)
    except FileExistsError as error:
        if folder.is_dir():
            lock = None
        else:
            raise UsageError(f"output_dir: {folder} cannot be created: {describe_os_error(error)}") from error
    except OSError as error:
        raise UsageError(f"output_dir: {folder} cannot be written: {error.strerror}") from error
    if lock is None:
        yield False
        return
    _held.add(folder)
    try:
        yield True
    finally:
        _held.discard(folder)
        with suppress(OSError):
            (folder / LOCK).unlink()
        os.close(lock)
        with suppress(OSError):
            for one in made:
                one.rmdir()  # succeeds only if nothing was written


def is_live(folder: Path) -> bool:
    """Return whether a process holds a run's folder."""
    folder = folder.absolute()
    if folder in _held:
        return True  # the file must not be opened: closing it would release the lock
    try:
        lock = _lock(folder / LOCK, 0)
    except OSError:  # there is no lock, or it cannot be opened
        return False
    if lock is not None:
        os.close(lock)
    return lock is None


def _lock(path: Path, flags: int) -> int | None:
    """Open and lock a file; None if another process has it locked."""
    file = os.open(path, os.O_RDWR | flags, 0o666)
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        # The previous holder may have removed the file after it was opened here: then the lock protects nothing.
        if flags and not os.path.samestat(os.fstat(file), os.stat(path)):
            raise FileNotFoundError(errno.ENOENT, "removed", str(path))
    except OSError as error:
        if error.errno in _UNSUPPORTED:
            _log.warning("%s: no locks on this file system (%s); do not start a second run in it", path, error.strerror)
            return file
        os.close(file)
        if error.errno in (errno.EACCES, errno.EAGAIN, errno.ENOENT):
            return None
        raise
    return file
