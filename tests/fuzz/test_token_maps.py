"""Maps between the vocabularies with something wrong: a draft is loaded exactly if its maps are right."""

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
    """A draft of 20 of 61 tokens, in the layouts that hold maps."""
    verifier = tiny_verifiers["llama"]
    draft = Eagle3DraftModel.from_training_args(
        verifier.model.config, t2d=torch.arange(VOCABULARY) % 3 == 1, verifier_name_or_path=str(verifier.folder)
    )
    draft.attach_verifier(VerifierParts.of(verifier.model))
    made = {key: tmp_path_factory.mktemp("maps") / "draft" for key in ("eagle3/speculators", "eagle3/midlayer")}
    for key, folder in made.items():
        write(key, draft, folder)
    return made


def changed(chance: random.Random, maps: dict[str, Tensor]) -> dict[str, Tensor]:
    """Change the maps of a draft in one way; some stay right."""
    maps = {name: one.clone() for name, one in maps.items()}
    name = chance.choice(["d2t", "t2d"])
    other = torch.zeros(VOCABULARY, dtype=torch.bool)
    other[chance.sample(range(VOCABULARY), DRAFT)] = True
    at = chance.randrange(len(maps[name]))
    match chance.randrange(10):
        case 0:
            maps[name] = maps[name].to(chance.choice(KINDS))
        case 1:
            maps[name] = torch.zeros_like(maps[name])
        case 2:
            maps["d2t"][at % DRAFT] += chance.choice([-40, -1, 1, 40, 2**62])
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


def is_right(maps: dict[str, Tensor], may_lack_t2d: bool) -> bool:
    """Tell, token by token, whether maps lead to tokens of the verifier, ascending, and agree."""
    d2t, t2d = maps.get("d2t"), maps.get("t2d")
    if d2t is None or d2t.dtype in (torch.float32, torch.float16, torch.bool) or len(d2t) != DRAFT:
        return False
    ids = [index + offset for index, offset in enumerate(d2t.tolist())]
    leads = ids == sorted(set(ids)) and all(0 <= one < VOCABULARY for one in ids)
    if t2d is None:
        return leads and may_lack_t2d and any(d2t.tolist())
    marks = not t2d.is_floating_point() and len(t2d) == VOCABULARY
    return leads and marks and [token for token, one in enumerate(t2d.tolist()) if one] == ids


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_draft_is_loaded_exactly_if_its_maps_are_right(
    seed: int, drafts: dict[str, Path], tiny_verifiers: Mapping[str, Any], tmp_path: Path
) -> None:
    chance, verifier = random.Random(seed), str(tiny_verifiers["llama"].folder)
    outcomes = set()
    for trial in range(TRIALS):
        key = chance.choice(list(drafts))
        folder, ours = tmp_path / f"{trial}", tmp_path / f"{trial}-ours"
        shutil.copytree(drafts[key], folder)
        tensors = load_file(folder / WEIGHTS)
        maps = changed(chance, {name: tensors.pop(name) for name in ("d2t", "t2d")})
        save_file({**tensors, **maps}, folder / WEIGHTS)
        right = is_right(maps, may_lack_t2d=key == "eagle3/midlayer")
        outcomes.add(right)
        if not right:
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
