"""Stopping and resuming: after a signal, a crash, in the middle of an epoch; damaged checkpoints and full disks."""

from __future__ import annotations

import os
import re
import resource
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from quickstart_runs import QUICKSTART, Workshop
from safetensors.torch import load_file
from training_runs import assert_same_values, assert_same_weights, scalars, weights

from specforge.__main__ import main
from specforge.data.features import growing
from specforge.data.module import DraftDataModule
from specforge.training.module import DraftModule

Arm = Callable[..., None]
# Without accumulation an epoch has 8 steps and a validation at its end; with accumulation of 2 it has 4.
VARIANTS = {
    "plain": [],
    "accumulated": ["--trainer.accumulate_grad_batches=2", "--trainer.max_steps=7"],
    "muon": ["--model.optimizer.name=muon"],
    "mid-epoch validation": ["--trainer.val_check_interval=4"],
    "constant rate": ["--model.schedule.name=constant", "--model.schedule.warmup=0"],
    "chosen by the running mean": ['--model.objective={"lk_lambda": 1.0}'],
}


class Crash(Exception):
    """An exception that the program does not handle."""


@pytest.fixture(scope="module")
def straight(shared: Workshop) -> Callable[[str], Path]:
    """Run a variant without a stop, once."""

    def run(variant: str) -> Path:
        output = f"straight {variant}"
        if not shared.run_folder(output).exists():
            assert main(["fit", *shared.words(output, *VARIANTS[variant])]) == 0
        return shared.run_folder(output)

    return run


def assert_same_run(resumed: Path, expected: Path) -> None:
    """Compare all outputs of two finished runs, bit for bit."""
    for name in ("last", "best"):
        first, second = (
            torch.load(run / "checkpoints" / f"{name}.ckpt", weights_only=True) for run in (resumed, expected)
        )
        assert first["global_step"] == second["global_step"], name
        assert_same_weights(first["state_dict"], second["state_dict"])
        assert_same_values(first["optimizer_states"], second["optimizer_states"])
        assert_same_values(first["lr_schedulers"], second["lr_schedulers"])
    first, second = (load_file(run / "draft" / "model.safetensors") for run in (resumed, expected))
    assert_same_weights(first, second)
    # A step that ran twice, before a crash and after it, is logged twice with the same value. A step may be missing
    # here, see test_every_step_is_logged; a validation may not.
    assert set(scalars(resumed, "train/loss")) <= set(scalars(expected, "train/loss"))
    assert set(scalars(resumed, "val/loss")) == set(scalars(expected, "val/loss"))


def interrupt(workshop: Workshop, *words: str, number: int = signal.SIGINT) -> None:
    """Run ``specforge fit`` until a signal ends it."""
    with pytest.raises(SystemExit) as left:
        main(["fit", *workshop.words("runs", *words)])
    assert left.value.code == 128 + number


