"""The configuration of a run: stored by the command's runs, and used by the callbacks of any run."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any, Literal

import yaml
from jsonargparse import Namespace
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import LightningArgumentParser, SaveConfigCallback

from specforge.data.module import data_of
from specforge.files import whole_file
from specforge.training.attached import callbacks_of
from specforge.training.callbacks.board.writers import writers
from specforge.training.runs import CONFIG


class RunConfig(SaveConfigCallback):
    """Stores the resolved configuration with the run: as a file to repeat it, and as text for TensorBoard.

    Args:
        parser: The parser of the command line.
        config: The parsed configuration.
        arguments: The words after ``specforge fit``.
        folder: Folder of the run.
    """

    def __init__(self, parser: LightningArgumentParser, config: Namespace, arguments: list[str], folder: Path) -> None:
        super().__init__(parser, config, save_to_log_dir=False)
        self.arguments = arguments
        self.folder = folder
        stored = config.clone()
        stored.ckpt_path = None
        self._text = str(parser.dump(stored, skip_none=False))

    @property
    def settings(self) -> dict[str, Any]:
        """The configuration as plain values."""
        settings: dict[str, Any] = yaml.safe_load(self._text)
        return settings

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write it; Lightning calls this in the first process, before a verifier is loaded."""
        with whole_file(self.folder / CONFIG) as file:
            file.write_text(self._text, encoding="utf-8")
        for writer in writers(trainer):
            writer.add_text("configuration", f"```yaml\n{self._text}\n```")

    def command(self, subcommand: str, checkpoint: str) -> str:
        """Return the command line that resumes the run from a checkpoint or evaluates it."""
        words = [word for word in self.arguments if not word.startswith("--ckpt_path=")]
        if "--ckpt_path" in words:
            index = words.index("--ckpt_path")
            del words[index : index + 2]
        return shlex.join(["specforge", subcommand, *words, "--ckpt_path", checkpoint])


def settings_of_run(trainer: Trainer, module: LightningModule) -> dict[str, Any]:
    """Return the settings of a run as plain values, by their keys in a configuration.

    Args:
        trainer: The run's trainer.
        module: The run's module; without the command, the settings are the arguments of module and data.
    """
    for config in callbacks_of(trainer, RunConfig):
        return config.settings
    created = {"model": module.hparams, "data": data_of(trainer).hparams}
    own = {
        part: {name: value for name, value in given.items() if not name.startswith("_")}
        for part, given in created.items()
    }
    return {
        **own,
        "trainer": {
            "accumulate_grad_batches": trainer.accumulate_grad_batches,
            "devices": trainer.num_devices,
            "gradient_clip_val": trainer.gradient_clip_val,
            "max_epochs": trainer.max_epochs,
            "max_steps": trainer.max_steps,
            "num_nodes": trainer.num_nodes,
            "precision": trainer.precision,
            "strategy": type(trainer.strategy).__name__,
        },
    }


def next_call(trainer: Trainer, method: Literal["fit", "validate"], checkpoint: Path) -> str:
    """Return a command, or a Python call of the trainer, that resumes a run from a checkpoint or evaluates it.

    Args:
        trainer: The trainer of the run.
        method: The trainer's method to call.
        checkpoint: One of the run's checkpoints.
    """
    for config in callbacks_of(trainer, RunConfig):
        return config.command(method, checkpoint.stem)
    return f"trainer.{method}(module, datamodule=data, ckpt_path={str(checkpoint)!r})"
