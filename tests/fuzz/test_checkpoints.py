"""Corrupted published drafts: each is read correctly or refused in one message that names the file."""

from __future__ import annotations

import json
import math
import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from layouts import write
from safetensors.torch import load_file, save_file
from torch import Tensor

from specforge.checkpoints.convert import convert
from specforge.checkpoints.export import ExportRequest, export
from specforge.errors import SpecforgeError
from specforge.models import Eagle3DraftModel, EagleSpeculator, MLPSpeculator
from specforge.models.speculator import SpeculatorModel
from specforge.verifier.parts import VerifierParts

WEIGHTS, CONFIG = "model.safetensors", "config.json"
KEYS = [
    "eagle3/midlayer",
    "eagle3/speculators",
    "eagle/eagle",
    "eagle/speculators",
    "mlp/mlp_speculator",
    "mlp/speculators",
]
NETWORKS = {"eagle3": Eagle3DraftModel, "eagle": EagleSpeculator, "mlp": MLPSpeculator}
# Export format of each algorithm's drafts.
ENGINE = {"eagle3": "vllm", "eagle": "eagle", "mlp": "mlp_speculator"}
SEEDS, TRIALS = 3, 35
ODD: list[Any] = [
    None,
    True,
    -1,
    0,
    1,
    3,
    10**9,
    10**30,
    0.5,
    math.nan,
    math.inf,
    "",
    "64",
    "llama",
    [],
    [1],
    [None],
    {},
]
ODD += [
    {"a": 1},
    {"rope_type": "yarn"},
    {"rope_theta": None},
    {"type": "mrope", "mrope_section": [1, 1, 2]},
    "\ud800",
    [[]],
]


