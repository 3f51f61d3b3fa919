"""States that a serving engine wrote, as vLLM's connector for extracting hidden states does: one file a request.

`<request>.safetensors` holds `token_ids` int64 [T] and `hidden_states` [T, L, H], layers ascending, the output of the
last layer at the end; a `.lock` beside it is held while it is written. Values of one byte come with
`hidden_states_scales`. The files do not say of which verifier they are.
"""

from __future__ import annotations

import fcntl
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from specforge.data.features.plan import ShardPlan
from specforge.data.rows.reading import row_digest
from specforge.errors import SpecforgeError, UsageError


class Importing:
    """States from a folder of such files.

    Args:
        folder: The folder.
        plan: The rows that must be there.
        layers: Ids of the layers that the files hold.
        width: Width H of a state.

    Raises:
        UsageError: There are no files, or none for some of the rows.
        SpecforgeError: A file is damaged, or still being written.
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
                f"rows, the first of them row {row} of source {source}; request all rows with their own token ids"
            )

    def __call__(self, plan: ShardPlan, shard: range) -> Iterator[tuple[int, Tensor]]:
        """Yield number and states [T, L, H] of each row of a shard."""
        for number, (digest, kept) in enumerate(zip(plan.digests[shard], plan.kept[shard], strict=True)):
            yield number, self._states(self._paths[digest.tobytes()])[: int(kept)]

    def _states(self, path: Path) -> Tensor:
        try:
            tensors = load_file(path)
        except (SafetensorError, OSError) as error:
            raise SpecforgeError(f"{path} is damaged: {error}") from None
        states = tensors["hidden_states"]
        expected = [len(tensors["token_ids"]), len(self.layers), self.width]
        if list(states.shape) != expected:
            raise UsageError(
                f"{path}: hidden_states is {list(states.shape)}, but {expected} is read, the layers {self.layers}; "
                f"start the server with eagle_aux_hidden_state_layer_ids {self.layers}"
            )
        return states.float() * tensors["hidden_states_scales"] if "hidden_states_scales" in tensors else states


def _token_ids(path: Path) -> np.ndarray:
    for lock in (path.with_suffix(".lock"), path.with_name(f"{path.name}.lock")):
        if lock.exists() and _is_held(lock):
            raise SpecforgeError(f"{path} is still being written; wait until the server has answered all requests")
    try:
        with safe_open(path, framework="np") as file:
            tokens: np.ndarray = file.get_tensor("token_ids")
            return tokens
    except (SafetensorError, OSError) as error:
        raise SpecforgeError(f"{path} is damaged, or holds no states: {error}") from None


def _is_held(lock: Path) -> bool:
    with lock.open() as file:
        try:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
    return False