class TestInterruptAndResume:
    @pytest.mark.parametrize("batch", [1, 3, 7, 8, 9, 12])
    def test_at_any_batch(self, workshop, straight, interrupt_at, batch):
        expected = straight("plain")
        interrupt_at(batch)
        interrupt(workshop)
        run = workshop.run_folder("runs")
        assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == batch
        assert main(["fit", *workshop.words("runs", "--ckpt_path", "last")]) == 0
        assert_same_run(run, expected)

    @pytest.mark.parametrize(
        ("variant", "batch", "step"),
        [
            ("accumulated", 3, 2),
            ("accumulated", 4, 2),
            ("accumulated", 11, 6),
            ("muon", 5, 5),
            ("mid-epoch validation", 4, 4),
            ("mid-epoch validation", 6, 6),
            ("chosen by the running mean", 5, 5),
        ],
    )
    def test_with_other_settings(self, workshop, straight, interrupt_at, variant, batch, step):
        expected = straight(variant)
        interrupt_at(batch)
        interrupt(workshop, *VARIANTS[variant])
        run = workshop.run_folder("runs")
        assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == step
        assert main(["fit", *workshop.words("runs", *VARIANTS[variant], "--ckpt_path", "last")]) == 0
        assert_same_run(run, expected)

    def test_twice(self, workshop, straight, interrupt_at):
        expected = straight("plain")
        interrupt_at(3)
        interrupt(workshop)
        interrupt_at(3)
        interrupt(workshop, "--ckpt_path", "last")
        run = workshop.run_folder("runs")
        assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 6
        assert main(["fit", *workshop.words("runs", "--ckpt_path", "last")]) == 0
        assert_same_run(run, expected)

    @pytest.mark.parametrize("variant", ["plain", "mid-epoch validation"])
    def test_during_a_validation(self, workshop, straight, interrupt_at, variant):
        expected = straight(variant)
        interrupt_at(1, "validation_step")
        interrupt(workshop, *VARIANTS[variant])
        interrupt_at(-1, "validation_step")
        assert main(["fit", *workshop.words("runs", *VARIANTS[variant], "--ckpt_path", "last")]) == 0
        assert_same_run(workshop.run_folder("runs"), expected)

    def test_every_step_is_logged(self, workshop, straight, interrupt_at):
        interrupt_at(3)
        interrupt(workshop)
        assert main(["fit", *workshop.words("runs", "--ckpt_path", "last")]) == 0
        steps = [step for step, _ in scalars(workshop.run_folder("runs"), "train/loss")]
        assert steps == [step for step, _ in scalars(straight("plain"), "train/loss")]

    def test_with_loading_processes(self, workshop, straight, interrupt_at):
        expected = straight("plain")
        interrupt_at(3)
        interrupt(workshop, "--data.num_workers=1")
        assert main(["fit", *workshop.words("runs", "--data.num_workers=1", "--ckpt_path", "last")]) == 0
        assert_same_run(workshop.run_folder("runs"), expected)

    @pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1])
    def test_signals_of_schedulers(self, workshop, straight, interrupt_at, capfd, number):
        expected = straight("accumulated")
        interrupt_at(6, number=number)
        interrupt(workshop, *VARIANTS["accumulated"], number=number)
        shown = capfd.readouterr().out
        assert f"{number.name}: stopping at the end of a step and saving" in shown
        assert f"Stopped by {number.name} at step 3" in shown and "--ckpt_path last" in shown
        interrupt_at(-1)
        assert main(["fit", *workshop.words("runs", *VARIANTS["accumulated"], "--ckpt_path", "auto")]) == 0
        assert_same_run(workshop.run_folder("runs"), expected)

    @pytest.mark.parametrize(
        ("command", "loader", "where"),
        [("fit", "train_dataloader", "before the first checkpoint"), ("validate", "val_dataloader", "before the end")],
    )
    def test_a_signal_before_training_or_in_a_validation_is_no_success(
        self, workshop, straight, monkeypatch, capfd, command, loader, where
    ):
        words = [] if command == "fit" else ["--ckpt_path", str(straight("plain") / "checkpoints" / "last.ckpt")]
        original = getattr(DraftDataModule, loader)

        def ask_to_stop(self: DraftDataModule) -> Any:
            if callable(signal.getsignal(signal.SIGTERM)):  # Lightning's handler is installed
                os.kill(os.getpid(), signal.SIGTERM)
            return original(self)

        monkeypatch.setattr(DraftDataModule, loader, ask_to_stop)
        with pytest.raises(SystemExit) as left:
            main([command, *workshop.words("runs", *words)])
        assert left.value.code == 128 + signal.SIGTERM
        assert f"Stopped by SIGTERM {where}" in capfd.readouterr().out

    @pytest.mark.parametrize("number", [signal.SIGUSR1, signal.SIGUSR2])
    def test_before_slurm_ends_a_job(self, workshop, straight, interrupt_at, monkeypatch, number):
        expected = straight("accumulated")
        for name in ("SLURM_NTASKS", "SLURM_NTASKS_PER_NODE", "SLURM_NNODES", "SLURM_JOB_ID"):
            monkeypatch.setenv(name, "1")
        for name in ("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"):
            monkeypatch.setenv(name, "0")
        monkeypatch.setenv("SLURM_JOB_NAME", "train")
        if number != signal.SIGUSR1:
            plugin = "lightning.pytorch.plugins.environments.SLURMEnvironment"
            workshop.values["trainer"]["plugins"] = {
                "class_path": plugin,
                "init_args": {"requeue_signal": number.name},
            }
        interrupt_at(5, number=number)
        interrupt(workshop, *VARIANTS["accumulated"], number=number)
        # Lightning itself would save a hpc_ckpt in the middle of a step, and resume from it automatically.
        assert [path.name for path in (workshop.folder / "runs").iterdir()] == ["version_0"]
        interrupt_at(-1)
        assert main(["fit", *workshop.words("runs", *VARIANTS["accumulated"], "--ckpt_path", "auto")]) == 0
        assert_same_run(workshop.run_folder("runs"), expected)

    def test_a_repeated_signal_of_a_scheduler_changes_nothing(self, workshop, interrupt_at, monkeypatch):
        kill = os.kill
        monkeypatch.setattr(os, "kill", lambda process, number: [kill(process, number) for _ in range(2)])
        interrupt_at(2, number=signal.SIGTERM)
        interrupt(workshop, number=signal.SIGTERM)

    @pytest.mark.parametrize("batch", [2, -1])
    def test_signal_handlers_are_restored(self, workshop, interrupt_at, batch):
        numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)
        before = [signal.getsignal(number) for number in numbers]
        interrupt_at(batch)
        if batch > 0:
            interrupt(workshop)
        else:
            assert main(["fit", *workshop.words("runs", "--trainer.max_steps=2")]) == 0
        assert [signal.getsignal(number) for number in numbers] == before

    def test_a_job_that_restarts_automatically(self, workshop, straight, interrupt_at):
        words = ["fit", *workshop.words("runs", "--ckpt_path=auto")]
        for batch, number in ((3, signal.SIGUSR1), (4, signal.SIGTERM)):
            interrupt_at(batch, number=number)
            with pytest.raises(SystemExit):
                main(words)
        assert main(words) == 0
        assert_same_run(workshop.run_folder("runs"), straight("plain"))
        assert main(words) == 0  # it had finished
        assert [path.name for path in (workshop.folder / "runs").iterdir()] == ["version_0"]

    def test_a_moved_checkpoint_begins_a_new_run(self, workshop, straight, interrupt_at):
        interrupt_at(3)
        interrupt(workshop)
        moved = workshop.folder / "moved.ckpt"
        (workshop.run_folder("runs") / "checkpoints" / "last.ckpt").rename(moved)
        assert main(["fit", *workshop.words("runs", "--ckpt_path", str(moved))]) == 0
        assert_same_weights(
            weights(workshop.run_folder("runs", 1) / "checkpoints" / "last.ckpt"),
            weights(straight("plain") / "checkpoints" / "last.ckpt"),
        )


