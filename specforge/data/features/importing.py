"""States from a folder of files that vLLM's hidden-state extraction connector has written, one per request."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from torch import Tensor
from tqdm import tqdm

from specforge.data.features.plan import ShardPlan
from specforge.data.features.served import WrongStates, engine_layer_ids, is_being_written, read_states
from specforge.data.rows.reading import row_digest
from specforge.errors import SpecforgeError, UsageError


class VllmStates:
    """States from a folder of these files.

    Args:
        folder: The folder.
        plan: The rows that the folder must contain.
        layers: Ids of the layers in the files.
        width: Width H of a state.

    Raises:
        UsageError: The folder holds no files, or lacks some of the rows.
        SpecforgeError: A file is damaged or still being written.
    """

    def __init__(self, folder: Path, plan: ShardPlan, layers: list[int], width: int) -> None:
        self.folder = folder
        self.layers = layers
        self.width = width
        paths = sorted(folder.glob("*.safetensors"))
        if not paths:
            raise UsageError(f"--from_vllm: {folder} holds no .safetensors files")
        bar = tqdm(paths, desc="finding rows", unit=" files", disable=None, delay=2)
        self._paths = {row_digest(_token_ids(path)): path for path in bar}
        missing = [
            row for row, digest in zip(plan.rows, plan.digests, strict=True) if digest.tobytes() not in self._paths
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
            yield number, self._states(self._paths[digest.tobytes()])[: int(kept)]

    def _states(self, path: Path) -> Tensor:
        try:
            found = read_states(path)
        except WrongStates as error:
            raise SpecforgeError(str(error)) from None
        expected = [len(found.token_ids), len(self.layers), self.width]
        if list(found.states.shape) != expected:
            raise UsageError(
                f"{path}: hidden_states has shape {list(found.states.shape)}; expected {expected} for layers "
                f"{self.layers}; start the server with eagle_aux_hidden_state_layer_ids {engine_layer_ids(self.layers)}"
            )
        return found.states


def _token_ids(path: Path) -> np.ndarray:
    if is_being_written(path):
        raise SpecforgeError(f"{path} is still being written; wait until the server has finished all requests")
    try:
        with safe_open(path, framework="np") as file:
            tokens: np.ndarray = file.get_tensor("token_ids")
            return tokens
    except (SafetensorError, OSError) as error:
        raise SpecforgeError(f"{path} is damaged or holds no states: {error}") from None
