"""A draft's files on disk: find and read its tensors, and write them atomically."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge.config import CONFIG_NAME
from specforge.errors import SpecforgeError, UsageError
from specforge.files import whole_file
from specforge.verifier.files import WEIGHTS, find_weights

# Dtypes of weights that are read, and suffixes of the further tensors that quantisers store.
FLOATS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
QUANTISED = (".weight_scale", ".weight_scale_inv", ".input_scale", ".qweight", ".qzeros", ".SCB", ".absmax")


def read_weights(path: Path) -> dict[str, Tensor]:
    """Read all tensors of a safetensors or ``.bin`` file; only tensors are unpickled from the latter.

    Raises:
        UsageError: The file is damaged or truncated, or holds other things than tensors.
    """
    if path.suffix == ".safetensors":
        try:
            return load_file(path)
        except (SafetensorError, OSError, ValueError) as error:
            raise UsageError(f"{path} is damaged or not a safetensors file: {error}") from None
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # damaged files fail in many ways
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"{path} is damaged, or holds more than tensors, so it is not loaded: {reason}") from None
    if not isinstance(content, dict) or not all(map(_is_named_tensor, content.items())):
        raise UsageError(f"{path} does not hold dense tensors by name")
    return content


def _is_named_tensor(item: tuple[Any, Any]) -> bool:
    name, one = item
    is_dense = isinstance(one, Tensor) and one.layout is torch.strided and not one.is_meta and not one.is_quantized
    return isinstance(name, str) and is_dense


def read_all_weights(name_or_path: str | os.PathLike[str], **options: Any) -> dict[str, Tensor]:
    """Read all tensors of a checkpoint (see ``find_weights`` and ``read_weights``).

    Raises:
        UsageError: A file is missing or damaged, or two of them hold the same tensor.
    """
    state: dict[str, Tensor] = {}
    for path in find_weights(name_or_path, **options):
        tensors = read_weights(path)
        if twice := sorted(state.keys() & tensors.keys()):
            raise UsageError(f"{path} and another file of {name_or_path} both hold {twice[0]}")
        state |= tensors
    if quantised := sorted(name for name, one in state.items() if _is_quantised(name, one)):
        raise UsageError(
            f"{name_or_path} holds quantised weights ({quantised[0]} is {state[quantised[0]].dtype}), FP8 or another "
            "scheme with scales, which is not supported; use weights in bfloat16, float16 or float32"
        )
    return state


def _is_quantised(name: str, tensor: Tensor) -> bool:
    is_short_float = tensor.is_floating_point() and tensor.dtype not in FLOATS
    return is_short_float or name.endswith(QUANTISED)


def write_checkpoint(folder: Path, config: Mapping[str, Any], state: Mapping[str, Tensor]) -> None:
    """Write ``config.json`` and ``model.safetensors`` into a folder, which is created if necessary.

    If the disk is full, an earlier checkpoint is unchanged. Other files in the folder are not touched.

    Raises:
        SpecforgeError: They cannot be written.
    """
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in state.items()}
    try:
        # Both are written before the first is renamed.
        with whole_file(folder / CONFIG_NAME) as config_file, whole_file(folder / WEIGHTS) as weights:
            save_file(tensors, weights, metadata={"format": "pt"})
            config_file.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    except (OSError, SafetensorError) as error:
        raise SpecforgeError(f"the draft cannot be written to {folder}: {error}") from error
