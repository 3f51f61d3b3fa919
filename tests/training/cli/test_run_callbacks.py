"""A run's default callbacks in a configuration: shown, set, replaced and omitted."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from specforge.__main__ import main
from specforge.hookspecs import Algorithm
from specforge.registry import installed
from specforge.training.callbacks.board.samples import SampleTexts
from specforge.training.cli.command_line import TrainingCLI

VERIFIER = str(Path(__file__).parents[3] / "configs" / "quickstart" / "verifier")
BASE = ["--algorithm", "eagle3", "--verifier", VERIFIER, "--model.draft.draft_vocab_size=64"]


class MySamples(SampleTexts):
    """Has a title."""

    def __init__(self, title: str, texts: int) -> None:
        super().__init__(texts)
        self.title = title


@pytest.fixture
def callbacks(tmp_path: Path):
    """Return a function that builds a run's trainer and returns its callbacks by class name."""

    def build(*words: str, subcommand: str = "fit") -> dict[str, Any]:
        rows = tmp_path / "rows.jsonl"
        rows.write_text('{"input_ids": [1, 2, 3, 4], "loss_mask": [0, 1, 1, 1]}')
        folder = ["--data.train", str(rows), "--output_dir", str(tmp_path / "runs")]
        cli = TrainingCLI(installed().find(Algorithm, "eagle3"), [*BASE, *folder, *words], subcommand)
        cli._claims.close()
        return {type(callback).__name__: callback for callback in cli.trainer.callbacks}

    return build


def test_print_config_shows_each(capsys):
    with pytest.raises(SystemExit):
        main(["fit", *BASE, "--data.train=rows.jsonl", "--print_config"])
    shown = yaml.safe_load(capsys.readouterr().out)["callbacks"]
    assert shown["samples"] == {
        "class_path": "specforge.training.callbacks.board.samples.SampleTexts",
        "init_args": {"texts": 2},
    }
    names = ["Advice", "BestCheckpoint", "LastCheckpoint", "DraftWriter", "ResumedSettings", "ProgressBar"]
    assert set(names) <= {callback["class_path"].rpartition(".")[2] for callback in shown.values()}


def test_each_is_given_to_the_trainer(callbacks):
    found = callbacks("--save_every_n_steps=7", "--callbacks.samples.texts=5")
    assert found["LastCheckpoint"].every_n_steps == 7 and found["SampleTexts"].texts == 5
    assert {"RunConfig", "BestCheckpoint", "DraftWriter", "ProgressBar", "Throughput"} <= found.keys()


def test_some_are_omitted_and_replaced(callbacks, tmp_path):
    own = {"class_path": f"{__name__}.MySamples", "init_args": {"title": "mine", "texts": 3}}
    file = tmp_path / "callbacks.yaml"
    file.write_text(yaml.safe_dump({"callbacks": {"advice": None, "samples": own}}))
    found = callbacks("--config", str(file), "--callbacks.progress_bar=null")
    assert not {"Advice", "ProgressBar", "SampleTexts"} & found.keys()
    assert (found["MySamples"].title, found["MySamples"].texts) == ("mine", 3)


def test_a_trial_run_only_shows_its_progress(callbacks):
    assert {"Summary", "ProgressBar"} == callbacks("--trainer.fast_dev_run=true").keys() - {"ModelCheckpoint"}


@pytest.mark.parametrize(
    ("word", "parts"),
    [
        ("--callbacks.best_checkpoint=null", ["callbacks.best_checkpoint: null is not allowed"]),
        (
            "--callbacks.best_checkpoint.mode=most",
            ["callbacks.best_checkpoint", "mode: expected max or min, got 'most'"],
        ),
        ("--callbacks.sample=null", ["callbacks.sample", "callbacks.samples"]),
        ("--callbacks.samples.text=3", ["unknown key 'callbacks.samples.text'"]),
        ("--callbacks.samples.texts=x", ["callbacks.samples", "texts: expected an integer, got 'x'"]),
        ("--callbacks.samples=nowhere.Thing", ["callbacks.samples", "nowhere"]),
        ("--callbacks.last_checkpoint.every_n_steps=3", ["every_n_steps", "save_every_n_steps"]),
        ("--callbacks.last_checkpoint.init_args.every_n_steps=3", ["every_n_steps", "save_every_n_steps"]),
    ],
)
def test_faults_are_named(word, parts, capsys):
    assert main(["fit", *BASE, "--data.train=rows.jsonl", word]) == 2
    message = capsys.readouterr().err
    assert "Traceback" not in message
    for part in parts:
        assert part in message


def test_a_list_is_refused(tmp_path, capsys):
    file = tmp_path / "list.yaml"
    file.write_text(yaml.safe_dump({"callbacks": [{"class_path": "Advice"}]}))
    assert main(["fit", *BASE, "--data.train=rows.jsonl", "--config", str(file)]) == 2
    assert "callbacks: expected keys and values" in capsys.readouterr().err
