"""Corrupted vocabulary maps: a draft is loaded if and only if its maps are valid."""

from __future__ import annotations

import random
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import write
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge.checkpoints.convert import convert
from specforge.checkpoints.export import ExportRequest, export
from specforge.errors import UsageError
from specforge.models import Eagle3DraftModel
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.parts import VerifierParts

WEIGHTS = "model.safetensors"
VOCABULARY, DRAFT = 61, 20
SEEDS, TRIALS = 3, 24
KINDS = (torch.int8, torch.int16, torch.int32, torch.uint8, torch.float32, torch.float16, torch.bool)


@pytest.fixture(scope="module")
def drafts(tiny_verifiers: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A draft with 20 of 61 tokens, in the layouts with vocabulary maps."""
    verifier = tiny_verifiers["llama"]
    draft = Eagle3DraftModel.from_training_args(
        verifier.model.config, t2d=torch.arange(VOCABULARY) % 3 == 1, verifier_name_or_path=str(verifier.folder)
    )
    draft.attach_verifier(VerifierParts.of(verifier.model))
    made = {key: tmp_path_factory.mktemp("maps") / "draft" for key in ("eagle3/speculators", "eagle3/midlayer")}
    for key, folder in made.items():
        write(key, draft, folder)
    return made


def changed(rng: random.Random, maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """Change the maps of a draft in one way; some stay valid."""
    maps = {name: tensor.clone() for name, tensor in maps.items()}
    name = rng.choice(["d2t", "t2d"])
    other = torch.zeros(VOCABULARY, dtype=torch.bool)
    other[rng.sample(range(VOCABULARY), DRAFT)] = True
    at = rng.randrange(len(maps[name]))
    match rng.randrange(10):
        case 0:
            maps[name] = maps[name].to(rng.choice(KINDS))
        case 1:
            maps[name] = torch.zeros_like(maps[name])
        case 2:
            maps["d2t"][at % DRAFT] += rng.choice([-40, -1, 1, 40, 2**62])
        case 3:
            maps["t2d"][at] ^= True
        case 4:
            maps["d2t"] = maps["d2t"] + torch.arange(DRAFT)
        case 5:
            maps["t2d"] = other
        case 6:
            maps = {"d2t": other.nonzero().squeeze(1) - torch.arange(DRAFT), "t2d": other}
        case 7:
            maps["d2t"] = maps["d2t"].roll(1)
        case 8:
            del maps[name]
        case 9:
            maps[name] = maps[name][:-1]
    return maps


def is_valid(maps: dict[str, Tensor], may_lack_t2d: bool) -> bool:
    """Check token by token whether the maps give ascending verifier tokens and agree."""
    d2t, t2d = maps.get("d2t"), maps.get("t2d")
    if d2t is None or d2t.dtype in (torch.float32, torch.float16, torch.bool) or len(d2t) != DRAFT:
        return False
    ids = [index + offset for index, offset in enumerate(d2t.tolist())]
    is_ascending = ids == sorted(set(ids)) and all(0 <= index < VOCABULARY for index in ids)
    if t2d is None:
        return is_ascending and may_lack_t2d and any(d2t.tolist())
    is_mask = not t2d.is_floating_point() and len(t2d) == VOCABULARY
    return is_ascending and is_mask and [token for token, is_drafted in enumerate(t2d.tolist()) if is_drafted] == ids


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_draft_is_loaded_if_and_only_if_its_maps_are_valid(
    seed: int, drafts: dict[str, Path], tiny_verifiers: Mapping[str, Any], tmp_path: Path
) -> None:
    rng, verifier = random.Random(seed), str(tiny_verifiers["llama"].folder)
    outcomes = set()
    for trial in range(TRIALS):
        key = rng.choice(list(drafts))
        folder, ours = tmp_path / f"{trial}", tmp_path / f"{trial}-ours"
        shutil.copytree(drafts[key], folder)
        tensors = load_file(folder / WEIGHTS)
        maps = changed(rng, {name: tensors.pop(name) for name in ("d2t", "t2d")})
        save_file({**tensors, **maps}, folder / WEIGHTS)
        valid = is_valid(maps, may_lack_t2d=key == "eagle3/midlayer")
        outcomes.add(valid)
        if not valid:
            with pytest.raises(UsageError, match=r"d2t|t2d") as refused:
                convert(str(folder), verifier, ours)
            assert str(folder) in str(refused.value)
            if key == "eagle3/speculators":
                with pytest.raises(UsageError, match=r"d2t|t2d"):
                    SpeculatorModel.from_pretrained(folder)
            continue
        convert(str(folder), verifier, ours)
        out = export(ExportRequest(str(ours), "vllm", tmp_path / f"{trial}-out", runs_verifier=False)).folder
        written = load_file(out / WEIGHTS)
        assert written["d2t"].dtype == torch.int64 and written["t2d"].dtype == torch.bool
        assert (written["d2t"] + torch.arange(DRAFT)).tolist() == written["t2d"].nonzero().squeeze(1).tolist()
        assert written["d2t"].tolist() == maps["d2t"].tolist()
    assert outcomes == {True, False}
