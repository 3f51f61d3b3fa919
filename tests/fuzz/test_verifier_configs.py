"""A verifier's config.json with wrong types and missing fields: it loads, or one message names file and key."""

from __future__ import annotations

import copy
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tiny_families import make

from specforge.errors import UsageError
from specforge.verifier import diagnosis
from specforge.verifier.features import check_logits
from specforge.verifier.loading import load_config, load_verifier
from specforge.verifier.parts import VerifierParts
from specforge_eagle.model import EagleSpeculator
from specforge_eagle3.model import Eagle3DraftModel
from specforge_mlp.model import MLPSpeculator

VALUES = ["no", None, -1, 0, 3, 1.5, [], {}, True, 4096]
MISSING = object()
MUTATIONS = 8


def keys_of(values: dict[str, Any], before: tuple[str, ...] = ()) -> Iterator[tuple[str, ...]]:
    for key, value in values.items():
        yield (*before, key)
        if isinstance(value, dict):
            yield from keys_of(value, (*before, key))


def mutated(values: dict[str, Any], path: tuple[str, ...], value: Any) -> dict[str, Any]:
    changed = copy.deepcopy(values)
    inner = changed
    for key in path[:-1]:
        inner = inner[key]
    if value is MISSING:
        del inner[path[-1]]
    else:
        inner[path[-1]] = value
    return changed


def use(folder: str) -> None:
    """Use a verifier as training does before its first step."""
    config = load_config(folder)
    verifier = load_verifier(folder)
    check_logits(verifier)
    parts = VerifierParts.from_pretrained(folder)
    for network in (Eagle3DraftModel, EagleSpeculator, MLPSpeculator):
        network.from_training_args(config, verifier_name_or_path=folder).attach_verifier(parts)


@pytest.mark.parametrize("name", ["llama", "glm4", "gpt2", "mistral3"])
def test_every_config_is_accepted_or_refused_by_name(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(diagnosis, "SECONDS", 0.05)
    make(name, tmp_path)
    use(str(tmp_path))
    file = tmp_path / "config.json"
    values = json.loads(file.read_text())
    paths = list(keys_of(values))
    rng = random.Random(name)
    refused = 0
    for _ in range(MUTATIONS):
        path, value = rng.choice(paths), rng.choice([*VALUES, MISSING])
        file.write_text(json.dumps(mutated(values, path, value)))
        try:
            use(str(tmp_path))
        except UsageError as error:
            refused += 1
            assert str(tmp_path) in str(error) and "config.json" in str(error), (path, value, str(error))
            assert "\n" not in str(error)
    assert refused > MUTATIONS // 5
