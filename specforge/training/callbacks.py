"""What happens around the steps of a run: checkpoints, Ctrl-C, the draft at the end, speed, what a person sees."""

from __future__ import annotations

import shlex
import signal
import time
from collections.abc import Mapping
from itertools import count, takewhile
from pathlib import Path
from types import FrameType
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from specforge.models.speculator import SpeculatorModel
from specforge.training.module import DraftModule

MONITOR = "val/loss"
INTERRUPTED = 130


def fit_callbacks(arguments: list[str], save_every_n_steps: int) -> list[Callback]:
    """Return the callbacks of a training run.

    Args:
        arguments: The words after ``specforge fit``, to tell a person how to go on.
        save_every_n_steps: Optimizer steps between two savings of the last state.
    """
    return [
        ProgressBar(),
        Summary(),
        Throughput(),
        LastCheckpoint(arguments, save_every_n_steps),
        ModelCheckpoint(filename="best", monitor=MONITOR, enable_version_counter=False, save_on_train_epoch_end=False),
        DraftWriter(arguments),
    ]


class ProgressBar(RichProgressBar):
    """The progress bar of every run."""

    def __init__(self) -> None:
        super().__init__(leave=True, theme=RichProgressBarTheme(metrics_format=".3f"))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Leave out the number of the run, which stands in its folder's name."""
        return {name: value for name, value in super().get_metrics(trainer, pl_module).items() if name != "v_num"}


class Summary(Callback):
    """Says at the start what is trained on what, and after each validation how far it has come."""

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summaries of data and draft."""
        say(trainer.datamodule.summary_text())
        say(cast(DraftModule, pl_module).summary_text())
        say(f"run: {checkpoint_folder(trainer).parent}")

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print one line a validation, so that a log file shows how the draft learns."""
        metrics = trainer.callback_metrics
        if trainer.sanity_checking or MONITOR not in metrics:
            return
        by_step = (metrics.get(f"val/acceptance/step_{step}") for step in count())
        accepted = " ".join(f"{float(one):.3f}" for one in takewhile(lambda one: one is not None, by_step))
        loss = float(metrics[MONITOR])
        say(f"step {trainer.global_step:>6}  {MONITOR} {loss:.4f}  accepted by draft step: {accepted}")


class Throughput(Callback):
    """Logs the tokens that training takes in a second, padding and validation left out."""

    def __init__(self) -> None:
        self._tokens: Tensor | int = 0
        self._since = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clock."""
        self._restart()

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the time of validation out."""
        self._restart()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Mapping[str, Tensor], batch_idx: int
    ) -> None:
        """Count, and log at the trainer's interval."""
        self._tokens = self._tokens + (batch["document_ids"] >= 0).sum()
        if (batch_idx + 1) % trainer.log_every_n_steps == 0:
            seconds = time.perf_counter() - self._since
            pl_module.log("train/tokens_per_second", float(self._tokens) * trainer.world_size / seconds)
            self._restart()

    def _restart(self) -> None:
        self._tokens = 0
        self._since = time.perf_counter()


class LastCheckpoint(Callback):
    """Saves the last state as ``checkpoints/last.ckpt``: every so many steps, after each epoch, and on Ctrl-C.

    Args:
        arguments: The words after ``specforge fit``.
        every_n_steps: Optimizer steps between two savings.
    """

    def __init__(self, arguments: list[str], every_n_steps: int) -> None:
        self.arguments = arguments
        self.every_n_steps = every_n_steps
        self._saved_step = 0
        self._interrupted = False
        self._earlier_handler: Any = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over Ctrl-C: the step under way is finished and saved first."""
        self._saved_step = trainer.global_step
        self._earlier_handler = signal.signal(signal.SIGINT, self._on_interrupt)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time, or when a person wants to stop."""
        # Between optimizer steps there are gradients that a checkpoint does not hold.
        stepped = trainer.global_step > self._saved_step and not trainer.fit_loop._should_accumulate()
        if self._interrupted and stepped:
            self._stop(trainer)
        if stepped and trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after each epoch."""
        self._save(trainer)
        if self._interrupted:
            self._stop(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Give Ctrl-C back."""
        if self._earlier_handler is not None:
            signal.signal(signal.SIGINT, self._earlier_handler)
            self._earlier_handler = None

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(checkpoint_folder(trainer) / "last.ckpt")
        self._saved_step = trainer.global_step

    def _stop(self, trainer: Trainer) -> None:
        self._save(trainer)
        say(
            f"\nInterrupted at step {trainer.global_step}; everything up to it is saved in "
            f"{checkpoint_folder(trainer) / 'last.ckpt'}.\nTo go on:  {command('fit', self.arguments, 'last')}"
        )
        raise SystemExit(INTERRUPTED)

    def _on_interrupt(self, number: int, frame: FrameType | None) -> None:
        if self._interrupted:
            raise KeyboardInterrupt
        self._interrupted = True
        say("\nStopping after this step and saving; press Ctrl-C again to stop at once without saving.")


class DraftWriter(Callback):
    """Writes the best draft to ``draft/`` when training ends, and says where it is and what to type next.

    Args:
        arguments: The words after ``specforge fit``.
    """

    def __init__(self, arguments: list[str]) -> None:
        self.arguments = arguments

    @rank_zero_only
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the draft of the best validation; the last one where there was no validation."""
        # Not on_fit_end: the progress bar would be drawn once more below the closing lines.
        module = cast(DraftModule, pl_module)
        best = cast(ModelCheckpoint, trainer.checkpoint_callback)
        draft, which = module.draft, f"the last draft (step {trainer.global_step}; no validation chose a better one)"
        if best.best_model_path:
            draft = draft_of_checkpoint(Path(best.best_model_path), draft)
            which = f"the best draft ({MONITOR} {float(best.best_model_score or 0):.4f})"
        run = checkpoint_folder(trainer).parent
        draft.save_pretrained(run / "draft")
        say(
            f"\nDone: {run / 'draft'} holds {which}.\n"
            f"  look at it   tensorboard --logdir {run.parent}\n"
            f"  measure it   {command('validate', self.arguments, 'best')}\n"
            f"  load it      SpeculatorModel.from_pretrained({str(run / 'draft')!r})"
        )


def draft_of_checkpoint(path: Path, like: SpeculatorModel) -> SpeculatorModel:
    """Build the draft that a training checkpoint holds.

    Args:
        path: A ``.ckpt`` file of a run.
        like: A draft of the same configuration.
    """
    saved = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    prefix = "draft."
    state = {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}
    return type(like).from_state(like.config, state, where=str(path))


def checkpoint_folder(trainer: Trainer) -> Path:
    """Return the folder of a run's checkpoints; its parent is the run's folder."""
    callback = cast(ModelCheckpoint, trainer.checkpoint_callback)
    return Path(str(callback.dirpath))


def command(subcommand: str, arguments: list[str], checkpoint: str) -> str:
    """Return the command line that goes on from a checkpoint, or measures it."""
    words = list(arguments)
    if "--ckpt_path" in words:
        place = words.index("--ckpt_path")
        del words[place : place + 2]
    return shlex.join(["specforge", subcommand, *words, "--ckpt_path", checkpoint])


@rank_zero_only
def say(text: str) -> None:
    """Print a line for a person, once in a run of many processes."""
    print(text, flush=True)
