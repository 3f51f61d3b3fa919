"""Telling verifiers apart by their weights, whatever they are called and wherever they lie."""

from __future__ import annotations

import hashlib
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from specforge.config import find_file
from specforge.errors import UsageError
from specforge.verifier.parts import WEIGHTS, files_of


def fingerprint(name_or_path: str, revision: str | None = None) -> str:
    """Return 16 hexadecimal digits that other weights would change.

    Names, types and shapes of all tensors count, and the first row of each: enough to tell a fine-tuned or converted
    verifier from its origin without reading all of it.

    Args:
        name_or_path: Folder or hub id of the verifier.
        revision: Branch, tag or commit on the hub.

    Raises:
        UsageError: The verifier has no safetensors files, or they are damaged.
    """
    names = sorted(set(files_of(name_or_path, revision).values())) or [WEIGHTS]
    rows = [row for name in names for row in _tensor_digests(find_file(name_or_path, name, revision=revision))]
    return hashlib.sha256("\n".join(sorted(rows)).encode()).hexdigest()[:16]


def _tensor_digests(path: Path) -> list[str]:
    digests = []
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (safe_open is no mapping)
                part = file.get_slice(name)
                shape = part.get_shape()
                first = part[:1] if shape else file.get_tensor(name)
                content = first.contiguous().flatten().view(torch.uint8).numpy()
                digest = hashlib.sha256(content).hexdigest()
                digests.append(f"{name} {part.get_dtype()} {shape} {digest}")
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is damaged or not a safetensors file: {error}") from None
    return digests
