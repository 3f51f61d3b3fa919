"""Identifying verifiers by what determines their states: their tensors and the computation that config.json describes.

Names, paths and the split into files do not count. The tokenizer has a separate digest, see ``specforge.data.rows``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from mmap import MADV_RANDOM, MADV_WILLNEED, PAGESIZE, PROT_READ, mmap
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from numpy.lib.stride_tricks import sliding_window_view
from transformers import PreTrainedConfig

from specforge.config import NOT_COMPUTED
from specforge.errors import UsageError
from specforge.verifier.files import find_weights
from specforge.verifier.loading import VerifierLoading, load_config

# Tensors up to 256 KiB are read whole. Of larger ones, one block of 2 KiB per MiB is read, at least 16 blocks: about
# 40 MB of 16 GB.
WHOLE_BYTES = 2**18
BLOCK_BYTES = 2**11
BYTES_PER_BLOCK = 2**20
LEAST_BLOCKS = 16

_Bytes = npt.NDArray[np.uint8]
_Tensor = tuple[str, list[int], _Bytes]
"""Name, shape and content."""


def fingerprint(name_or_path: str, loading: VerifierLoading | None = None) -> str:
    """Return a verifier's fingerprint: 16 hexadecimal digits for its tensors, a dash, and 8 for its computation.

    It covers names, shapes and sizes of all tensors and a sample spread over each; quantised tensors count as stored.
    Of ``config.json`` it covers all fields that can change the computation.

    Args:
        name_or_path: Folder or hub id of the verifier.
        loading: Its revision, and whether to trust its code. Default: ``VerifierLoading()``.

    Raises:
        UsageError: There is no such verifier, it has no weights, or a file is damaged.
    """
    loading = loading or VerifierLoading()
    fields = json.dumps(_computation(load_config(name_or_path, loading)), default=str)
    computation = json.dumps(json.loads(fields, parse_int=float), sort_keys=True)  # 10000 and 10000.0 are the same
    files = find_weights(name_or_path, revision=loading.revision)
    tensors = sorted(one for file in files for one in _tensors(file))
    return f"{_digest(chr(10).join(tensors).encode())[:16]}-{_digest(computation.encode())[:8]}"


def _computation(config: PreTrainedConfig) -> dict[str, Any]:
    """Return the fields of a configuration that affect the computation, without its family's defaults.

    A default counts the same whether or not it is written: versions of transformers differ in what they write.
    """
    found: dict[str, Any] = {"model_type": config.model_type}
    for name, value in config.to_dict().items():
        if name in NOT_COMPUTED or name.startswith("_") or value == getattr(type(config), name, None):
            continue
        # Only nested configurations are looked up: Gemma 4 has no single value for what differs by layer.
        part = getattr(config, name, None) if isinstance(value, dict) else None
        found[name] = _computation(part) if isinstance(part, PreTrainedConfig) else value
    return found


def _tensors(path: Path) -> Iterator[str]:
    """Yield name, shape, size and digest of each tensor of a file; only samples are read."""
    read = _safetensors if path.suffix == ".safetensors" else _pickled
    try:
        for name, shape, content in read(path):
            yield f"{name} {shape} {content.size} {_digest(_sample(content))}"
    except Exception as error:  # damaged files fail in many ways
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"{path} is damaged or does not hold named tensors: {reason}") from None


def _safetensors(path: Path) -> Iterator[_Tensor]:
    with path.open("rb") as file:
        mapped = mmap(file.fileno(), 0, prot=PROT_READ)
    # By default the kernel reads ahead around each block, which adds up to the whole file.
    mapped.madvise(MADV_RANDOM)
    begin = 8 + int.from_bytes(mapped[:8], "little")
    header, content = json.loads(mapped[8:begin]), np.frombuffer(mapped, np.uint8)[begin:]
    header.pop("__metadata__", None)
    tensors = [(name, one["shape"], *one["data_offsets"]) for name, one in header.items()]
    for name, _, first, last in tensors:
        if not 0 <= first <= last <= content.size:
            raise ValueError(f"the file ends before its tensor {name}")
        # All blocks are requested at once, so that the disk can read many in parallel.
        for offset in _offsets(last - first).tolist():
            page = (begin + first + offset) // PAGESIZE * PAGESIZE
            mapped.madvise(MADV_WILLNEED, page, min(BLOCK_BYTES + PAGESIZE, len(mapped) - page))
    for name, shape, first, last in tensors:
        yield name, shape, content[first:last]


def _pickled(path: Path) -> Iterator[_Tensor]:
    for name, tensor in torch.load(path, map_location="cpu", weights_only=True, mmap=True).items():
        yield name, list(tensor.shape), tensor.contiguous().flatten().view(torch.uint8).numpy()


def _sample(content: _Bytes) -> bytes:
    if content.size <= WHOLE_BYTES:
        return content.tobytes()
    return sliding_window_view(content, BLOCK_BYTES)[_offsets(content.size)].tobytes()


def _offsets(size: int) -> npt.NDArray[np.int64]:
    """Return the offsets of the sampled blocks of a tensor, from its first to its last byte.

    Their distance is not a multiple of the row size, so that they cover all columns.
    """
    number = max(LEAST_BLOCKS, size // BYTES_PER_BLOCK)
    return np.linspace(0, max(0, size - BLOCK_BYTES), number).astype(np.int64)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
