"""Stored states that changed on disk: read as written, or refused in one line that names the file."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from specforge.data.features.manifest import MANIFEST, FeatureNeeds, Manifest
from specforge.data.features.plan import ShardPlan
from specforge.data.features.preparing import prepare_features
from specforge.data.features.reading import FEATURES, read_from
from specforge.data.features.recording import FeatureRecorder
from specforge.data.features.store import FeatureStore
from specforge.data.packing import PackedRows, collate
from specforge.data.rows.building import build_rows
from specforge.data.rows.reading import TokenRows
from specforge.data.rows.summary import RowSettings
from specforge.errors import SpecforgeError

MUTATIONS = 280
NEEDS = FeatureNeeds("a verifier", "0123456789abcdef-01234567", (2, 4), 8, 16, whole_rows=True)


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> TokenRows:
    """40 token rows."""
    folder, rng = tmp_path_factory.mktemp("rows"), random.Random(0)
    lines = [
        f'{{"input_ids": {[rng.randrange(60) for _ in range(length)]}, "loss_mask": {[0, *[1] * (length - 1)]}}}\n'
        for length in (rng.randint(4, 20) for _ in range(40))
    ]
    (folder / "rows.jsonl").write_text("".join(lines))
    return build_rows(str(folder / "rows.jsonl"), pytest.fail, 61, RowSettings(64, "drop"), folder / "cache")


def manifest_of(plan: ShardPlan, dtype: str) -> Manifest:
    return Manifest("a verifier", NEEDS.fingerprint, None, 61, NEEDS.layers, 16, dtype, True, plan.identity)  # type: ignore[arg-type]


@pytest.fixture(scope="module", params=["bfloat16", "int8"])
def store(request: pytest.FixtureRequest, rows: TokenRows, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store of several shards."""
    plan = ShardPlan([rows], NEEDS, token_bytes=96, shard_bytes=12_000)

    def states(plan: ShardPlan, shard: range) -> Iterator[tuple[int, Tensor]]:
        for number, row in enumerate(shard):
            yield number, torch.randn(plan.kept[row], 3, 16, generator=torch.Generator().manual_seed(row))

    folder = tmp_path_factory.mktemp("store") / "store"
    prepare_features(plan, manifest_of(plan, request.param), folder, states)
    return folder


def read(folder: Path, rows: TokenRows) -> dict[str, Tensor]:
    """Read the states of all rows, as batches do."""
    store = FeatureStore(folder)
    store.manifest.require(NEEDS, None, f"data.features: {folder}")
    items = PackedRows(rows, [[number] for number in range(len(rows))])
    assert not read_from(store, NEEDS, items).any()
    batch = collate([items[number] for number in range(len(rows))])
    return {name: batch[name] for name in FEATURES if name in batch}


def flip(content: bytearray, rng: random.Random) -> None:
    # Headers, at the start of a file, are hit as often as the states.
    limit = rng.choice([8, 400, 2000, len(content)])
    content[rng.randrange(min(limit, len(content)))] ^= 1 << rng.randrange(8)


def cut(content: bytearray, rng: random.Random) -> None:
    del content[rng.randrange(len(content)) :]


def overwrite(content: bytearray, rng: random.Random) -> None:
    begin, size = rng.randrange(len(content)), rng.randint(1, 64)
    content[begin : begin + size] = bytes(rng.randrange(256) for _ in content[begin : begin + size])


def append(content: bytearray, rng: random.Random) -> None:
    content += bytes(rng.randrange(256) for _ in range(rng.randint(1, 9)))


def remove_inside(content: bytearray, rng: random.Random) -> None:
    begin = rng.randrange(len(content))
    del content[begin : begin + rng.randint(1, 64)]


CHANGES: list[Callable[[bytearray, random.Random], None]] = [flip, flip, flip, cut, overwrite, append, remove_inside]


def harm(folder: Path, rng: random.Random) -> str:
    """Change one file of a store; return its name."""
    names = [MANIFEST, *sorted(path.name for path in folder.glob("shard-*"))]
    name, other = rng.sample(names, 2)
    if MANIFEST not in (name, other) and rng.random() < 0.3:
        name = MANIFEST
    kind = rng.random()
    if kind < 0.04:
        (folder / name).unlink()
    elif kind < 0.08:
        shutil.copy(folder / other, folder / name)
    else:
        content = bytearray((folder / name).read_bytes())
        rng.choice(CHANGES)(content, rng)
        (folder / name).write_bytes(content)
    return name


def test_a_changed_store_is_refused_or_reads_the_same(store: Path, rows: TokenRows, tmp_path: Path) -> None:
    expected = read(store, rows)
    refused = 0
    for seed in range(MUTATIONS // 2):
        folder = tmp_path / str(seed)
        shutil.copytree(store, folder)
        name = harm(folder, random.Random(seed))
        try:
            found = read(folder, rows)
        except SpecforgeError as error:
            refused += 1
            assert str(folder) in str(error) and name in str(error), f"seed {seed}: {error}"
            assert "again" in str(error) and "\n" not in str(error), f"seed {seed}: {error}"
        else:
            assert found.keys() == expected.keys()
            for key, tensor in found.items():
                same = torch.equal(tensor.view(torch.uint8), expected[key].view(torch.uint8))
                assert same, f"seed {seed}: {name} was changed, and {key} is read differently"
        shutil.rmtree(folder)
    assert refused > MUTATIONS // 4


def test_a_changed_recording_is_captured_again_or_refused(rows: TokenRows, tmp_path: Path) -> None:
    manifest = manifest_of(ShardPlan([rows], NEEDS, token_bytes=96), "bfloat16")
    items = PackedRows(rows, [[number] for number in range(len(rows))])
    recorded = FeatureRecorder(tmp_path / "recorded", manifest, NEEDS, {"train": items})
    recorded.reopen()
    states = torch.Generator().manual_seed(0)
    for numbers in np.array_split(np.arange(len(rows)), 4):
        batch = collate([items[number] for number in numbers.tolist()])
        shape = (*batch["input_ids"].shape, 3, 16)
        known = torch.randn(shape, generator=states)
        recorded.add(batch, known[:, :, :2], known[:, :, 2])
        recorded.flush()
    assert recorded.reopen()
    expected = [items[number] for number in range(len(rows))]
    for seed in range(MUTATIONS // 4):
        folder, rng = tmp_path / str(seed), random.Random(seed)
        shutil.copytree(tmp_path / "recorded", folder)
        path = rng.choice(sorted(folder.glob("shard-*")))
        content = bytearray(path.read_bytes())
        rng.choice(CHANGES)(content, rng)
        path.write_bytes(content)
        items.features = None
        FeatureRecorder(folder, manifest, NEEDS, {"train": items}).reopen()
        for number, row_states in enumerate(expected):
            try:
                found = items[number]
            except SpecforgeError as error:
                assert str(path) in str(error) and "to capture its rows again" in str(error), f"seed {seed}: {error}"
            else:
                assert "aux" not in found or all(torch.equal(found[name], row_states[name]) for name in row_states), (
                    f"seed {seed}"
                )
        shutil.rmtree(folder)
