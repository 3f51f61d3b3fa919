"""Writing a feature store: every process computes the same plan and writes the shards that are still missing.

The process that holds a shard's lock writes it; a shard appears on disk complete or not at all. The process that finds
all shards complete writes the manifest. An interrupted run therefore resumes, and the same command on other devices
shares the work.
"""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from specforge.data.features.dtypes import encode, has_scales, torch_dtype
from specforge.data.features.manifest import MANIFEST, Manifest
from specforge.data.features.plan import ShardPlan
from specforge.data.features.shards import StoredShard, layer_name, scales_name, write_shard
from specforge.errors import SpecforgeError, UsageError
from specforge.files import leftovers, locked

States = Callable[[ShardPlan, range], Iterator[tuple[int, Tensor]]]
"""Yields, in any order, the number within the shard and the states [T, L, H] of each row."""
_log = logging.getLogger(__name__)


def prepare_features(
    plan: ShardPlan,
    manifest: Manifest,
    output: Path,
    states: States,
    ahead: int = 0,
    written: Callable[[range], None] = lambda shard: None,
) -> Manifest | None:
    """Write the missing shards of a store.

    Args:
        plan: The rows and shards.
        manifest: Contents of the store, without the shards.
        output: Folder of the store.
        states: Where the states come from.
        ahead: Number of rows after a shard for which ``states`` is called before the shard is written.
        written: Called with each shard that is on disk, those of an earlier run included.

    Returns:
        The manifest; None if other processes still write shards, the last of which writes the manifest.

    Raises:
        UsageError: The folder holds something else.
        SpecforgeError: The store cannot be written, or states are not finite.
    """
    _check_output(output)
    try:
        output.mkdir(parents=True, exist_ok=True)
        paths = [output / f"shard-{number:05}.safetensors" for number in range(len(plan.shards))]
        done = [_is_done(path, manifest) for path in paths]
        before = sum(int(plan.kept[shard].sum()) for shard, there in zip(plan.shards, done, strict=True) if there)
        if before:
            _log.warning("resuming after %s tokens of an earlier run or another process", f"{before:,}")
        total = int(plan.kept.sum())
        # disable=None shows the bar on a terminal only; delay hides it for short runs.
        with tqdm(desc="capturing", unit=" tokens", total=total, initial=before, disable=None, delay=2) as bar:
            missing = []
            for path, shard, there in zip(paths, plan.shards, done, strict=True):
                if there:
                    written(shard)
                else:
                    missing.append((path, shard))
            for shard in _write_missing(missing, plan, manifest, states, ahead, written):
                bar.update(int(plan.kept[shard].sum()))
        if not all(_is_done(path, manifest) for path in paths):
            return None
        with ExitStack() as stack:
            try:
                stack.enter_context(locked(output / MANIFEST))
            except SpecforgeError:
                return None
            _remove_leftovers(output, paths)
            whole = replace(manifest, shards=tuple(StoredShard(path).entry for path in paths))
            whole.write(output)
            return whole
    except OSError as error:
        raise SpecforgeError(
            f"cannot write {output}: {error.strerror or error}; finished shards are kept: fix this and run the "
            "same command again to resume"
        ) from error


def _check_output(output: Path) -> None:
    """Refuse a folder with other content; shards of another store are refused when they are opened."""
    if output.exists() and not output.is_dir():
        raise UsageError(f"--output: {output} is a file; give a new folder")
    # Hidden files are locks and partial files of a killed run.
    names = [path.name for path in output.glob("*") if not path.name.startswith(".")]
    others = [name for name in names if name != MANIFEST and not name.startswith("shard-")]
    if others:
        raise UsageError(
            f"--output: {output} holds something else ({sorted(others)[0]}); choose another folder, or remove it"
        )


def _is_done(path: Path, manifest: Manifest) -> bool:
    if not path.exists():
        return False
    try:
        identity = StoredShard(path).identity
    except SpecforgeError as error:
        _log.warning("%s. The shard is written again", error)
        return False
    if identity != manifest.identity:
        expected = manifest.identity
        different = ", ".join(
            f"{name} {identity.get(name)}, not {expected[name]}"
            for name in expected
            if identity.get(name) != expected[name]
        )
        raise UsageError(
            f"--output: {path.parent} holds features of something else ({different}); choose another folder, or "
            "remove it"
        )
    return True


def _remove_leftovers(output: Path, shards: Sequence[Path]) -> None:
    """Remove the partial files of killed processes."""
    for path in [*output.glob(".tmp*"), *leftovers(output / MANIFEST)]:  # .tmp* files come from safetensors
        path.unlink(missing_ok=True)
    for shard in shards:
        with suppress(SpecforgeError), locked(shard):
            for path in leftovers(shard):
                path.unlink(missing_ok=True)


def _write_missing(
    missing: Sequence[tuple[Path, range]],
    plan: ShardPlan,
    manifest: Manifest,
    states: States,
    ahead: int,
    written: Callable[[range], None],
) -> Iterator[range]:
    """Write each shard unless another process is writing it or has finished it; yield it when that is settled."""
    begun: deque[tuple[Path, range, ExitStack, Iterator[tuple[int, Tensor]]]] = deque()

    def finish() -> range:
        path, shard, lock, found = begun.popleft()
        write_shard(path, _tensors(plan, shard, manifest, found), manifest.identity)
        written(shard)
        lock.close()
        return shard

    with ExitStack() as locks:
        for path, shard in missing:
            lock = locks.enter_context(ExitStack())
            try:
                lock.enter_context(locked(path))
            except SpecforgeError:
                yield shard
                continue
            if _is_done(path, manifest):
                lock.close()
                yield shard
                continue
            begun.append((path, shard, lock, states(plan, shard)))
            while begun and sum(len(later) for _, later, *_ in begun) - len(begun[0][1]) >= ahead:
                yield finish()
        while begun:
            yield finish()


def _tensors(
    plan: ShardPlan, shard: range, manifest: Manifest, states: Iterator[tuple[int, Tensor]]
) -> dict[str, Tensor]:
    dtype = torch_dtype(manifest.dtype)
    starts = torch.from_numpy(np.concatenate([[0], np.cumsum(plan.kept[shard])]))
    tokens = int(starts[-1])
    tensors = {layer_name(layer): torch.empty(tokens, manifest.width, dtype=dtype) for layer in manifest.layers}
    if has_scales(dtype):
        tensors |= {scales_name(layer): torch.empty(tokens) for layer in manifest.layers}
    for number, found in states:
        begin, end = starts[number : number + 2].tolist()
        if not torch.isfinite(found).all():
            raise SpecforgeError(
                f"the verifier's states of row {plan.rows[shard[number]].tolist()} (source, row) are not all finite "
                "numbers; capture them in a wider type with --verifier_dtype"
            )
        values, scales = encode(found, dtype)
        for column, layer in enumerate(manifest.layers):
            tensors[layer_name(layer)][begin:end] = values[:, column]
            if scales is not None:
                tensors[scales_name(layer)][begin:end] = scales[:, column]
    digests = torch.from_numpy(plan.digests[shard].view(np.uint8).copy())
    return {"digests": digests, "starts": starts, **tensors}
