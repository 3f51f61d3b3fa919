"""Mutated configurations: each is parsed or refused in one message that names the key, the line or the file.

SPECFORGE_FUZZ=1000 sets the number, SPECFORGE_FUZZ_SEED=7 the seed.
"""

from __future__ import annotations

import copy
import itertools
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from specforge.__main__ import main
from specforge.commands.trainer import settings_parser
from specforge.errors import UsageError
from specforge.hookspecs import Algorithm
from specforge.registry import installed
from specforge.training.cli.command_line import parse
from specforge.training.cli.config_errors import known_keys
from specforge.training.cli.config_files import choose_algorithm

NUMBER = int(os.environ.get("SPECFORGE_FUZZ", "60"))
SEED = int(os.environ.get("SPECFORGE_FUZZ_SEED", "0"))
QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
ALGORITHM = "eagle3"
VALUES: list[Any] = [
    *(None, True, False, "", "x", "null", "1e400", "\x00", "ü" * 300, [], {}, [[]], {"a": {"b": None}}),
    *(-1, 0, 1, 3, 10**40, -(10**40), 2**63, 0.5, -0.0, 1e30, 1e-320, float("nan"), float("inf"), -float("inf")),
    *({"class_path": "nowhere.Thing"}, {"class_path": 3}, [{"class_path": "os.system"}], {"init_args": {}}),
    *([1, "a", None], {"kl": -1}, {"kl": float("nan")}, "../x", "/dev/null", "00:00:00:01", {"minutes": 1}),
]
# Malformed files, and what the message must contain.
MALFORMED = {
    "model:\n  ttt_steps: 3\n  ttt_steps: 4\n": "ttt_steps is set twice",
    "trainer: {}\ntrainer: {}\n": "trainer is set twice",
    "data: &a {train: *a}\n": "contains itself",
    "model: " + "[" * 40 + "]" * 40: "levels",
    "model: " + "{a: " * 2000 + "1" + "}" * 2000: "levels",
    "a: &a [x,x,x,x,x,x,x,x,x,x]\n"
    + "".join(f"{b}: &{b} [{','.join([f'*{a}'] * 10)}]\n" for a, b in zip("abcdef", "bcdefg", strict=True)): "values",
    "1: 2\n": "a key must be text",
    "? [a, b]\n: 2\n": "a key must be text",
    "seed_everything: 2020-13-45\n": "is not valid YAML",
    "seed_everything: " + "9" * 5000: "is not valid YAML",
    "verifier: !!python/object:os.system x\n": "is not valid YAML",
    "verifier: *nothing\n": "is not valid YAML",
    "verifier: [\n": "is not valid YAML",
    "- algorithm\n": "keys and values",
    "\tverifier: x\n": "is not valid YAML",
}


@pytest.fixture(scope="module")
def parser() -> Any:
    return settings_parser(installed().find(Algorithm, ALGORITHM))


@pytest.fixture
def attempt(parser: Any, tmp_path: Path) -> Callable[[str], str | None]:
    """Parse a file as ``fit`` does; return the error message, or None."""

    def run(text: str) -> str | None:
        file = tmp_path / "run.yaml"
        file.write_text(text, encoding="utf-8", errors="surrogatepass")
        words = ["--config", str(file)]
        try:
            choose_algorithm(words)
            parse(parser, words)
        except UsageError as error:
            assert "Traceback" not in str(error) and "\n" not in str(error)
            return str(error)
        return None

    return run


@pytest.fixture
def row_files(tmp_path: Path) -> list[str]:
    """Flags to train and validate on a few rows."""
    file = tmp_path / "rows.jsonl"
    with QUICKSTART.with_name("quickstart").joinpath("train.jsonl").open(encoding="utf-8") as lines:
        file.write_text("".join(itertools.islice(lines, 4)), encoding="utf-8")
    return ["--data.train", str(file), "--data.validation", str(file), "--data.cache_dir", str(tmp_path / "cache")]


def set_value(values: dict[str, Any], key: str, value: Any) -> None:
    *parents, last = key.split(".")
    for parent in parents:
        inner = values.get(parent)
        values[parent] = values = inner if isinstance(inner, dict) else {}
    values[last] = value


@pytest.mark.parametrize(("text", "reason"), MALFORMED.items(), ids=range(len(MALFORMED)))
def test_malformed_files(attempt, text, reason):
    message = attempt(text)
    assert message is not None and reason in message and "run.yaml" in message


def test_a_valid_alias_is_allowed(attempt):
    values = yaml.safe_load(QUICKSTART.read_text())
    text = yaml.safe_dump(values).replace("train: configs", "train: &rows configs", 1)
    text = text.replace(f"validation: {values['data']['validation']}", "validation: *rows")
    assert "*rows" in text and attempt(text) is None


def test_mutated_values(attempt, parser):
    rng = random.Random(SEED)
    base = yaml.safe_load(QUICKSTART.read_text())
    keys = [key for key in known_keys(parser) if not key.endswith(".help")]
    accepted = 0
    for _ in range(NUMBER):
        values, changed = copy.deepcopy(base), []
        for _ in range(rng.choice([1, 1, 1, 2])):
            key = rng.choice(keys)
            value = copy.deepcopy(rng.choice(VALUES))
            changed.append(key)
            set_value(values, key, value)
        if rng.random() < 0.2:
            group = values[rng.choice(["trainer", "model", "data"])]
            if isinstance(group, dict) and group:
                key = rng.choice(sorted(group))
                changed.append(key)
                del group[key]
        text = yaml.safe_dump(values, allow_unicode=True)
        message = attempt(text)
        if message is None:
            accepted += 1
        else:
            parts = {part for key in changed for part in key.split(".")}
            assert "run.yaml" in message or any(part in message for part in parts), (message, changed, text)
    assert 0 < accepted < NUMBER


@pytest.mark.parametrize(
    "values",
    [
        {"trainer": {"accumulate_grad_batches": 2**53}},
        {"trainer": {"log_every_n_steps": 0}, "model": {"schedule": {"warmup": 2**53}}},
        {"trainer": {"max_steps": None}, "data": {"seed": 2**32 - 1}},
        {"model": {"supervision": None}},
    ],
    ids=str,
)
def test_values_at_their_bounds_train_or_are_refused(values, tmp_path, row_files, capfd):
    config = yaml.safe_load(QUICKSTART.read_text())
    for group, inner in values.items():
        for key, value in inner.items():
            set_value(config, f"{group}.{key}", value)
    file = tmp_path / "run.yaml"
    file.write_text(yaml.safe_dump(config))
    words = [*row_files, "--output_dir", str(tmp_path / "runs"), "--trainer.fast_dev_run", "1"]
    verifier = str(QUICKSTART.parent / "quickstart" / "verifier")
    status = main(["fit", "--config", str(file), "--verifier", verifier, "--model.ttt_steps", "1", *words])
    message = capfd.readouterr().err
    assert "Traceback" not in message
    refused = any(value is None for inner in values.values() for value in inner.values())
    assert status == (2 if refused else 0), message
    if refused:
        assert "null is not allowed" in message
