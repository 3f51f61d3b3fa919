"""Which file of a folder holds which row: read once, then kept for later runs and other processes."""

from __future__ import annotations

import json
import os
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import BinaryIO

import numpy as np
import numpy.typing as npt
from filelock import FileLock
from tqdm import tqdm

from specforge.data.features.served import is_being_written
from specforge.data.rows.reading import row_digest
from specforge.errors import SpecforgeError
from specforge.files import whole_file

SUFFIX = ".safetensors"
# Opening many files waits for the disk or the network, more than for the processor.
THREADS, BATCH = 8, 256
LONGEST_HEADER = 2**20


def index_files(folder: Path, kept: Path) -> dict[bytes, str]:
    """Return the file name of each row of a folder, by the digest of its tokens.

    Only files that the kept index lacks are read. A file's content is checked when its states are read, so a replaced
    file is noticed then.

    Args:
        folder: A folder of files that a serving engine wrote.
        kept: File that keeps the index, for later runs and for other processes, which wait for it.

    Raises:
        SpecforgeError: A file is damaged or still being written.
    """
    if not folder.is_dir():
        return {}
    kept.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(kept.with_name(f"{kept.name}.lock")):
        listed = {entry.name for entry in os.scandir(folder)}
        names = sorted(name for name in listed if name.endswith(SUFFIX))
        known = _read(kept, folder)
        new = [name for name in names if name not in known]
        if new:
            known |= dict(zip(new, _digests(folder, new, listed), strict=True))
        found = {known[name]: name for name in names}
        if new or len(known) > len(names):
            _write(kept, folder, {name: known[name] for name in names})
    return found


def _digests(folder: Path, names: list[str], listed: set[str]) -> list[bytes]:
    def digest(name: str) -> bytes:
        path = folder / name
        if not listed.isdisjoint((f"{name}.lock", f"{path.stem}.lock")) and is_being_written(path):
            raise SpecforgeError(f"{path} is still being written; wait until the server has finished all requests")
        return row_digest(_token_ids(path))

    batches = [names[begin : begin + BATCH] for begin in range(0, len(names), BATCH)]
    found: list[bytes] = []
    with (
        ThreadPoolExecutor(THREADS) as threads,
        tqdm(desc="finding rows", total=len(names), unit=" files", disable=None, delay=2) as bar,
    ):
        for digests in threads.map(lambda batch: [digest(name) for name in batch], batches):
            found += digests
            bar.update(len(digests))
    return found


def _token_ids(path: Path) -> npt.NDArray[np.int64]:
    """Read only the tokens of a file: its header names their offsets (https://github.com/huggingface/safetensors)."""
    try:
        with path.open("rb", buffering=0) as file:
            size = int.from_bytes(_exactly(file, 8), "little")
            if size > LONGEST_HEADER:
                raise ValueError("its header is too long")
            entry = json.loads(_exactly(file, size))["token_ids"]
            begin, end = entry["data_offsets"]
            if entry["dtype"] != "I64" or entry["shape"] != [(end - begin) // 8]:
                raise ValueError("token_ids is not a list of int64")
            file.seek(8 + size + begin)
            return np.frombuffer(_exactly(file, end - begin), np.int64)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SpecforgeError(f"{path} is damaged or holds no states: {error}") from None


def _exactly(file: BinaryIO, size: int) -> bytes:
    content = file.read(size)
    if size < 0 or len(content) < size:
        raise ValueError("it ends too early")
    return content


def _read(kept: Path, folder: Path) -> dict[str, bytes]:
    """Read a kept index; one of another folder, or a damaged one, is made again."""
    try:
        with np.load(kept, allow_pickle=False) as stored:
            if str(stored["folder"]) != str(folder.resolve()):
                return {}
            names = map(os.fsdecode, stored["names"].tolist())
            return dict(zip(names, map(bytes, stored["digests"]), strict=True))
    except (OSError, ValueError, KeyError, EOFError):
        return {}


def _write(kept: Path, folder: Path, known: dict[str, bytes]) -> None:
    digests = np.frombuffer(b"".join(known.values()), np.uint8).reshape(len(known), -1)
    names = np.array([os.fsencode(name) for name in known])
    with whole_file(kept) as path, path.open("wb") as file:
        np.savez(file, folder=np.array(str(folder.resolve())), names=names, digests=digests)
