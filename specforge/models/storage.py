"""A checkpoint's two files on disk: reading the tensors, and writing both so that no half-written one is left."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge.config import CONFIG_NAME
from specforge.errors import SpecforgeError, UsageError
from specforge.verifier.parts import WEIGHTS


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors file.

    Raises:
        UsageError: The file is damaged or truncated.
    """
    try:
        return load_file(path)
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is damaged or not a safetensors file: {error}") from None


def write_checkpoint(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write ``config.json`` and ``model.safetensors`` into a folder, which is created if need be.

    Both are written beside their places first, so that a full disk leaves an earlier checkpoint as it was. Other
    files in the folder are left alone.

    Raises:
        SpecforgeError: They cannot be written.
    """
    beside = {name: folder / f".{name}.{os.getpid()}" for name in (WEIGHTS, CONFIG_NAME)}
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        save_file(tensors, beside[WEIGHTS], metadata={"format": "pt"})
        beside[CONFIG_NAME].write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        for name, path in beside.items():
            os.replace(path, folder / name)
    except (OSError, SafetensorError) as error:
        for path in beside.values():
            with suppress(OSError):
                path.unlink()
        raise SpecforgeError(f"the draft cannot be written to {folder}: {error}") from error
