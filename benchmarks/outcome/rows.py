"""The packed rows that all contestants are trained on, with the verifier's states, readable in every environment.

The folder holds the verifier's parts (see ``drafting``), ``rows.json`` with the settings below, a file with the draft's
vocabulary, and a file for each packed row. States are float32: with n aux layers, a token takes ``4 (n + 1) H`` bytes.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Self

from drafting import Drafting
from safetensors.torch import load_file, save_file
from torch import Tensor


@dataclass(frozen=True)
class Rows(Drafting):
    """Packed rows in the order of a run.

    Attributes:
        folder: Folder of the rows.
        vocabulary: Size V of the verifier's vocabulary.
        steps: Draft steps of training-time test.
        aux_layers: Ids of the verifier layers that features are taken from, ascending.
        order: Packed rows of each optimizer step.
    """

    folder: str
    vocabulary: int
    steps: int
    aux_layers: list[int]
    order: list[list[int]]

    @cached_property
    def draft_ids(self) -> Tensor:
        """The verifier's ids of the draft's tokens, int64 [D], ascending."""
        return load_file(Path(self.folder) / "vocabulary.safetensors")["draft_ids"]

    def documents(self, step: int) -> list[dict[str, Tensor]]:
        """Return the documents of an optimizer step.

        Returns:
            For each, ``input_ids`` int64 [T], ``loss_mask`` bool [T], and the verifier's states ``aux`` [T, n, H] and,
            before its final norm, ``last`` [T, H].
        """
        found = []
        for number in self.order[step]:
            row = load_file(self._file(number))
            lengths = row.pop("lengths").tolist()
            columns = [tensor.split(lengths) for tensor in row.values()]
            found += [dict(zip(row, values, strict=True)) for values in zip(*columns, strict=True)]
        return found

    @classmethod
    def read(cls, folder: Path) -> Self:
        """Read what ``write`` wrote."""
        return cls(folder=str(folder), **json.loads((folder / "rows.json").read_text()))

    def write_row(self, number: int, row: Mapping[str, Tensor]) -> None:
        """Write a packed row: its concatenated documents, and their ``lengths``, int64 [documents]."""
        save_file({name: tensor.contiguous() for name, tensor in row.items()}, self._file(number))

    def write(self, draft_ids: Tensor) -> None:
        """Write the draft's vocabulary, and the settings last, which marks the folder as complete."""
        save_file({"draft_ids": draft_ids}, Path(self.folder) / "vocabulary.safetensors")
        settings = asdict(self)
        del settings["folder"]
        (Path(self.folder) / "rows.json").write_text(json.dumps(settings))

    def _file(self, number: int) -> Path:
        return Path(self.folder) / f"row-{number:06}.safetensors"
