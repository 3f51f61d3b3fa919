"""The private names of Lightning work as assumed."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.demos.boring_classes import BoringModel
from lightning.pytorch.loggers import MLFlowLogger
from lightning.pytorch.plugins.environments import LightningEnvironment, SLURMEnvironment
from lightning.pytorch.strategies import ModelParallelStrategy
from pydantic import BaseModel

from specforge.private import lightning as private


class Watch(Callback):
    """Records the trainer's state after each training batch."""

    def __init__(self) -> None:
        self.found: dict[str, list[bool]] = {"validation": [], "accumulating": [], "early": [], "logs": []}

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: object) -> None:
        self.found["validation"].append(private.validation_follows(trainer))
        self.found["accumulating"].append(private.is_accumulating(trainer))
        self.found["early"].append(private.may_stop_early(trainer))
        self.found["logs"].append(private.logs_now(trainer))


def a_trainer(folder: Path, *callbacks: Callback, **settings: object) -> Trainer:
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet |= {"enable_model_summary": False, "accelerator": "cpu", "devices": 1}
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **(quiet | settings))


def test_what_follows_a_training_batch(tmp_path):
    watch = Watch()
    settings = {"max_steps": 3, "min_steps": 2, "min_epochs": 0, "accumulate_grad_batches": 2, "val_check_interval": 3}
    settings["log_every_n_steps"] = 2
    a_trainer(tmp_path, watch, limit_val_batches=1, num_sanity_val_steps=0, **settings).fit(BoringModel())
    assert watch.found == {
        "validation": [False, False, True, False, False, True],
        "accumulating": [True, False] * 3,
        "early": [False, False, False, True, True, True],
        "logs": [False, False, True, True, False, False],
    }


class Settings(BaseModel):
    rates: tuple[float, ...] = (0.5,)


class Module(BoringModel):
    def __init__(self, settings: Settings, folder: Path, other: object = None) -> None:
        super().__init__()
        self.save_hyperparameters(logger=False)
        private.make_loadable(self.hparams)
        self.settings, self.folder, self.other = settings, folder, other


def test_a_module_is_built_again_from_plain_values(tmp_path):
    module = Module(Settings(rates=(1.0, 2.0)), tmp_path, other=object())
    assert not private.has_trainer(module)
    trainer = a_trainer(tmp_path, max_steps=0)
    trainer.fit(module)
    assert private.has_trainer(module)
    trainer.save_checkpoint(tmp_path / "plain.ckpt")
    again = Module.load_from_checkpoint(tmp_path / "plain.ckpt", weights_only=True)
    assert (again.settings, again.folder, again.other) == (module.settings, tmp_path, None)


def test_what_launched_the_processes(tmp_path):
    assert isinstance(private.cluster_environment(a_trainer(tmp_path)), LightningEnvironment)
    slurm = SLURMEnvironment(auto_requeue=False)
    assert private.cluster_environment(a_trainer(tmp_path, plugins=[slurm])) is slurm


def test_a_strategy_keeps_sizes_that_are_set_before_setup():
    strategy = ModelParallelStrategy()
    before = dict(vars(strategy))
    private.shard_over(strategy, 3)
    changed = {name: (before[name], value) for name, value in vars(strategy).items() if before[name] != value}
    assert changed == {"_data_parallel_size": ("auto", 3), "_tensor_parallel_size": ("auto", 1)}


@pytest.mark.parametrize(("duration", "left"), [(timedelta(minutes=2), 120), (None, None)])
def test_a_timer_has_its_full_time_before_the_start(duration, left):
    assert Timer(duration).time_remaining() == left


@pytest.mark.parametrize(("own", "expected"), [(None, "version_0"), ("mine", "mine")])
def test_a_run_without_a_name_gets_one(tmp_path, monkeypatch, own, expected):
    pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    logger = MLFlowLogger("drafts", own, f"file:{tmp_path}")
    private.name_run(logger, "version_0")
    assert logger.experiment.get_run(logger.run_id).info.run_name == expected


@pytest.mark.parametrize(("epochs", "shown"), [(-1, "Epoch 0 "), (1, "Epoch 0/0 ")])
def test_epochs_without_a_limit_have_no_last_one(tmp_path, capfd, epochs, shown):
    settings = {"max_epochs": epochs, "max_steps": 2, "limit_val_batches": 0, "enable_progress_bar": True}
    a_trainer(tmp_path, private.EpochBar(), **settings).fit(BoringModel())
    assert shown in capfd.readouterr().out
