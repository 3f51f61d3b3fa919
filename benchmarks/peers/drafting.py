"""The common parts of the peers' tasks: a folder with the verifier's parts, the draft's vocabulary and its steps."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor


class Drafting(ABC):
    """A draft for a verifier whose parts are in a folder.

    Attributes:
        folder: Folder of the task.
        vocabulary: Size V of the verifier's vocabulary.
        steps: Draft steps of training-time test.
        aux_layers: Ids of the verifier layers that features are taken from, ascending.
    """

    folder: str
    vocabulary: int
    steps: int
    aux_layers: Sequence[int]

    @property
    @abstractmethod
    def draft_ids(self) -> Tensor:
        """The verifier's ids of the draft's tokens, int64 [D], ascending."""

    @property
    def verifier(self) -> Path:
        """Folder of the verifier."""
        return Path(self.folder) / "verifier"

    @property
    def t2d(self) -> Tensor:
        """Which of the verifier's tokens are the draft's, bool [V]."""
        chosen = torch.zeros(self.vocabulary, dtype=torch.bool)
        chosen[self.draft_ids] = True
        return chosen

    @property
    def d2t(self) -> Tensor:
        """The offset of each draft token to the verifier's id, int64 [D]."""
        return self.draft_ids - torch.arange(len(self.draft_ids))

    def write_verifier(self, config: Mapping[str, Any], embeddings: Tensor, norm: Tensor, head: Tensor) -> None:
        """Write the verifier's folder, with its parts in one file and the index that one package requires.

        Args:
            config: Its ``config.json``.
            embeddings: Token embeddings, [V, H].
            norm: Weight of the final norm, [H].
            head: The head, [V, H].
        """
        parts = {"model.embed_tokens.weight": embeddings, "model.norm.weight": norm, "lm_head.weight": head}
        self.verifier.mkdir()
        save_file(parts, self.verifier / "model.safetensors", metadata={"format": "pt"})
        index = {"weight_map": dict.fromkeys(parts, "model.safetensors")}
        (self.verifier / "model.safetensors.index.json").write_text(json.dumps(index))
        (self.verifier / "config.json").write_text(json.dumps(config))
