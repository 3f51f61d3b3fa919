"""A user's Trainer trains a draft like the command: checkpoints, board and resumption."""

from __future__ import annotations

import os
import random
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import TensorBoardLogger
from small_runs import SmallRuns, assert_close, logged
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from specforge import SpeculatorModel
from specforge.__main__ import main
from specforge.data.module import DraftDataModule
from specforge.errors import UsageError
from specforge.training.callbacks.checkpoints import LastCheckpoint
from specforge.training.callbacks.fit import RunCallbacks
from specforge.training.optimizers import OptimizerSettings
from specforge.training.saving import WholeCheckpointIO
from specforge.training.schedules import ScheduleSettings
from specforge_eagle3.module import Eagle3DraftSettings, Eagle3Module

STEPS = 6


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, tiny_verifiers: Mapping[str, Any]) -> SmallRuns:
    """Rows, and one run of the command."""
    draw = random.Random(0)
    trainer = {"accelerator": "cpu", "max_steps": STEPS, "log_every_n_steps": 1, "enable_progress_bar": False}
    values = {"trainer": trainer, "data": {"max_length": 48, "batch_size": 2}}
    made = SmallRuns(tmp_path_factory.mktemp("plain"), tiny_verifiers["llama"].folder, values)
    for split, number in (("train", 12), ("validation", 3)):
        lengths = [draw.randint(8, 40) for _ in range(number)]
        made.write(
            split,
            [([draw.randrange(3, 61) for _ in range(length)], [0] * 3 + [1] * (length - 3)) for length in lengths],
        )
    assert main(made.words("command", "eagle3")) == 0
    return made


def module_and_data(runs: SmallRuns) -> tuple[Eagle3Module, DraftDataModule]:
    """Build in Python what the command builds."""
    seed_everything(42, verbose=False)
    module = Eagle3Module(
        verifier=str(runs.verifier),
        ttt_steps=3,
        draft=Eagle3DraftSettings(draft_vocab_size=40),
        objective={"kl": 0.5, "lk_lambda": 0.5},
        optimizer=OptimizerSettings(lr=3e-3),
        schedule=ScheduleSettings(name="constant", warmup=0),
    )
    sources = {split: str(runs.folder / f"{split}.jsonl") for split in ("train", "validation")}
    data = DraftDataModule(
        verifier=str(runs.verifier), **sources, max_length=48, batch_size=2, cache_dir=str(runs.folder / "cache")
    )
    return module, data


def trainer_in(folder: Path, **settings: Any) -> Trainer:
    """Return a Trainer with its defaults, except those that cost time."""
    few = {"accelerator": "cpu", "max_steps": STEPS, "log_every_n_steps": 1, "num_sanity_val_steps": 0}
    return Trainer(default_root_dir=folder, enable_progress_bar=False, **(few | settings))


