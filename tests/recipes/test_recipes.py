"""The recipes for large verifiers: each builds its draft and data from only the verifier's config.json."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from specforge.__main__ import main
from specforge.commands.estimate.estimating import EstimateCLI
from specforge.commands.trainer import choose
from specforge.estimation.step import DryRun

ROOT = Path(__file__).parents[2]
RECIPES = sorted((ROOT / "configs" / "models").glob("*.yaml"))
VERIFIERS = ROOT / "configs" / "models" / "verifiers"
PAGE = (ROOT / "docs" / "recipes.md").read_text()
# Billions of parameters of the published models.
PUBLISHED = {
    "gemma-3-1b": 1.00,
    "gpt-oss-20b": 20.91,
    "llama-3.1-8b": 8.03,
    "llama-3.3-70b": 70.55,
    "mistral-7b": 7.25,
    "mistral-small-24b": 23.57,
    "qwen3-4b": 4.02,
    "qwen3-8b": 8.19,
    "qwen3-32b": 32.76,
}

# Verifiers that attend across documents of a packed row.
UNPACKED = {"gpt-oss-20b"}


def verifier_of(recipe: Path) -> str:
    return recipe.stem.rpartition("-")[0]


def hub_id_of(recipe: Path) -> str:
    return str(yaml.safe_load(recipe.read_text())["verifier"])


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    """Rows of tokens, which need no tokenizer."""
    path = tmp_path / "rows.jsonl"
    row = {"input_ids": list(range(1, 65)), "loss_mask": [0] * 16 + [1] * 48}
    path.write_text("\n".join([json.dumps(row)] * 4))
    return path


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_builds_draft_and_data(recipe, rows, tmp_path):
    sources = ["--data.train", str(rows), "--data.validation", str(rows), "--data.cache_dir", str(tmp_path / "cache")]
    words = ["--config", str(recipe), "--verifier", str(VERIFIERS / hub_id_of(recipe)), *sources]
    cli = EstimateCLI(choose(words, ""), words, "estimate")

    cli.datamodule.prepare_data()
    cli.datamodule.setup("fit")
    batch = next(iter(cli.datamodule.train_dataloader()))
    documents = [len(set(row.tolist()) - {-1}) for row in batch["document_ids"]]
    assert documents == ([1, 1] if verifier_of(recipe) in UNPACKED else [4])

    cli.trainer.fit_loop.epoch_loop.max_steps = 100_000  # the schedule needs a number of steps
    DryRun(cli.model, cli.trainer, torch.bfloat16)
    weights = sum(parameter.numel() for parameter in cli.model.teacher.model.parameters())
    assert weights / 1e9 == pytest.approx(PUBLISHED[verifier_of(recipe)], abs=0.01)
    trained = sum(parameter.numel() for parameter in cli.model.draft.parameters() if parameter.requires_grad)
    assert re.search(rf"`{re.escape(recipe.name)}` \| {trained / 1e6:,.0f} M \|", PAGE), (recipe.name, trained)


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_prints_its_usage(recipe):
    head = recipe.read_text().split("algorithm:")[0]
    assert f"specforge fit --config {recipe.relative_to(ROOT)} --config configs/trainer/one_node.yaml" in head


def test_every_verifier_has_a_recipe():
    assert {verifier_of(recipe) for recipe in RECIPES} == set(PUBLISHED)
    stored = {str(path.parent.relative_to(VERIFIERS)) for path in VERIFIERS.rglob("config.json")}
    assert stored == {hub_id_of(recipe) for recipe in RECIPES}


def test_estimating_needs_no_hub(monkeypatch, capsys):
    monkeypatch.setattr("huggingface_hub.hf_hub_download", None)
    recipe = ROOT / "configs" / "models" / "qwen3-4b-eagle3.yaml"
    words = ["--config", str(recipe), "--tokens", "1e4", "--device_flops", "1e15"]
    assert main(["estimate", *words]) == 0
    shown = capsys.readouterr().out
    assert "trained weights, for Qwen/Qwen3-4B" in shown and str(VERIFIERS / "Qwen" / "Qwen3-4B") in "".join(
        shown.split()
    )
