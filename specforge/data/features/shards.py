"""One file of a store: the states of some rows, one tensor a layer, with the digests by which rows are found.

Tensors: `digests` uint8 [rows, 16], `starts` int64 [rows + 1]; for each layer k `layer.k` [tokens, H] and, for types of
one byte, `layer.k.scales` float32 [tokens]. Row r has the tokens from starts[r] to starts[r + 1].
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from specforge.data.features.manifest import Shard
from specforge.errors import SpecforgeError

_KEY = "specforge"  # one key for all: safetensors writes several in any order


def layer_name(layer: int) -> str:
    """Return the name of a layer's tensor."""
    return f"layer.{layer}"


def scales_name(layer: int) -> str:
    """Return the name of the tensor of a layer's scales."""
    return f"layer.{layer}.scales"


def write_shard(path: Path, tensors: Mapping[str, Tensor], identity: Mapping[str, Any]) -> None:
    """Write a shard; it is there whole or not at all.

    Args:
        path: The file.
        tensors: Its tensors.
        identity: What it is part of.

    Raises:
        SpecforgeError: It cannot be written.
    """
    beside = path.with_name(f".{path.name}")
    metadata = json.dumps({"sha256": _digest(tensors), "identity": identity})
    try:
        save_file(dict(tensors), beside, {_KEY: metadata})
        # safetensors lets nobody but the owner read; whoever may read the folder may read the shard.
        beside.chmod(path.parent.stat().st_mode & 0o666)
        with beside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(beside, path)
    except (OSError, SafetensorError) as error:
        beside.unlink(missing_ok=True)
        raise SpecforgeError(
            f"cannot write {path}: {error}; the shards before it are kept: mend that and run the same command again, "
            "and it goes on from there"
        ) from error


def read_shard(path: Path) -> tuple[Shard, dict[str, Any]]:
    """Return what a shard says of itself, and what it is part of.

    Raises:
        SpecforgeError: It is missing, truncated or no shard.
    """
    with open_shard(path) as file:
        try:
            metadata = json.loads(file.metadata()[_KEY])
            starts = file.get_tensor("starts")
            shard = Shard(path.name, len(starts) - 1, int(starts[-1]), path.stat().st_size, metadata["sha256"])
            return shard, metadata["identity"]
        except (SafetensorError, OSError, ValueError, KeyError, TypeError) as error:
            raise SpecforgeError(f"{path} is no shard of features: {error}") from None


def open_shard(path: Path) -> safe_open:
    """Map a shard into memory.

    Raises:
        SpecforgeError: It is missing or truncated.
    """
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise SpecforgeError(f"{path} is missing") from None
    except (SafetensorError, OSError) as error:
        raise SpecforgeError(f"{path} is damaged: {error}") from None


def check_shard(path: Path, expected: Shard) -> None:
    """Read a whole shard, and compare its tensors with their checksum.

    Raises:
        SpecforgeError: They differ, or it cannot be read.
    """
    with open_shard(path) as file:
        names = sorted(file.keys())
        if _digest({name: file.get_tensor(name) for name in names}) != expected.sha256:
            raise SpecforgeError(f"{path} is damaged: its checksum is not that of the manifest")


def _digest(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(f"{name} {tensors[name].dtype} {list(tensors[name].shape)}".encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy().data)
    return digest.hexdigest()