@pytest.fixture(scope="module")
def plain(runs: SmallRuns, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run by a Trainer with the same settings, as numbered by Lightning."""
    root = tmp_path_factory.mktemp("python")
    trainer_in(root).fit(*module_and_data(runs))
    return root / "lightning_logs" / "version_0"


class TestAsTheCommand:
    def test_files(self, runs, plain):
        def files(run: Path) -> set[str]:
            found = {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}
            return {name for name in found if not name.startswith("events.out")}

        assert files(plain) == files(runs.run("command")) - {"config.yaml"}

    def test_weights(self, runs, plain):
        for name in ("last", "best"):
            own = runs.run("command") / "checkpoints" / f"{name}.ckpt"
            assert_close(own, plain / "checkpoints" / f"{name}.ckpt", rtol=0, atol=0)
        assert SpeculatorModel.from_pretrained(plain / "draft").config.draft_vocab_size == 40

    def test_board(self, runs, plain):
        def tags(run: Path) -> dict[str, Any]:
            return EventAccumulator(str(run)).Reload().Tags()

        def without_configuration(run: Path) -> list[str]:
            return [tag for tag in tags(run)["tensors"] if not tag.startswith("configuration")]

        assert logged(plain) == logged(runs.run("command"))
        assert tags(plain)["images"] == tags(runs.run("command"))["images"] != []
        assert without_configuration(plain) == without_configuration(runs.run("command"))


class InterruptAt(Callback):
    """Sends the signal of Ctrl-C in a batch."""

    def __init__(self, batch: int) -> None:
        self.batch = batch

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if batch_idx == self.batch:
            os.kill(os.getpid(), signal.SIGINT)


def test_an_interrupted_run_prints_how_to_resume_and_ends_with_the_same_weights(runs, plain, tmp_path, capsys):
    with pytest.raises(SystemExit) as left:
        trainer_in(tmp_path, callbacks=[InterruptAt(2)]).fit(*module_and_data(runs))
    assert left.value.code == 130
    last = tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    assert f"trainer.fit(module, datamodule=data, ckpt_path='{last}')" in capsys.readouterr().out
    module, data = module_and_data(runs)
    # The same folder, through a logger with this version.
    again = TensorBoardLogger(tmp_path, version=0)
    trainer_in(tmp_path, logger=again, max_epochs=5).fit(module, datamodule=data, ckpt_path=str(last))
    assert "resumed with other settings: trainer.max_epochs" in capsys.readouterr().out
    assert_close(plain / "checkpoints" / "last.ckpt", last, rtol=0, atol=0)


def test_the_same_trainer_resumes(runs, plain, tmp_path):
    interrupt = InterruptAt(3)
    trainer = trainer_in(tmp_path, callbacks=[interrupt])
    with pytest.raises(SystemExit):
        trainer.fit(*module_and_data(runs))
    interrupt.batch = -1
    last = tmp_path / "lightning_logs" / "version_0" / "checkpoints" / "last.ckpt"
    trainer.fit(*module_and_data(runs), ckpt_path=last)
    assert_close(plain / "checkpoints" / "last.ckpt", last, rtol=0, atol=0)


def test_callbacks_can_be_set_and_omitted(runs, tmp_path, capsys):
    own = RunCallbacks(progress_bar=None, summary=None, draft_writer=None, acceptance_figure=None)
    own.last_checkpoint.every_n_steps = 2
    trainer = trainer_in(tmp_path, callbacks=own.present(), limit_val_batches=1)
    trainer.fit(*module_and_data(runs))
    assert not {"Summary", "DraftWriter"} & {type(callback).__name__ for callback in trainer.callbacks}
    run = tmp_path / "lightning_logs" / "version_0"
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best.ckpt", "last.ckpt", "previous.ckpt"}
    assert not (run / "draft").exists() and "draft:" not in capsys.readouterr().out
    assert EventAccumulator(str(run)).Reload().Tags()["images"] == []


def test_a_given_callback_replaces_its_default(runs, tmp_path):
    mine = LastCheckpoint(every_n_steps=1)
    trainer = trainer_in(tmp_path, callbacks=[mine], max_steps=1, limit_val_batches=0, logger=False)
    trainer.fit(*module_and_data(runs))
    kinds = [type(callback) for callback in trainer.callbacks]
    assert kinds.count(LastCheckpoint) == 1 and mine in trainer.callbacks
    assert ModelCheckpoint not in kinds  # Lightning's own default
    assert isinstance(trainer.strategy.checkpoint_io, WholeCheckpointIO)
    assert (tmp_path / "draft" / "config.json").is_file()


@pytest.mark.parametrize("settings", [{"enable_checkpointing": False, "logger": False}, {"fast_dev_run": 1}])
def test_nothing_is_stored_if_the_trainer_stores_nothing(runs, tmp_path, settings):
    module, data = module_and_data(runs)
    trainer_in(tmp_path, **settings).fit(module, data)
    assert not list(tmp_path.iterdir()) and module.draft is not None


def test_loaders_instead_of_data_are_refused(runs, tmp_path):
    module, _ = module_and_data(runs)
    with pytest.raises(UsageError, match=r"trainer\.fit\(module, datamodule=data\)"):
        trainer_in(tmp_path).fit(module, torch.utils.data.DataLoader([1]))
