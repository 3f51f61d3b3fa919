"""Writing a store: rows are spread over shards by a plan that every process makes alike, and each takes what is left.

A shard is written by whoever holds its lock, and is there whole or not at all. Whoever finds all of them there writes
the manifest. So a run that was ended goes on where it was, and the same command on other devices joins in.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from functools import cached_property
from hashlib import sha256
from itertools import pairwise
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from tqdm import tqdm

from specforge.data.features.dtypes import encode, has_scales, torch_dtype
from specforge.data.features.manifest import MANIFEST, FeatureNeeds, Manifest
from specforge.data.features.shards import layer_name, read_shard, scales_name, write_shard
from specforge.data.lock import locked
from specforge.data.rows import TokenRows
from specforge.errors import SpecforgeError, UsageError

SHARD_BYTES = 2**29  # what a killed run loses at most, and what is held in memory at once
States = Callable[[Sequence[npt.NDArray[np.int64]]], Iterator[tuple[int, Tensor]]]
"""Yields, in any order, for each of some rows of tokens its number among them and its states [T, L, H]."""
_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Plan:
    """Which states of which rows go into a store, and how they are spread over shards.

    Attributes:
        sources: The rows; those with equal tokens are stored once.
        needs: What of them is read.
        token_bytes: Bytes of a token.
        shard_bytes: Bytes of a shard, about.
    """

    sources: Sequence[TokenRows]
    needs: FeatureNeeds
    token_bytes: int
    shard_bytes: int = SHARD_BYTES

    @cached_property
    def rows(self) -> npt.NDArray[np.int64]:
        """Source and row in it of each row that is stored, int64 [rows, 2]."""
        return self._unique[0]

    @cached_property
    def kept(self) -> npt.NDArray[np.int64]:
        """Tokens of each row whose states are stored, int64 [rows]."""
        return self._unique[1]

    @cached_property
    def digests(self) -> npt.NDArray[np.uint64]:
        """Digests of the rows, uint64 [rows, 2]."""
        return self._unique[2]

    @cached_property
    def shards(self) -> list[range]:
        """Rows of each shard."""
        ends = np.cumsum(self.kept) * self.token_bytes
        cuts = np.searchsorted(ends, np.arange(self.shard_bytes, ends[-1], self.shard_bytes), side="right")
        bounds = np.unique([0, *cuts, len(self.kept)]).tolist()
        return [range(begin, end) for begin, end in pairwise(bounds)]

    @cached_property
    def identity(self) -> str:
        """Digest of the rows in their order, what is kept of each, and the shards."""
        bounds = np.array([[one.start, one.stop] for one in self.shards])
        return sha256(self.digests.tobytes() + self.kept.tobytes() + bounds.tobytes()).hexdigest()

    @property
    def row_tokens(self) -> int:
        """Tokens of all rows of the sources."""
        return int(sum(source.lengths.sum() for source in self.sources))

    @property
    def unique_tokens(self) -> int:
        """Tokens of the rows that are stored, whether or not their states are."""
        return int(sum(self.sources[source].lengths[row] for source, row in self.rows))

    def tokens(self, shard: range) -> list[npt.NDArray[np.int64]]:
        """Return the tokens of the rows of a shard, as far as their states are stored."""
        found = (self.sources[source][int(row)]["input_ids"].numpy() for source, row in self.rows[shard])
        return [tokens[:kept] for tokens, kept in zip(found, self.kept[shard], strict=True)]

    @cached_property
    def _unique(self) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.uint64]]:
        digests = np.concatenate([source.digests for source in self.sources])
        kept = np.concatenate([self.needs.kept(source.lengths, source.last_supervised) for source in self.sources])
        _, first, which = np.unique(digests, axis=0, return_index=True, return_inverse=True)
        longest = np.zeros(len(first), np.int64)
        np.maximum.at(longest, which.ravel(), kept)
        order = np.argsort(first)
        chosen = first[order]
        sizes = np.cumsum([len(source) for source in self.sources])
        source = np.searchsorted(sizes, chosen, side="right")
        places = np.stack([source, chosen - np.concatenate([[0], sizes])[source]], axis=1)
        return places, longest[order], digests[chosen]


def prepare_features(plan: Plan, manifest: Manifest, output: Path, states: States) -> Manifest | None:
    """Write what is missing of a store.

    Args:
        plan: What goes into it.
        manifest: What it holds, without the shards.
        output: The folder.
        states: Where the states come from.

    Returns:
        The manifest; None where other processes still write shards, the last of which will write it.

    Raises:
        UsageError: The folder holds something else.
        SpecforgeError: It cannot be written, or the states are no numbers.
    """
    _check_output(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        paths = [output / f"shard-{number:05}.safetensors" for number in range(len(plan.shards))]
        done = [_is_done(path, manifest) for path in paths]
        before = sum(int(plan.kept[shard].sum()) for shard, there in zip(plan.shards, done, strict=True) if there)
        if before:
            _log.warning("going on after %s tokens of an earlier run, or of another process", f"{before:,}")
        total = int(plan.kept.sum())
        # disable=None shows the bar on a terminal only; delay hides it for short runs.
        with tqdm(desc="capturing", unit=" tokens", total=total, initial=before, disable=None, delay=2) as bar:
            for path, shard, there in zip(paths, plan.shards, done, strict=True):
                if not there:
                    _take(path, plan, shard, manifest, states)
                    bar.update(int(plan.kept[shard].sum()))
        if not all(_is_done(path, manifest) for path in paths):
            return None
        _clean(output)
        whole = replace(manifest, shards=tuple(read_shard(path)[0] for path in paths))
        whole.write(output)
        return whole
    except OSError as error:
        raise SpecforgeError(
            f"cannot write {output}: {error.strerror or error}; what is done so far stays there: mend that and run the "
            "same command again, and it goes on from there"
        ) from error


def _check_output(output: Path) -> None:
    """Refuse a folder of something else; shards of something else are found when they come up."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is a file; give a folder that is yet to be made")
    strangers = [path.name for path in output.glob("*") if MANIFEST not in path.name and "shard-" not in path.name]
    if strangers:
        raise UsageError(
            f"--output: {output} holds something else ({sorted(strangers)[0]}); choose another folder, or remove it"
        )


