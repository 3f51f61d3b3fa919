"""Base class of checkpoint formats: they map a draft to tensors and a configuration and back, and check reader's rules.

Formats work on the contents of the files; finding, reading and writing files is the same for all of them.
"""

from __future__ import annotations

import os
from abc import ABC, abstractmethod
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

from torch import Tensor

from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.config import CONFIG_NAME, VerifierConfig, find_file, read_json
from specforge.hookspecs import CheckpointFormat
from specforge.models.speculator import SpeculatorModel
from specforge.models.storage import read_all_weights, write_checkpoint
from specforge.verifier.loading import VerifierLoading


@dataclass(frozen=True)
class StoredDraft:
    """The contents of a draft's files.

    Attributes:
        config: The parsed ``config.json``.
        tensors: All tensors by name.
        where: Name for error messages.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    where: str = "draft"

    @property
    def config_where(self) -> str:
        """Name of the configuration for error messages."""
        return f"{self.where}/{CONFIG_NAME}"

    @classmethod
    def read(cls, name_or_path: str | os.PathLike[str], **options: Any) -> Self:
        """Read all files of a draft.

        Args:
            name_or_path: Folder or hub id.
            **options: Passed to ``huggingface_hub.hf_hub_download``.

        Raises:
            UsageError: A file is missing or damaged.
        """
        config = read_json(find_file(name_or_path, CONFIG_NAME, **options))
        return cls(config, read_all_weights(name_or_path, **options), str(name_or_path))


class Layout(ABC):
    """One checkpoint format of one algorithm.

    Args:
        format: Its descriptor.
    """

    def __init__(self, format: CheckpointFormat) -> None:
        self.format = format

    @abstractmethod
    def recognises(self, stored: StoredDraft) -> bool:
        """Return whether a draft of unknown format has this format."""

    @abstractmethod
    def read(self, stored: StoredDraft, verifier: VerifierConfig) -> SpeculatorModel:
        """Build the draft, detached.

        Args:
            stored: The contents of the files.
            verifier: The verifier, stored in the draft's configuration if the format does not name one.

        Raises:
            UsageError: The configuration is wrong, or tensors are missing, unknown or of the wrong shape; all are
                named.
        """

    def prepare(self, model: SpeculatorModel) -> None:  # noqa: B027  (most readers need nothing)
        """Change the network as the reader requires; by default nothing.

        Args:
            model: The draft, attached to its verifier's parts; changed in place.
        """

    @abstractmethod
    def write(self, model: SpeculatorModel) -> StoredDraft:
        """Return the contents of the files to write.

        Args:
            model: The draft, attached to its verifier's parts.

        Raises:
            UsageError: The reader would reject the draft, or run it incorrectly; the message gives the reason.
        """

    def part_of(self, name_or_path: str | os.PathLike[str]) -> StoredDraft | None:
        """Return a draft that is stored among the tensors of another model, in this format; by default there is none.

        Args:
            name_or_path: Folder or hub id; only the draft's own tensors are read.
        """
        return None

    def save(self, stored: StoredDraft, folder: Path, verifier: str, loading: VerifierLoading) -> None:
        """Write tensors and configuration.

        Args:
            stored: The contents of the files.
            folder: Where they belong.
            verifier: Folder or hub id of the verifier.
            loading: How to load it.

        Raises:
            SpecforgeError: They cannot be written.
        """
        write_checkpoint(folder, stored.config, stored.tensors)

    def write_others(self, folder: Path, verifier: str, loading: VerifierLoading) -> None:  # noqa: B027  (as above)
        """Write the other files that the reader wants beside tensors and configuration; mostly none.

        Args:
            folder: Where they belong.
            verifier: Folder or hub id of the verifier.
            loading: How to load it.
        """

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield every violated rule of the reader, with the consequence.

        Args:
            stored: The contents of the files.
            verifier: Facts about the verifier; None if unknown.
        """
        yield from ()

    @abstractmethod
    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return the command that serves the draft, or another use of it.

        Args:
            draft: Folder or hub id of the draft.
            verifier: Folder or hub id of the verifier.
            tokens: Number of tokens to draft in a round.
        """
