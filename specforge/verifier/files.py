"""Finding the files with a checkpoint's tensors, for verifiers and drafts."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from specforge.config import find_file, read_json
from specforge.errors import UsageError

WEIGHTS = "model.safetensors"
WEIGHTS_INDEX = "model.safetensors.index.json"
PICKLED = "pytorch_model.bin"
PICKLED_INDEX = "pytorch_model.bin.index.json"


def find_weights(name_or_path: str | os.PathLike[str], **options: Any) -> list[Path]:
    """Return the files with a checkpoint's tensors: safetensors, or else ``.bin``, in one file or in shards.

    Args:
        name_or_path: Folder or hub id.
        **options: Passed to ``huggingface_hub.hf_hub_download``.

    Raises:
        UsageError: There are none (the message names the safetensors file), or a shard is missing.
    """
    missing = None
    for whole, index in ((WEIGHTS, WEIGHTS_INDEX), (PICKLED, PICKLED_INDEX)):
        for name in (whole, index):
            try:
                found = find_file(name_or_path, name, **options)
            except UsageError as error:
                missing = missing or error
                continue
            if name == whole:
                return [found]
            return [find_file(name_or_path, shard, **options) for shard in _shards(found)]
    assert missing is not None
    raise missing


def _shards(index: Path) -> list[str]:
    """Return the names of the files that an index lists; all must be in its folder.

    Raises:
        UsageError: The index is malformed.
    """
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UsageError(f"{index} has no weight_map, which maps each tensor to its file")
    for name, shard in weight_map.items():
        if not isinstance(shard, str) or Path(shard).name != shard:
            raise UsageError(
                f"{index}: weight_map.{name} is {shard!r:.80}, but must be the name of a file in its folder"
            )
    return sorted(set(weight_map.values()))
