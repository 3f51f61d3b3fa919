"""The trainer files can be combined with every recipe, and the commands of docs/clusters.md work."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401  (its logger writes to what is stderr at the first import: not to a test's)
import pytest
import yaml
from launching import PAGE, ROOT, documented

from specforge.__main__ import main

TRAINERS = {
    "one_gpu": {"devices": 1, "num_nodes": 1, "strategy": "auto"},
    "one_node": {"devices": "auto", "num_nodes": 1, "strategy": "ddp"},
    "several_nodes": {"devices": "auto", "num_nodes": 2, "strategy": "fsdp2"},
}
RECIPES = [path for path in sorted((ROOT / "configs").glob("*.yaml")) if "algorithm:" in path.read_text()]


def resolved(words: list[str], capsys: pytest.CaptureFixture[str]) -> dict[str, Any]:
    """Return the complete configuration of a command."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        main([*words, "--print_config"])
    assert left.value.code == 0
    values: dict[str, Any] = yaml.safe_load(capsys.readouterr().out)
    return values


def test_there_is_a_file_for_each_and_several_recipes():
    assert {path.stem for path in (ROOT / "configs" / "trainer").iterdir()} == TRAINERS.keys()
    assert len(RECIPES) >= 5


@pytest.mark.parametrize("recipe", RECIPES, ids=lambda path: path.stem)
def test_trainer_files_override_every_recipe(recipe: Path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    unchanged = resolved(["fit", "--config", str(recipe)], capsys)
    for name, expected in TRAINERS.items():
        merged = resolved(["fit", "--config", str(recipe), "--config", f"configs/trainer/{name}.yaml"], capsys)
        changed = {**expected, "accelerator": "gpu", "precision": "bf16-mixed"}
        assert merged["trainer"] == {**unchanged["trainer"], **changed}
        assert {key: merged[key] for key in merged if key != "trainer"} == {
            key: unchanged[key] for key in unchanged if key != "trainer"
        }


@pytest.mark.parametrize("start", ["specforge fit", "torchrun", "srun"])
def test_documented_commands_are_accepted(start: str, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    words = documented(start)
    words = words[words.index("fit") :]
    values = resolved([{"$SLURM_NNODES": "3", "$SLURM_NTASKS_PER_NODE": "8"}.get(word, word) for word in words], capsys)
    nodes = {"specforge fit": 1, "torchrun": 2, "srun": 3}
    assert values["trainer"]["num_nodes"] == nodes[start]
    assert values["trainer"]["precision"] == "bf16-mixed"


def test_the_batch_script_is_valid():
    blocks = re.findall(r"```bash\n(.*?)```", PAGE.read_text(), re.DOTALL)
    script = next(block for block in blocks if "#SBATCH" in block)
    assert script.startswith("#!/bin/bash\n#SBATCH")
    subprocess.run(["bash", "-n"], input=script, text=True, check=True, timeout=10)


@pytest.mark.parametrize("strategy", ["fsdp", "deepspeed", "fsdp3"])
def test_other_strategies_are_refused(strategy: str, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    assert main(["fit", "--config", "configs/quickstart.yaml", f"--trainer.strategy={strategy}"]) == 2
    message = capsys.readouterr().err
    assert f"trainer.strategy: '{strategy}'" in message and "auto, ddp, fsdp2" in message
    assert ("Did you mean 'fsdp2'" in message) == strategy.startswith("fsdp")


def test_a_split_verifier_cannot_generate_in_stage_two(tmp_path: Path, capsys, monkeypatch):
    monkeypatch.chdir(ROOT)
    recipe = yaml.safe_load((ROOT / "configs" / "mlp.yaml").read_text())
    quickstart = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    recipe |= {"verifier": quickstart["verifier"], "data": quickstart["data"], "output_dir": str(tmp_path)}
    recipe["trainer"]["accelerator"] = "cpu"
    (tmp_path / "mlp.yaml").write_text(yaml.safe_dump(recipe))
    cache = f"--data.cache_dir={tmp_path}"
    assert main(["fit", "--config", str(tmp_path / "mlp.yaml"), "--verifier_sharding=true", cache]) == 2
    message = capsys.readouterr().err
    assert "verifier_sharding" in message and "data.stage_two" in message
