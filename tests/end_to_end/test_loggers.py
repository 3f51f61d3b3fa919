"""Other loggers than TensorBoard: the run's files stay in its folder."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import pytest
import torch
import yaml
from lightning.pytorch.loggers import CSVLogger
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from specforge.__main__ import main

WORDS = ("--trainer.max_steps=3", "--trainer.val_check_interval=3", "--trainer.limit_val_batches=1")


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if path.is_file()}


def test_csv(workshop, fit, capfd):
    init = {"save_dir": str(workshop.folder / "runs"), "name": "csv"}
    workshop.values["trainer"]["logger"] = {"class_path": "CSVLogger", "init_args": init}
    run = fit("runs", *WORDS)
    assert "tensorboard" not in capfd.readouterr().out
    checkpoints = {"checkpoints/best.ckpt", "checkpoints/last.ckpt"}
    assert files(run) == {"config.yaml", "draft/config.json", "draft/model.safetensors", *checkpoints}
    logged = workshop.folder / "runs" / "csv" / "version_0"
    with (logged / "metrics.csv").open() as file:
        lines = list(csv.DictReader(file))
    assert [int(line["step"]) for line in lines if line["train/loss"]] == [0, 1, 2]
    (tau,) = (float(line["val/acceptance_length"]) for line in lines if line["val/acceptance_length"])
    assert [float(line["final/acceptance_length"]) for line in lines if line["final/acceptance_length"]] == [tau]
    assert yaml.safe_load((logged / "hparams.yaml").read_text())["model.optimizer.lr"] == 4e-3
    # The run is found and resumes in its folder.
    words = [word.replace("max_steps=3", "max_steps=5") for word in WORDS]
    assert fit("runs", *words, "--ckpt_path=last") == run
    assert torch.load(run / "checkpoints" / "last.ckpt", weights_only=True)["global_step"] == 5
    assert not (workshop.folder / "runs" / "version_1").exists()
    with (logged / "metrics.csv").open() as file:
        assert list(csv.DictReader(file)) == lines


def test_mlflow(workshop, fit, monkeypatch):
    pytest.importorskip("mlflow")
    from mlflow.tracking import MlflowClient

    # Its databases need more packages than the small distribution installs.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    init = {"tracking_uri": f"file:{workshop.folder / 'mlflow'}", "experiment_name": "drafts"}
    workshop.values["trainer"]["logger"] = {"class_path": "MLFlowLogger", "init_args": init}
    run = fit("runs", *WORDS)
    assert {"config.yaml", "checkpoints/best.ckpt", "draft/model.safetensors"} <= files(run)
    client = MlflowClient(init["tracking_uri"])
    (logged,) = client.search_runs([client.get_experiment_by_name("drafts").experiment_id])
    assert (logged.info.status, logged.info.run_name) == ("FINISHED", "runs/version_0")
    assert logged.data.params["model.optimizer.lr"] == "0.004" and logged.data.params["model.objective"] == "kl 1"
    assert logged.data.metrics["final/loss"] == logged.data.metrics["val/loss"]
    assert [metric.step for metric in client.get_metric_history(logged.info.run_id, "train/loss")] == [0, 1, 2]
    (image,) = (workshop.folder / "mlflow").rglob("*.png")
    assert re.search(r"acceptance_by_position\Wstep\W3\W", image.name)


def test_wandb(workshop, fit, monkeypatch):
    wandb = pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_SILENT", "true")
    monkeypatch.setenv("WANDB_CONSOLE", "off")
    init = {"project": "drafts", "offline": True, "save_dir": str(workshop.folder)}
    workshop.values["trainer"]["logger"] = {"class_path": "WandbLogger", "init_args": init}
    try:
        run = fit("runs", *WORDS)
        name, settings, results = wandb.run.name, dict(wandb.run.config), dict(wandb.run.summary)
        (image,) = Path(wandb.run.dir).rglob("*.png")
    finally:
        wandb.finish()
    assert {"config.yaml", "checkpoints/best.ckpt", "draft/model.safetensors"} <= files(run)
    assert name == "runs/version_0"
    assert settings["model.optimizer.lr"] == 4e-3 and settings["model.objective"] == "kl 1"
    assert results["final/acceptance_length"] == results["val/acceptance_length"] == results["best/acceptance_length"]
    assert results["trainer/global_step"] == 3
    assert image.name.startswith("acceptance_by_position")


@pytest.mark.parametrize(
    ("logger", "reason"),
    [
        ({"class_path": "CSVLogger"}, "trainer.logger: CSVLogger: the following arguments are required: save_dir"),
        ({"class_path": "CometLogger"}, "trainer: CometLogger: Requirement 'comet-ml"),
    ],
)
def test_a_logger_that_cannot_be_created_is_one_message(workshop, capfd, logger, reason):
    workshop.values["trainer"]["logger"] = logger
    assert main(["fit", *workshop.words("runs")]) == 2
    message = capfd.readouterr().err
    assert reason in message and "Traceback" not in message and "Namespace" not in message


def test_a_service_without_its_key_ends_the_run_before_it_starts(workshop, capfd, monkeypatch):
    wandb = pytest.importorskip("wandb")
    wandb.teardown()  # it keeps the mode of an earlier run without a network, and so does the variable
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    for name in ("HOME", "NETRC", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(workshop.folder / "nobody"))
    init = {"save_dir": str(workshop.folder)}
    workshop.values["trainer"]["logger"] = {"class_path": "WandbLogger", "init_args": init}
    assert main(["fit", *workshop.words("runs"), *WORDS]) == 2
    message = capfd.readouterr().err
    assert "trainer.logger: WandbLogger: No API key configured" in message and "Traceback" not in message
    assert not (workshop.folder / "runs" / "version_0").exists()


class FailingLogger(CSVLogger):
    """A service whose server goes away after the first step."""

    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Fail from the second step on."""
        if step:
            raise LookupError("the server is gone")


def test_a_service_that_goes_away_is_one_message(workshop, capfd):
    init = {"save_dir": str(workshop.folder)}
    workshop.values["trainer"]["logger"] = {"class_path": f"{__name__}.FailingLogger", "init_args": init}
    assert main(["fit", *workshop.words("runs"), *WORDS, "--trainer.log_every_n_steps=1"]) == 1
    assert "step 2: FailingLogger: the server is gone. Then resume with --ckpt_path last" in capfd.readouterr().err


def test_two_at_once(workshop, fit, capfd):
    folder = str(workshop.folder / "logs")
    workshop.values["trainer"]["logger"] = [
        {"class_path": logger, "init_args": {"save_dir": folder, "name": logger}}
        for logger in ("TensorBoardLogger", "CSVLogger")
    ]
    run = fit("runs", *WORDS)
    assert f"tensorboard --logdir {folder}/TensorBoardLogger\n" in capfd.readouterr().out
    assert "config.yaml" in files(run) and not any("events" in name for name in files(run))
    tags = EventAccumulator(str(workshop.folder / "logs" / "TensorBoardLogger" / "version_0")).Reload().Tags()
    assert "val/loss" in tags["scalars"] and tags["images"] == ["val/acceptance_by_position"]
    assert (workshop.folder / "logs" / "CSVLogger" / "version_0" / "metrics.csv").is_file()