class TestCrash:
    @pytest.fixture
    def crash_at(self, monkeypatch) -> Arm:
        originals = {name: getattr(DraftModule, name) for name in ("training_step", "validation_step")}

        def arm(batch_number: int, stage: str = "training_step") -> None:
            seen = 0

            def step(self: DraftModule, batch: Any, batch_idx: int) -> Any:
                nonlocal seen
                seen += 1
                if seen == batch_number:
                    raise Crash
                return originals[stage](self, batch, batch_idx)

            monkeypatch.setattr(DraftModule, stage, step)

        return arm

    @pytest.mark.parametrize("variant", ["plain", "mid-epoch validation"])
    def test_in_a_validation(self, workshop, straight, crash_at, variant):
        # The step before a validation is not saved without it, or the best draft would be chosen from the others.
        expected, words = straight(variant), [*VARIANTS[variant], "--save_every_n_steps=1"]
        crash_at(2, "validation_step")
        with pytest.raises(Crash):
            main(["fit", *workshop.words("runs", *words)])
        crash_at(-1, "validation_step")
        assert main(["fit", *workshop.words("runs", *words, "--ckpt_path", "last")]) == 0
        assert_same_run(workshop.run_folder("runs"), expected)

    @pytest.mark.parametrize(("every", "saved"), [(3, 9), (4, 8), (500, 8)])
    def test_resumes_from_the_last_checkpoint(self, workshop, straight, crash_at, every, saved):
        expected = straight("plain")
        crash_at(11)
        words = [f"--save_every_n_steps={every}"]
        with pytest.raises(Crash):
            main(["fit", *workshop.words("runs", *words)])
        run = workshop.run_folder("runs")
        assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == saved
        crash_at(-1)
        assert main(["fit", *workshop.words("runs", *words, "--ckpt_path", "last")]) == 0
        assert_same_run(run, expected)

    @pytest.mark.parametrize("steps", [5, 8, 11])
    def test_a_finished_run_can_be_made_longer(self, workshop, straight, steps):
        expected, words = straight("constant rate"), VARIANTS["constant rate"]
        assert main(["fit", *workshop.words("runs", *words, f"--trainer.max_steps={steps}")]) == 0
        assert main(["fit", *workshop.words("runs", *words, "--ckpt_path", "last")]) == 0
        resumed, whole = (run / "checkpoints" / "last.ckpt" for run in (workshop.run_folder("runs"), expected))
        assert_same_weights(weights(resumed), weights(whole))

    def test_in_the_middle_of_an_accumulation(self, workshop, straight, crash_at):
        expected = straight("accumulated")
        words = [*VARIANTS["accumulated"], "--save_every_n_steps=1"]
        crash_at(6)
        with pytest.raises(Crash):
            main(["fit", *workshop.words("runs", *words)])
        crash_at(-1)
        assert main(["fit", *workshop.words("runs", *words, "--ckpt_path", "last")]) == 0
        assert_same_run(workshop.run_folder("runs"), expected)


