"""States from a folder of files that vLLM's hidden-state extraction connector has written, one per request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from torch import Tensor

from specforge.data.features.file_index import index_files
from specforge.data.features.plan import ShardPlan
from specforge.data.features.served import WrongStates, engine_layer_ids, read_states
from specforge.data.rows.reading import row_digest
from specforge.errors import SpecforgeError, UsageError


class VllmStates:
    """States from a folder of these files.

    Args:
        folder: The folder.
        plan: The rows that the folder must contain.
        layers: Ids of the layers in the files.
        width: Width H of a state.
        index: File that keeps which of the files holds which row.

    Raises:
        UsageError: The folder holds no files, or lacks some of the rows.
        SpecforgeError: A file is damaged or still being written.
    """

    def __init__(self, folder: Path, plan: ShardPlan, layers: list[int], width: int, index: Path) -> None:
        self.folder = folder
        self.layers = layers
        self.width = width
        self.index = index
        self._names = index_files(folder, index)
        if not self._names:
            raise UsageError(f"--from_vllm: {folder} holds no .safetensors files")
        missing = [
            row for row, digest in zip(plan.rows, plan.digests, strict=True) if digest.tobytes() not in self._names
        ]
        if missing:
            source, row = missing[0].tolist()
            raise UsageError(
                f"--from_vllm: {folder} has no file with the tokens of {len(missing):,} of the {len(plan.rows):,} "
                f"rows (first: row {row} of source {source}); request every row by its own token ids"
            )

    def __call__(self, plan: ShardPlan, shard: range) -> Iterator[tuple[int, Tensor]]:
        """Yield the number and states [T, L, H] of each row of a shard."""
        for number, (digest, kept) in enumerate(zip(plan.digests[shard], plan.kept[shard], strict=True)):
            yield number, self._states(digest.tobytes())[: int(kept)]

    def _states(self, digest: bytes) -> Tensor:
        path = self.folder / self._names[digest]
        try:
            found = read_states(path)
        except WrongStates as error:
            raise SpecforgeError(str(error)) from None
        if row_digest(found.token_ids.numpy()) != digest:
            raise SpecforgeError(
                f"{path} was replaced after {self.index} was written; remove the latter and run the same command again"
            )
        expected = [len(found.token_ids), len(self.layers), self.width]
        if list(found.states.shape) != expected:
            raise UsageError(
                f"{path}: hidden_states has shape {list(found.states.shape)}; expected {expected} for layers "
                f"{self.layers}; start the server with eagle_aux_hidden_state_layer_ids {engine_layer_ids(self.layers)}"
            )
        return found.states
