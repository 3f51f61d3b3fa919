"""Formats on folders, as commands use them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from specforge.checkpoints.layout import Layout, StoredDraft
from specforge.config import VerifierConfig
from specforge.hookspecs import CheckpointFormat
from specforge.models.storage import write_checkpoint
from specforge.registry import installed


def layout(key: str) -> Layout:
    """Return a format, such as ``eagle/vllm``."""
    descriptor = installed().find(CheckpointFormat, key)
    made: Layout = installed().load(descriptor, "layout")(descriptor)
    return made


def read(key: str, folder: Path, verifier: str | None = None) -> Any:
    """Read a draft in a format, detached."""
    known = VerifierConfig.from_pretrained(verifier) if verifier else VerifierConfig()
    return layout(key).read(StoredDraft.read(folder), known)


def write(key: str, model: Any, folder: Path) -> None:
    """Write a draft in a format."""
    stored = layout(key).write(model)
    write_checkpoint(folder, stored.config, stored.tensors)