class TestRandomNumbers:
    """A draft that draws random numbers, as with dropout."""

    @pytest.fixture(autouse=True)
    def _draw(self, monkeypatch):
        original = DraftModule.training_step

        def step(self: DraftModule, batch: Any, batch_idx: int) -> Any:
            return original(self, batch, batch_idx) * (0.5 + torch.rand(()))

        monkeypatch.setattr(DraftModule, "training_step", step)

    def test_resumes_with_the_same_random_numbers(self, workshop, fit, interrupt_at):
        # A validation follows the second stop; reading its rows draws nothing.
        words = VARIANTS["mid-epoch validation"]
        expected = fit("whole", *words)
        interrupt_at(3)
        interrupt(workshop, *words)
        interrupt_at(5)
        interrupt(workshop, *words, "--ckpt_path", "last")
        assert main(["fit", *workshop.words("runs", *words, "--ckpt_path", "last")]) == 0
        assert_same_run(workshop.run_folder("runs"), expected)


class TestRecording:
    """States recorded in training: the number that a stopped run has recorded makes no difference."""

    def test_resumes_from_the_last_checkpoint(self, workshop, fit, monkeypatch):
        # Each batch is written at once, so at the crash more is recorded than was trained on.
        monkeypatch.setattr(growing, "SHARD_BYTES", 1)
        words = ["--data.features=record", "--save_every_n_steps=3", *VARIANTS["mid-epoch validation"]]
        cache = "--data.cache_dir={}".format
        expected = fit("whole", *words, cache(workshop.folder / "whole_cache"))
        words.append(cache(workshop.folder / "cache"))
        original = DraftModule.training_step

        def crash(self: DraftModule, batch: Any, batch_idx: int) -> Any:
            loss = original(self, batch, batch_idx)
            if self.trainer.global_step == 4:
                raise Crash
            return loss

        with monkeypatch.context() as patch:
            patch.setattr(DraftModule, "training_step", crash)
            with pytest.raises(Crash):
                fit("runs", *words)
        resumed = fit("runs", *words, "--ckpt_path=last")
        assert_same_run(resumed, expected)


