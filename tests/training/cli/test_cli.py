"""Merging of files, flags and defaults into one configuration, and help."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml

from specforge.__main__ import main

Printer = Callable[..., dict[str, Any]]
VERIFIER = str(Path(__file__).parents[3] / "configs" / "quickstart" / "verifier")
BASE = ["--algorithm", "eagle3", "--verifier", VERIFIER, "--data.train", "rows.jsonl"]


@pytest.fixture
def printed(capsys: pytest.CaptureFixture[str]) -> Printer:
    """Return what ``specforge fit ... --print_config`` prints, parsed."""

    def run(*words: str) -> dict[str, Any]:
        with pytest.raises(SystemExit) as left:
            main(["fit", *words, "--print_config"])
        assert not left.value.code
        return yaml.safe_load(capsys.readouterr().out)

    return run


def write(path: Path, values: Any) -> str:
    """Write a configuration file and return its name."""
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return str(path)


class TestMerging:
    def test_defaults(self, printed):
        config = printed(*BASE)
        assert config["algorithm"] == "eagle3"
        assert config["output_dir"] == "runs/eagle3"
        assert config["seed_everything"] == 42
        assert config["model"]["ttt_steps"] == 7
        assert config["model"]["draft"]["draft_vocab_size"] == 32000
        assert config["trainer"]["max_epochs"] is None  # one epoch, unless steps or time end the run

    def test_file_over_defaults(self, printed, tmp_path):
        file = write(tmp_path / "a.yaml", {"algorithm": "eagle3", "model": {"ttt_steps": 4}})
        config = printed("--config", file, *BASE[2:])
        assert config["model"]["ttt_steps"] == 4
        assert config["model"]["step_decay"] == 0.8

    def test_later_file_over_earlier_key_by_key(self, printed, tmp_path):
        first = write(
            tmp_path / "a.yaml",
            {"algorithm": "eagle3", "model": {"ttt_steps": 4, "draft": {"num_layers": 2, "fc_norm": True}}},
        )
        second = write(tmp_path / "b.yaml", {"model": {"draft": {"num_layers": 3}}, "data": {"batch_size": 5}})
        config = printed("--config", first, "--config", second, *BASE[2:])
        assert (config["model"]["ttt_steps"], config["data"]["batch_size"]) == (4, 5)
        assert config["model"]["draft"]["num_layers"] == 3
        assert config["model"]["draft"]["fc_norm"] is True
        config = printed("--config", second, "--config", first, *BASE[2:])
        assert config["model"]["draft"]["num_layers"] == 2

    def test_flag_over_files(self, printed, tmp_path):
        file = write(tmp_path / "a.yaml", {"algorithm": "eagle3", "model": {"draft": {"num_layers": 2}}})
        config = printed("--config", file, *BASE[2:], "--model.draft.num_layers", "4", "--trainer.max_epochs=3")
        assert config["model"]["draft"]["num_layers"] == 4
        assert config["trainer"]["max_epochs"] == 3

    def test_flag_before_the_file_is_overridden_only_by_the_file(self, printed, tmp_path):
        file = write(tmp_path / "a.yaml", {"algorithm": "eagle3", "model": {"draft": {"num_layers": 2}}})
        config = printed("--config", file, *BASE[2:], "--model.ttt_steps", "4")
        assert config["model"]["draft"]["num_layers"] == 2

    def test_a_later_objective_replaces_the_earlier(self, printed, tmp_path):
        file = write(tmp_path / "a.yaml", {"algorithm": "eagle3", "model": {"objective": {"jsd": 2.0}}})
        assert printed("--config", file, *BASE[2:])["model"]["objective"] == {"jsd": 2.0}
        config = printed("--config", file, *BASE[2:], "--model.objective", '{"lk_alpha": 1.0}')
        assert config["model"]["objective"] == {"lk_alpha": 1.0}

    @pytest.mark.parametrize("spelling", [["--config", "{}"], ["--config={}"], ["-c", "{}"]])
    def test_ways_to_name_a_file(self, printed, tmp_path, spelling):
        file = write(tmp_path / "a.yaml", {"algorithm": "eagle3", "model": {"ttt_steps": 4}})
        config = printed(*(word.format(file) for word in spelling), *BASE[2:])
        assert config["model"]["ttt_steps"] == 4

    def test_algorithm_of_a_later_file(self, printed, tmp_path):
        first = write(tmp_path / "a.yaml", {"algorithm": "nosuch"})
        second = write(tmp_path / "b.yaml", {"algorithm": "eagle3"})
        assert printed("--config", first, "--config", second, *BASE[2:])["algorithm"] == "eagle3"

    def test_algorithm_of_a_flag(self, printed, tmp_path):
        file = write(tmp_path / "a.yaml", {"algorithm": "nosuch"})
        assert printed("--config", file, *BASE)["algorithm"] == "eagle3"


class TestPrintConfig:
    def test_gives_the_same_configuration_again(self, printed, tmp_path):
        words = [
            *BASE,
            "--model.draft.num_layers=2",
            "--model.draft.aux_layers=[1,4,6]",
            "--model.objective",
            json.dumps({"kl": 0.5, "lk_alpha": 1.5}),
            "--model.optimizer.betas=[0.8,0.9]",
            "--trainer.limit_train_batches=0.5",
            "--trainer.precision=bf16-mixed",
            "--seed_everything=7",
            "--data.validation_share=0.25",
        ]
        once = printed(*words)
        assert once["model"]["draft"]["aux_layers"] == [1, 4, 6]
        assert once["model"]["optimizer"]["betas"] == [0.8, 0.9]
        again = printed("--config", write(tmp_path / "printed.yaml", once))
        assert again == once

    def test_holds_no_linked_key_twice(self, printed):
        config = printed(*BASE)
        assert config["verifier"] == VERIFIER
        assert "verifier" not in config["model"] and "verifier" not in config["data"]

    @pytest.mark.parametrize("name", ["quickstart.yaml", "smollm2-eagle3.yaml"])
    def test_recipes_are_valid(self, printed, name):
        recipe = Path(__file__).parents[3] / "configs" / name
        config = printed("--config", str(recipe))
        for key, value in yaml.safe_load(recipe.read_text())["model"].items():
            if not isinstance(value, dict):
                assert config["model"][key] == value

    def test_loads_nothing(self, printed, monkeypatch):
        monkeypatch.setattr("specforge.training.teacher.load_verifier", lambda *words: pytest.fail("loaded"))
        monkeypatch.setattr("specforge.training.teacher.load_config", lambda *words: pytest.fail("read"))
        printed(*BASE)


class TestHelp:
    @pytest.mark.parametrize("command", ["fit", "validate", "test"])
    def test_without_an_algorithm_lists_them(self, capsys, command):
        assert main([command, "--help"]) == 0
        text = capsys.readouterr().out
        assert f"usage: specforge {command} --config FILE" in text
        assert "eagle3" in text and "--algorithm NAME --help" in text

    def test_without_an_algorithm_loads_nothing_heavy(self):
        code = (
            "import sys; from specforge.__main__ import main; assert main(['fit', '--help']) == 0; "
            "heavy = {'torch', 'lightning', 'transformers', 'jsonargparse'} & set(sys.modules); assert not heavy, heavy"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, env=os.environ)
        assert done.returncode == 0, done.stderr

    def test_of_an_algorithm_describes_every_setting(self, capsys, monkeypatch):
        monkeypatch.setenv("COLUMNS", "200")
        with pytest.raises(SystemExit) as left:
            main(["fit", "--algorithm", "eagle3", "--help"])
        assert left.value.code == 0
        text = " ".join(capsys.readouterr().out.split())
        from specforge.training.optimizers import OptimizerSettings
        from specforge.training.schedules import ScheduleSettings
        from specforge_eagle3.module import Eagle3DraftSettings

        for group, settings in (
            ("model.draft", Eagle3DraftSettings),
            ("model.optimizer", OptimizerSettings),
            ("model.schedule", ScheduleSettings),
        ):
            for key, field in settings.model_fields.items():
                assert f"--{group}.{key} " in text, key
                assert field.description and field.description in text, key
        for key in ("--model.ttt_steps", "--model.objective", "--data.train", "--trainer.max_steps", "--ckpt_path"):
            assert key in text
        assert "usage: specforge fit" in text
        # A setting outside a group is described too.
        assert "Number of steps of training-time test" in text
        assert "Source of the training rows" in text
