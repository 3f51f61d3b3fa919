"""The files that hold a checkpoint's tensors, of a verifier or of a draft."""

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
    """Return the files that hold a checkpoint's tensors: safetensors, or else ``.bin``, whole or in shards.

    Args:
        name_or_path: Folder or hub id.
        **options: Passed to ``huggingface_hub.hf_hub_download``.

    Raises:
        UsageError: There are none, or a shard is missing; the message is that of the first kind.
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
            weight_map = read_json(found).get("weight_map")
            if not isinstance(weight_map, dict):
                raise UsageError(f"{found} has no weight_map, which says what file each tensor is in")
            return [find_file(name_or_path, shard, **options) for shard in sorted(set(weight_map.values()))]
    assert missing is not None
    raise missing