def start(words: list[str]) -> subprocess.Popen[str]:
    """Start the real command."""
    return subprocess.Popen(
        [sys.executable, "-m", "specforge", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONUNBUFFERED": "1"},
        # Tests that run in the background of a script inherit an ignored Ctrl-C.
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )


def read_until(process: subprocess.Popen[str], text: str) -> str:
    """Read lines of a process until one holds a text; return all of them."""
    assert process.stdout is not None
    shown = ""
    for line in process.stdout:
        shown += line
        if text in line:
            return shown
    pytest.fail(f"ended without {text!r}:\n{shown}")


class TestRealProcess:
    def test_ctrl_c_and_the_printed_command(self, workshop):
        process = start(["fit", *workshop.words("runs", "--trainer.max_steps=24", "--trainer.val_check_interval=4")])
        read_until(process, "val/loss")  # after four of the eight steps of the first epoch
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=60)
        assert process.returncode == 130, shown
        assert "Traceback" not in shown
        run = workshop.run_folder("runs")
        last = run / "checkpoints" / "last.ckpt"
        step = torch.load(last, weights_only=True)["global_step"]
        assert 4 <= step < 24
        assert f"Interrupted at step {step}" in shown and str(last) in shown
        command = re.search(r"To resume: +(specforge fit .*)", shown)
        assert command is not None
        words = shlex.split(command[1])
        goes_on = start(words[1:])
        shown, _ = goes_on.communicate(timeout=120)
        assert goes_on.returncode == 0, shown
        assert torch.load(last, weights_only=True)["global_step"] == 24
        assert [path.name for path in run.parent.iterdir()] == ["version_0"]
        logged = [step for step, _ in scalars(run, "train/loss")]
        assert logged == sorted(set(logged)) and (logged[0], logged[-1]) == (0, 23)

    def test_second_ctrl_c_stops_at_once(self, workshop):
        # One optimizer step of about 350 batches, which the first Ctrl-C waits for.
        words = ["--trainer.accumulate_grad_batches=1000", "--data.train", str(QUICKSTART / "train.jsonl")]
        process = start(["fit", *workshop.words("runs", *words)])
        read_until(process, "run:")
        time.sleep(1.5)
        process.send_signal(signal.SIGINT)
        read_until(process, "press Ctrl-C again")
        process.send_signal(signal.SIGINT)
        start_time = time.monotonic()
        shown, _ = process.communicate(timeout=60)
        assert time.monotonic() - start_time < 10
        assert process.returncode in (1, 130, -signal.SIGINT), shown
        assert "Traceback" not in shown
        assert not (workshop.run_folder("runs") / "draft").exists()

    def test_ctrl_c_before_training_starts(self, workshop):
        process = start(["fit", *workshop.words("runs")])
        time.sleep(1.0)
        process.send_signal(signal.SIGINT)
        shown, _ = process.communicate(timeout=60)
        assert process.returncode in (130, -signal.SIGINT)
        assert "Traceback" not in shown


