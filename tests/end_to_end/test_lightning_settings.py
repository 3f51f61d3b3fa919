"""The trainer's keys work as in Lightning or are refused in one message; and the end of runs that cannot continue."""

from __future__ import annotations

import os
import signal
import threading
from pathlib import Path

import pytest
import torch
from quickstart_runs import Workshop
from run_processes import QUIET, begin
from training_runs import scalars

from specforge.__main__ import main
from specforge.training.module import DraftModule

BATCHES = 8  # steps of an epoch of the workshop's rows
MONITOR = {"class_path": "lightning.pytorch.callbacks.LearningRateMonitor"}


def test_max_steps_only_trains_until_then_and_the_schedule_spans_them(workshop, fit, capfd):
    del workshop.values["trainer"]["max_epochs"]
    words = ["--trainer.limit_val_batches=1", "--trainer.limit_train_batches=3", "--model.schedule.warmup=0"]
    run = fit("runs", "--trainer.max_steps=10", *words)
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 10
    assert "length: 10 optimizer steps (trainer.max_steps; an epoch has 3 batches)" in capfd.readouterr().out
    rates = [value for _, value in scalars(run, "train/learning_rate")]
    assert rates[0] == pytest.approx(4e-3) and len(rates) == 10 and 0 < rates[-1] < 0.05 * rates[0]


def test_max_epochs_before_max_steps_ends_the_schedule_too(workshop, fit, capfd):
    run = fit("runs", "--trainer.max_steps=900", "--trainer.max_epochs=1", "--model.schedule.warmup=0")
    assert f"length: {BATCHES} optimizer steps (trainer.max_epochs 1" in capfd.readouterr().out
    rates = [value for _, value in scalars(run, "train/learning_rate")]
    assert len(rates) == BATCHES and rates[-1] < 0.05 * rates[0]


def test_max_time_saves_the_last_step_and_is_reported(workshop, fit, capfd):
    run = fit("runs", "--trainer.max_time={seconds: 1}", "--trainer.max_steps=5000", "--trainer.max_epochs=-1")
    output = capfd.readouterr().out
    step = torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"]
    assert f"Ended at step {step:,} of 5,000: trainer.max_time is over" in output


def test_a_bare_run_stores_nothing(workshop, capfd):
    del workshop.values["trainer"]["log_every_n_steps"]
    words = workshop.words("runs", "--trainer.barebones=true", "--trainer.max_steps=1")
    assert main(["fit", *words]) == 0
    shown = capfd.readouterr()
    assert "run: nothing of it is stored" in shown.out and "self.log" not in shown.err
    assert not (workshop.folder / "runs").exists()


def test_one_callback_needs_no_list_and_logging_can_be_off(workshop, fit):
    workshop.values["trainer"] |= {"callbacks": MONITOR, "log_every_n_steps": 0}
    run = fit("runs", "--trainer.max_steps=2", "--run_name=mine")
    assert run.name == "mine" or (run.parent / "mine" / "draft" / "config.json").is_file()


@pytest.mark.parametrize(
    ("trainer", "parts"),
    [
        ({"enable_checkpointing": False}, ["trainer.enable_checkpointing", "trainer.fast_dev_run"]),
        ({"barebones": True, "profiler": "simple", "log_every_n_steps": 0}, ["trainer.barebones", "trainer.profiler"]),
        ({"val_check_interval": BATCHES + 1}, ["trainer.val_check_interval", "check_val_every_n_epoch: null"]),
        ({"callbacks": {"class_path": "nowhere.Thing"}}, ["trainer.callbacks", "'nowhere'", "install the package"]),
        ({"logger": [{"class_path": "nowhere.Thing"}]}, ["trainer.logger", "'nowhere'", "install the package"]),
    ],
)
def test_refusals_are_one_message(workshop, capfd, trainer, parts):
    workshop.values["trainer"] |= trainer
    assert main(["fit", *workshop.words("runs")]) == 2
    message = capfd.readouterr().err
    assert "Traceback" not in message and not list(workshop.folder.glob("runs/*/checkpoints"))
    for part in parts:
        assert part in message


def test_variables_of_slurm_that_do_not_match_the_run(workshop, capfd, monkeypatch):
    for name, value in {"SLURM_NTASKS": "4", "SLURM_JOB_ID": "1", "SLURM_JOB_NAME": "train"}.items():
        monkeypatch.setenv(name, value)
    assert main(["fit", *workshop.words("runs")]) == 2
    message = capfd.readouterr().err
    assert "--ntasks-per-node" in message and "SLURM_JOB_NAME=bash" in message and "Traceback" not in message


def test_in_a_thread_that_is_not_the_main_one(workshop):
    statuses = []
    words = ["fit", *workshop.words("runs", "--trainer.max_steps=1")]
    thread = threading.Thread(target=lambda: statuses.append(main(words)))
    thread.start()
    thread.join()
    assert statuses == [0]


class TestEnds:
    """Runs in separate processes that are ended at the third batch."""

    @pytest.fixture
    def ended(self, workshop: Workshop, monkeypatch: pytest.MonkeyPatch):
        original = DraftModule.training_step

        def run(what, *words: str) -> tuple[int, str]:
            def step(self: DraftModule, batch, batch_idx: int):
                if batch_idx == 2:
                    what()
                return original(self, batch, batch_idx)

            monkeypatch.setattr(DraftModule, "training_step", step)
            words = ["fit", *workshop.words("runs", QUIET, "--trainer.limit_val_batches=0", *words)]
            process = begin(lambda: main(words), workshop.folder / "run.log")
            status = process.wait()
            assert "Traceback" not in process.shown
            return status, process.shown

        return run

    def test_a_second_ctrl_c(self, ended):
        def press_twice() -> None:
            os.kill(os.getpid(), signal.SIGINT)
            os.kill(os.getpid(), signal.SIGINT)

        status, shown = ended(press_twice)
        assert status == 130 and shown.endswith("specforge fit: interrupted\n")

    def test_a_dataloader_worker_is_killed(self, ended):
        def kill_children() -> None:
            for child in Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text().split():
                os.kill(int(child), signal.SIGKILL)

        status, shown = ended(kill_children, "--data.num_workers=1")
        assert status == 1 and "a DataLoader worker was lost" in shown and "data.num_workers" in shown

    def test_rows_are_truncated_while_they_are_mapped(self, ended, workshop):
        cache = workshop.folder / "cache"

        def cut() -> None:
            for rows in cache.glob("*/rows.arrow"):
                os.truncate(rows, 100)

        more = ["--data.num_workers=1", f"--data.cache_dir={cache}", "--trainer.max_epochs=9"]
        status, shown = ended(cut, *more, "--trainer.max_steps=70")
        # The message names the file unless it is truncated between the check of its size and the read.
        assert status == 1
        assert "rows.arrow was truncated while in use" in shown or "ended by a bus error: a file of rows" in shown