def _is_done(path: Path, manifest: Manifest) -> bool:
    if not path.exists():
        return False
    try:
        identity = read_shard(path)[1]
    except SpecforgeError as error:
        _log.warning("%s; it is made anew", error)
        return False
    if identity != manifest.identity:
        own = manifest.identity
        different = ", ".join(
            f"{name} {identity.get(name)}, not {own[name]}" for name in own if identity.get(name) != own[name]
        )
        raise UsageError(
            f"--output: {path.parent} holds features of something else ({different}); choose another folder, or "
            "remove it"
        )
    return True


def _clean(output: Path) -> None:
    """Remove what processes left behind that were killed."""
    for path in output.glob(".shard-*"):
        shard = output / path.name.removeprefix(".").removesuffix(".lock")
        with suppress(SpecforgeError), locked(shard):
            shard.with_name(f".{shard.name}").unlink(missing_ok=True)


def _take(path: Path, plan: Plan, shard: range, manifest: Manifest, states: States) -> None:
    """Write a shard, unless another process is at it or has finished it."""
    with ExitStack() as stack:
        try:
            stack.enter_context(locked(path))
        except SpecforgeError:
            return
        if not _is_done(path, manifest):
            write_shard(path, _tensors(plan, shard, manifest, states), manifest.identity)


def _tensors(plan: Plan, shard: range, manifest: Manifest, states: States) -> dict[str, Tensor]:
    dtype = torch_dtype(manifest.dtype)
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(plan.kept[shard])]))
    tokens = int(starts[-1])
    tensors = {layer_name(layer): torch.empty(tokens, manifest.width, dtype=dtype) for layer in manifest.layers}
    if has_scales(dtype):
        tensors |= {scales_name(layer): torch.empty(tokens) for layer in manifest.layers}
    for number, found in states(plan.tokens(shard)):
        begin, end = starts[number : number + 2].tolist()
        if not torch.isfinite(found).all():
            raise SpecforgeError(
                f"the verifier's states of row {plan.rows[shard[number]].tolist()} (source, row) are not all finite "
                "numbers; capture them in a wider type with --verifier_dtype"
            )
        values, scales = encode(found, dtype)
        for place, layer in enumerate(manifest.layers):
            tensors[layer_name(layer)][begin:end] = values[:, place]
            if scales is not None:
                tensors[scales_name(layer)][begin:end] = scales[:, place]
    digests = torch.from_numpy(plan.digests[shard].view(np.uint8).copy())
    return {"digests": digests, "starts": starts, **tensors}
