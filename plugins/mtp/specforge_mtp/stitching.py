"""A verifier's folder with other tensors in place of its head's: large files are linked, not copied."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from pathlib import Path

from huggingface_hub import snapshot_download
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge.config import read_json
from specforge.errors import UsageError
from specforge.verifier.files import WEIGHTS, WEIGHTS_INDEX
from specforge.verifier.parts import files_of

HEAD_FILE = "model-mtp.safetensors"
# Other files with weights, which no reader of safetensors wants, and files that an export writes itself.
OTHER_WEIGHTS = ("*.bin", "*.pt", "*.pth", "*.gguf", "*.h5", "*.msgpack", "*.onnx", "*.bin.index.json")
NOT_COPIED = ("README.md", ".*", "*.safetensors", WEIGHTS_INDEX, *OTHER_WEIGHTS)


def write_with_head(folder: Path, verifier: str, revision: str | None, head: Mapping[str, Tensor]) -> None:
    """Write a verifier's folder with a trained head.

    Files that hold some of the head are written again with its tensors replaced, since readers load all tensors of a
    file, whatever the index says; the others are linked. Tensors that the verifier does not have are added.

    Args:
        folder: The folder to write into.
        verifier: Folder or hub id of the verifier.
        revision: Its revision on the hub.
        head: The head's tensors by their names in the verifier's files.

    Raises:
        UsageError: The verifier's files are missing or damaged, or its head has another dtype or other shapes.
    """
    source = _local(verifier, revision)
    index = files_of(str(source), None)
    left = dict(head)
    placed: dict[str, str] = {}
    for name in sorted(set(index.values())) or [WEIGHTS]:
        own = _names_in(source / name) & left.keys()
        added = left.keys() - own if not index else set()
        if own or added:
            _write_replaced(source / name, folder / name, {one: left.pop(one) for one in own | added})
            placed |= dict.fromkeys(own, name)
        else:
            _link(source / name, folder / name)
    if index:
        values = read_json(source / WEIGHTS_INDEX)
        if left:
            save_file({name: one.contiguous() for name, one in left.items()}, folder / HEAD_FILE, {"format": "pt"})
            placed |= dict.fromkeys(left, HEAD_FILE)
        values["weight_map"] |= placed
        (folder / WEIGHTS_INDEX).write_text(json.dumps(values, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    for path in source.iterdir():
        if path.is_file() and not any(path.match(pattern) for pattern in NOT_COPIED):
            shutil.copyfile(path, folder / path.name)


def _local(verifier: str, revision: str | None) -> Path:
    if Path(verifier).is_dir():
        return Path(verifier)
    try:
        return Path(snapshot_download(verifier, revision=revision, ignore_patterns=list(OTHER_WEIGHTS)))
    except Exception as error:  # offline, gated, or renamed: the hub's client has many types of errors
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise UsageError(f"the files of {verifier} are not all here and cannot be downloaded: {reason}") from error


def _names_in(path: Path) -> set[str]:
    try:
        with safe_open(path, framework="pt") as file:
            return set(file.keys())
    except (SafetensorError, OSError) as error:
        raise UsageError(f"{path} is missing, damaged or not a safetensors file: {error}") from None


def _write_replaced(source: Path, target: Path, head: Mapping[str, Tensor]) -> None:
    tensors = load_file(source)
    for name, tensor in head.items():
        before = tensors.get(name, tensor)
        if before.dtype != tensor.dtype:
            theirs, ours = (str(one.dtype).removeprefix("torch.") for one in (before, tensor))
            raise UsageError(
                f"{source} holds {name} in {theirs}, and the draft is in {ours}; give the dtype of the verifier as "
                "--dtype (bf16, fp16 or fp32)"
            )
        if before.shape != tensor.shape:
            raise UsageError(f"{source} holds {name} of {list(before.shape)}, and the draft's is {list(tensor.shape)}")
        tensors[name] = tensor.contiguous()
    save_file(tensors, target, {"format": "pt"})


def _link(source: Path, target: Path) -> None:
    """Link a file: hard, or else by name, or else copy it."""
    real = source.resolve()
    for link in (os.link, os.symlink):
        try:
            link(real, target)
            return
        except OSError:  # another file system, or one without links
            continue
    shutil.copyfile(real, target)
