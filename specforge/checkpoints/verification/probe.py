"""The probe that is stored with an export, so that it can be checked anywhere: inputs and expected outputs.

The file is small JSON: engines load every safetensors file of a folder as weights.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor

from specforge.checkpoints.verifier_facts import VerifierFacts
from specforge.config import find_file, read_json
from specforge.errors import UsageError, describe_invalid

PROBE = "specforge_probe.json"


class Logits(BaseModel):
    """The largest logits of a draft at some rows of each step.

    Attributes:
        ids: The verifier's ids of the most probable tokens, [S][R][k].
        values: Their logits, [S][R][k].
    """

    model_config = ConfigDict(frozen=True)

    ids: list[list[list[int]]]
    values: list[list[list[float]]]


class ProbeText(BaseModel):
    """The verifier's response to a prompt at temperature 0.

    Attributes:
        tokens: Prompt and response.
        begin: Index of the first response token.
    """

    model_config = ConfigDict(frozen=True)

    tokens: list[int]
    begin: int


class Served(BaseModel):
    """The expected behaviour of the draft with its verifier.

    Attributes:
        texts: The verifier's responses to the probe's prompts.
        logits: The draft's logits on the first text.
        acceptance_length: Tokens per verifier forward pass over all texts, at temperature 0, by chain length.
        accept_rates: Share of the rounds that accept at least k = 1, 2, ... tokens of the longest chain.
    """

    model_config = ConfigDict(frozen=True)

    texts: list[ProbeText]
    logits: Logits
    acceptance_length: dict[int, float]
    accept_rates: list[float]

    @property
    def prompts(self) -> list[tuple[list[int], int]]:
        """The tokens of each prompt, and the number of tokens in the verifier's response."""
        return [(text.tokens[: text.begin], len(text.tokens) - text.begin) for text in self.texts]

    def expected(self, chain: int | None = None) -> float:
        """Return the acceptance length of chains of a length; of the longest recorded if that is None or longer."""
        longest = max(self.acceptance_length)
        return self.acceptance_length[min(chain or longest, longest)]


class Probe(BaseModel):
    """A record of an export at the time of writing.

    Attributes:
        algorithm: Name of the draft's algorithm.
        format: Name of the format.
        verifier: The verifier that the draft was trained for.
        aux_layers: Verifier layers whose inputs are the features; empty if the last state is enough.
        draft: Settings of the draft's network, under specforge's names.
        digests: Dtype, shape and digest of each tensor, under specforge's names.
        alone: Logits without a verifier, see ``specforge.checkpoints.verification.logits``.
        served: Behaviour of the draft with its verifier; None if the verifier was not run.
    """

    model_config = ConfigDict(frozen=True)

    algorithm: str
    format: str
    verifier: VerifierFacts
    aux_layers: list[int]
    draft: dict[str, Any]
    digests: dict[str, str]
    alone: Logits
    served: Served | None

    @classmethod
    def load(cls, export: str | os.PathLike[str]) -> Self:
        """Read the probe of an export.

        Args:
            export: Folder or hub id.

        Raises:
            UsageError: The file is missing or damaged.
        """
        try:
            path = find_file(export, PROBE)
        except UsageError as error:
            raise UsageError(f"{error}; specforge verify checks only exports of specforge export") from None
        try:
            return cls.model_validate(read_json(path))
        except ValidationError as error:
            raise UsageError(f"{path}: {describe_invalid(error)}") from None

    def save(self, folder: Path) -> None:
        """Write the probe into the folder of an export."""
        (folder / PROBE).write_text(self.model_dump_json(indent=1) + "\n", encoding="utf-8")


def digests(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Return dtype, shape and a digest of the bytes of each tensor."""
    return {name: _digest(tensor) for name, tensor in tensors.items()}


def _digest(tensor: Tensor) -> str:
    content = tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().data
    kind = str(tensor.dtype).removeprefix("torch.")
    return f"{kind} {list(tensor.shape)} {hashlib.sha256(content).hexdigest()[:16]}"
