"""What a checkpoint format does: map a draft to tensors and a configuration and back, and know its reader's rules.

Formats work on what lies in the files; finding, reading and writing the files is the same for all of them.
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
from specforge.models.storage import read_all_weights
from specforge.verifier.loading import VerifierLoading


@dataclass(frozen=True)
class StoredDraft:
    """A draft as it lies in files.

    Attributes:
        config: The parsed ``config.json``.
        tensors: All tensors by name.
        where: What to name in error messages.
    """

    config: dict[str, Any]
    tensors: dict[str, Tensor]
    where: str = "draft"

    @property
    def config_where(self) -> str:
        """What to name in error messages about the configuration."""
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
        """Tell whether a draft that nobody says anything about is to be read as this format."""

    @abstractmethod
    def read(self, stored: StoredDraft, verifier: VerifierConfig) -> SpeculatorModel:
        """Build the draft, detached.

        Args:
            stored: What the files hold.
            verifier: The verifier, noted in the draft's configuration where the format does not name one.

        Raises:
            UsageError: The configuration is wrong, or a tensor is missing, unknown or of the wrong shape; all named.
        """

    def prepare(self, model: SpeculatorModel) -> None:  # noqa: B027  (most readers want nothing)
        """Make a draft what the reader wants it to be, where the network itself has to change; mostly nothing.

        Args:
            model: The draft, attached to its verifier's parts; changed in place.
        """

    @abstractmethod
    def write(self, model: SpeculatorModel) -> StoredDraft:
        """Return what the files have to hold.

        Args:
            model: The draft, attached to its verifier's parts.

        Raises:
            UsageError: The reader would refuse the draft, or run it wrong; the reason is given.
        """

    def write_others(self, folder: Path, verifier: str, loading: VerifierLoading) -> None:  # noqa: B027  (as above)
        """Write the other files that the reader wants beside tensors and configuration; mostly none.

        Args:
            folder: Where they belong.
            verifier: Folder or hub id of the verifier.
            loading: How to load it.
        """

    def faults(self, stored: StoredDraft, verifier: VerifierFacts | None) -> Iterator[str]:
        """Yield every rule of the reader that is broken, with what the reader would do.

        Args:
            stored: What the files hold.
            verifier: What is known of the verifier; None where nothing is.
        """
        yield from ()

    @abstractmethod
    def serving(self, draft: str, verifier: str, tokens: int) -> str:
        """Return the command that serves the draft, or says what can be done with it.

        Args:
            draft: Folder or hub id of the draft.
            verifier: Folder or hub id of the verifier.
            tokens: Tokens to draft in a round.
        """