class TestDamagedCheckpoints:
    @pytest.fixture(scope="class")
    def intact(self, straight) -> Path:
        return straight("plain") / "checkpoints" / "last.ckpt"

    def refused(self, workshop: Workshop, capfd: pytest.CaptureFixture[str], command: str, path: Path) -> None:
        """Check that one message names the file."""
        status = main([command, *workshop.words("runs", "--ckpt_path", str(path))])
        shown = capfd.readouterr().err
        assert status in (1, 2)
        message = next(line for line in shown.splitlines() if line.startswith(f"specforge {command}: error: "))
        assert str(path) in message
        assert "Traceback" not in shown

    @pytest.mark.parametrize("command", ["fit", "validate"])
    def test_another_content(self, workshop, intact, capfd, command):
        path = workshop.folder / "damaged.ckpt"
        content = bytearray(intact.read_bytes())
        content[len(content) // 2] ^= 1
        path.write_bytes(content)
        self.refused(workshop, capfd, command, path)

    def test_the_newest_is_skipped(self, workshop, straight, interrupt_at, caplog):
        interrupt_at(7)
        interrupt(workshop, "--save_every_n_steps=3")
        newest = workshop.run_folder("runs") / "checkpoints" / "last.ckpt"
        newest.write_bytes(newest.read_bytes()[:-100])
        assert main(["fit", *workshop.words("runs", "--ckpt_path=last")]) == 0
        assert f"skipped: {newest} is damaged" in caplog.text
        assert_same_run(workshop.run_folder("runs"), straight("plain"))

    def test_other_data(self, workshop, interrupt_at, capfd):
        interrupt_at(3)
        interrupt(workshop)
        for words in (["--data.seed=7"], ["--data.max_length=128"], ["--data.batch_size=5"]):
            assert main(["fit", *workshop.words("runs", "--ckpt_path=last", *words)]) == 2
            assert "was written after 6 of 16 (packed) rows" in capfd.readouterr().err

    @pytest.mark.parametrize("command", ["fit", "validate"])
    @pytest.mark.parametrize("share", [0.0, 0.5, 0.99])
    def test_truncated(self, workshop, intact, capfd, command, share):
        path = workshop.folder / "damaged.ckpt"
        content = intact.read_bytes()
        path.write_bytes(content[: int(len(content) * share)])
        self.refused(workshop, capfd, command, path)

    @pytest.mark.parametrize(
        "content", [{"a": 1}, [1], {"state_dict": {}}, torch.zeros(2)], ids=["dict", "list", "empty", "tensor"]
    )
    def test_a_torch_file_that_is_not_a_checkpoint(self, workshop, capfd, content):
        path = workshop.folder / "other.ckpt"
        torch.save(content, path)
        self.refused(workshop, capfd, "fit", path)

    def test_a_file_of_something_else(self, workshop, capfd):
        path = workshop.folder / "text.ckpt"
        path.write_text("hello")
        self.refused(workshop, capfd, "fit", path)

    @pytest.mark.parametrize("command", ["fit", "validate"])
    def test_a_checkpoint_of_another_network(self, workshop, intact, capfd, command):
        words = ["--ckpt_path", str(intact), "--model.draft.num_layers=2"]
        status = main([command, *workshop.words("runs", *words)])
        shown = capfd.readouterr().err
        assert status in (1, 2)
        assert str(intact) in shown and "Traceback" not in shown

    def test_a_checkpoint_of_another_optimizer(self, workshop, intact, capfd):
        words = ["--ckpt_path", str(intact), "--model.optimizer.name=muon", "--trainer.max_steps=14"]
        status = main(["fit", *workshop.words("runs", *words)])
        shown = capfd.readouterr().err
        assert status in (1, 2)
        assert "optimizer" in shown and "Traceback" not in shown


class TestFullDisk:
    """A limit on the size of files simulates a full disk: the same writes fail."""

    @pytest.fixture
    def fill_at(self, monkeypatch) -> Iterator[Arm]:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        original = DraftModule.training_step

        def arm(batch_number: int) -> None:
            seen = 0

            def step(self: DraftModule, batch: Any, batch_idx: int) -> Any:
                nonlocal seen
                seen += 1
                if seen == batch_number:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (200_000, before[1]))
                return original(self, batch, batch_idx)

            monkeypatch.setattr(DraftModule, "training_step", step)

        yield arm
        resource.setrlimit(resource.RLIMIT_FSIZE, before)

    def test_the_earlier_checkpoint_stays_complete(self, workshop, straight, fill_at, capfd):
        expected = straight("plain")
        fill_at(5)
        status = main(["fit", *workshop.words("runs", "--save_every_n_steps=3")])
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        shown = capfd.readouterr().err
        assert status == 1
        assert "specforge fit: error: " in shown and "Traceback" not in shown
        checkpoints = workshop.run_folder("runs") / "checkpoints"
        assert torch.load(checkpoints / "last.ckpt", weights_only=True)["global_step"] == 3
        assert [path.name for path in checkpoints.iterdir()] == ["last.ckpt"]
        fill_at(-1)
        assert main(["fit", *workshop.words("runs", "--ckpt_path", "last")]) == 0
        assert_same_run(workshop.run_folder("runs"), expected)

    def test_message_names_the_file(self, workshop, fill_at, capfd):
        fill_at(1)
        assert main(["fit", *workshop.words("runs", "--save_every_n_steps=2")]) == 1
        assert "last.ckpt" in capfd.readouterr().err

    def test_while_writing_the_draft(self, workshop, fill_at, capfd):
        # The disk is full from the last batch on, after all checkpoints; only the draft is written later.
        words = ["--trainer.max_steps=2", "--data.validation=null", "--data.validation_share=0"]
        fill_at(2)
        assert main(["fit", *workshop.words("runs", *words)]) == 1
        shown = capfd.readouterr()
        assert "Traceback" not in shown.err and "Done:" not in shown.out
        run = workshop.run_folder("runs")
        assert not (run / "draft").exists()
        assert not [path.name for path in run.iterdir() if path.name.startswith(".")]