@pytest.fixture(scope="module")
def published(tiny_verifiers: Mapping[str, Any], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One intact draft in each format, for a random verifier."""
    made: dict[str, Path] = {}
    verifier = tiny_verifiers["llama"]
    for key in KEYS:
        algorithm = key.split("/")[0]
        options = {"t2d": torch.arange(61) % 3 == 0, "aux_layer_ids": [1, 3, 5]} if algorithm == "eagle3" else {}
        if algorithm == "mlp":
            options = {"intermediate_size": 8}
        draft: Any = NETWORKS[algorithm].from_training_args(
            verifier.model.config, verifier_name_or_path=str(verifier.folder), **options
        )
        if key == "eagle3/midlayer":
            draft.config.eagle_aux_hidden_state_layer_ids = None
        draft.attach_verifier(VerifierParts.of(verifier.model))
        made[key] = tmp_path_factory.mktemp("published") / "draft"
        write(key, draft, made[key])
    return made


Change = Callable[[random.Random, dict[str, Any], dict[str, Tensor]], None]


def odd_value(rng: random.Random, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Set a top-level or nested key to another value."""
    inside = [config, *(value for value in config.values() if isinstance(value, dict))]
    node = rng.choice(inside)
    named = ["rope_theta", "rope_scaling", "rope_parameters", "quantization_config", "speculators_config", "dtype"]
    node[rng.choice([*node, *named])] = rng.choice(ODD)


def dropped_key(rng: random.Random, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Remove a key."""
    node = rng.choice([config, *(value for value in config.values() if isinstance(value, dict) and value)])
    node.pop(rng.choice(list(node)))


def other_number(rng: random.Random, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Change a number."""
    node = rng.choice([config, *(value for value in config.values() if isinstance(value, dict))])
    numbers = [name for name, item in node.items() if type(item) in (int, float)]
    if numbers:
        name = rng.choice(numbers)
        node[name] = type(node[name])(node[name] * rng.choice([0, -1, 2, 1000]) + rng.choice([0, 1]))


def other_tensor(rng: random.Random, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Drop, rename, reshape, cast or corrupt a tensor."""
    name = rng.choice(list(tensors))
    tensor = tensors.pop(name)
    kinds = (torch.float16, torch.int8, torch.int32, torch.bool, torch.float8_e4m3fn, torch.complex64, torch.float64)
    changes: list[Callable[[], dict[str, Tensor]]] = [
        lambda: {},
        lambda: {rng.choice(["x", "layers.0.x.weight", f"model.{name}", f"{name}_scale", "d2t", "t2d"]): tensor},
        lambda: {name: tensor[:-1].clone()},
        lambda: {name: tensor.unsqueeze(0)},
        lambda: {name: tensor.flatten()[:0]},
        lambda: {name: tensor.float().to(rng.choice(kinds))},
        lambda: {name: torch.full_like(tensor, math.nan) if tensor.is_floating_point() else tensor.roll(1)},
        lambda: {name: tensor, f"{name}_scale": torch.ones(1)},
    ]
    tensors.update(rng.choice(changes)())


CHANGES: list[Change] = [odd_value, odd_value, dropped_key, other_number, other_tensor, other_tensor]


def other_file(rng: random.Random, folder: Path) -> None:
    """Truncate, overwrite, rename or wrongly index a file."""
    path = folder / rng.choice([WEIGHTS, WEIGHTS, CONFIG])
    content = path.read_bytes()
    index = {"weight_map": {"a": rng.choice([WEIGHTS, None, "../" + WEIGHTS, "nowhere.safetensors", 3, ["a"]])}}
    match rng.randrange(6):
        case 0:
            path.write_bytes(content[: rng.randrange(len(content))])
        case 1:
            at = rng.randrange(len(content))
            path.write_bytes(content[:at] + rng.randbytes(8) + content[at + 8 :])
        case 2:
            path.write_bytes(
                rng.choice([b"", b"null", b"[]", b"\xff\xfe", b'{"a":' * 5000, b"version https://git-lfs"])
            )
        case 3:
            path.rename(folder / rng.choice(["pytorch_model.bin", "other.json"]))
        case 4:
            torch.save(rng.choice([[1], {"a": 1}, {1: torch.ones(1)}, torch.ones(1)]), folder / "pytorch_model.bin")
            path.unlink()
        case 5:
            (folder / f"{WEIGHTS}.index.json").write_text(json.dumps(rng.choice([index, {}, {"weight_map": []}])))
            (folder / WEIGHTS).rename(folder / "model-1.safetensors")


def attempt(act: Callable[[], Any], folder: Path) -> Any:
    """Return the result of an entry point; None if it refuses the draft in one message."""
    try:
        return act()
    except SpecforgeError as error:
        assert str(error).strip() and "\n" not in str(error).split("They can be written as")[0], str(error)
        return None


@pytest.mark.parametrize("seed", range(SEEDS))
def test_a_corrupted_draft_is_read_correctly_or_refused(
    seed: int, published: dict[str, Path], tiny_verifiers: Mapping[str, Any], tmp_path: Path
) -> None:
    rng, verifier = random.Random(seed), str(tiny_verifiers["llama"].folder)
    read = 0
    for trial in range(TRIALS):
        key = rng.choice(KEYS)
        folder = tmp_path / f"{trial}"
        shutil.copytree(published[key], folder)
        config, tensors = json.loads((folder / CONFIG).read_text()), load_file(folder / WEIGHTS)
        for _ in range(rng.choice([1, 1, 2])):
            rng.choice(CHANGES)(rng, config, tensors)
        (folder / CONFIG).write_text(json.dumps(config))
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / WEIGHTS)
        if rng.random() < 0.2:
            other_file(rng, folder)
        attempt(lambda: SpeculatorModel.from_pretrained(folder), folder)  # noqa: B023  (called at once)
        done = attempt(lambda: convert(str(folder), verifier, tmp_path / f"{trial}-ours"), folder)  # noqa: B023
        if done is not None:
            read += 1
            ids = done.model.draft_ids
            assert ids is None or (bool((ids.diff() > 0).all()) and int(ids[0]) >= 0 and int(ids[-1]) < 61)
            request = ExportRequest(
                str(done.folder), ENGINE[key.split("/")[0]], tmp_path / f"{trial}-out", runs_verifier=False
            )
            attempt(lambda: export(request), folder)  # noqa: B023
    assert TRIALS // 10 < read < TRIALS
