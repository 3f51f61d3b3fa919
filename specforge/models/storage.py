"""A checkpoint's files on disk: finding and reading the tensors, and writing so that no half-written one is left."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge.config import CONFIG_NAME
from specforge.errors import SpecforgeError, UsageError
from specforge.verifier.files import WEIGHTS, find_weights


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors or ``.bin`` file; of the latter, nothing but tensors is ever unpickled.

    Raises:
        UsageError: The file is damaged or truncated, or holds something else.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError) as error:
            raise UsageError(f"{path} is damaged or not a safetensors file: {error}") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in many ways
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"{path} is damaged, or holds more than tensors, which is not loaded: {reason}") from None
    if not isinstance(content, dict) or not all(isinstance(one, Tensor) for one in content.values()):
        raise UsageError(f"{path} holds something else than tensors by name")
    return content


def read_all_weights(name_or_path: str | os.PathLike[str], **options: Any) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint, see ``find_weights`` and ``read_weights``."""
    return {
        name: tensor for path in find_weights(name_or_path, **options) for name, tensor in read_weights(path).items()
    }


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
