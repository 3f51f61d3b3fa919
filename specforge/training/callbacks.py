"""What happens around the steps of a run: checkpoints, Ctrl-C, the draft at the end, what a person sees."""

from __future__ import annotations

import shlex
import signal
from pathlib import Path
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint, RichProgressBar
from lightning.pytorch.callbacks.progress.rich_progress import RichProgressBarTheme
from lightning.pytorch.utilities import rank_zero_only

from specforge.models.scaled_linear import folded
from specforge.models.speculator import SpeculatorModel
from specforge.training.advice import Advice
from specforge.training.board.acceptance import AcceptanceFigure, accept_rates
from specforge.training.board.hyperparameters import log_results
from specforge.training.board.layout import ScalarLayout
from specforge.training.board.samples import SampleTexts
from specforge.training.board.writers import writers
from specforge.training.module import DraftModule
from specforge.training.resuming import BatchNumbers, RandomState
from specforge.training.runs import BEST, LAST, check_checkpoint
from specforge.training.saying import say
from specforge.training.speed import Throughput
from specforge.training.stopping import StopRequest


def fit_callbacks(arguments: list[str], save_every_n_steps: int, folder: Path) -> list[Callback]:
    """Return the callbacks of a training run that is stored.

    Args:
        arguments: The words after ``specforge fit``, to tell a person how to go on.
        save_every_n_steps: Optimizer steps between two savings of the last state.
        folder: Folder of the checkpoints.
    """
    return [
        Summary(folder.parent),
        Advice(),
        ScalarLayout(),
        AcceptanceFigure(),
        SampleTexts(),
        Throughput(),  # behind those above, whose time at a validation it leaves out
        RandomState(),
        BatchNumbers(),
        BestCheckpoint(folder),
        LastCheckpoint(arguments, save_every_n_steps),
        DraftWriter(arguments),
    ]


class BestCheckpoint(ModelCheckpoint):
    """Saves the state of the best validation, by acceptance length, as ``checkpoints/best.ckpt``.

    Args:
        folder: Folder of the checkpoints.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(
            dirpath=folder,
            filename=Path(BEST).stem,
            mode="max",
            enable_version_counter=False,
            save_on_train_epoch_end=False,
        )
        self.dirpath = str(folder)  # as the person gave it, which Lightning makes absolute

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Learn what to choose by: the data decide whether the acceptance length is exact or a proxy."""
        self.monitor = cast(DraftModule, pl_module).monitor
        super().setup(trainer, pl_module, stage)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save where this validation is the best so far, and log by what runs are compared."""
        before = self.best_model_score
        super().on_validation_end(trainer, pl_module)
        if self.best_model_score is not before:
            log_results("best", trainer, pl_module)


class ProgressBar(RichProgressBar):
    """The progress bar of every run."""

    def __init__(self) -> None:
        super().__init__(leave=True, theme=RichProgressBarTheme(metrics_format=".3f"))

    def get_metrics(self, trainer: Trainer, pl_module: LightningModule) -> dict[str, Any]:
        """Leave out what is said elsewhere, so that a line holds the rest: the run's number, and each validation."""
        metrics = super().get_metrics(trainer, pl_module)
        return {name: value for name, value in metrics.items() if name != "v_num" and not name.startswith("val/")}


class Summary(Callback):
    """Says at the start what is trained on what and for how long, and after each validation how far it has come.

    Args:
        run: Folder of the run; None if nothing is stored.
    """

    def __init__(self, run: Path | None) -> None:
        self.run = run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the length of the run, which may be refused, before a verifier is loaded."""
        _ = cast(DraftModule, pl_module).length

    @rank_zero_only
    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print the summaries of data, draft and run."""
        module = cast(DraftModule, pl_module)
        say(trainer.datamodule.summary_text())
        say(module.summary_text())
        say(str(module.length))
        say(f"run: {self.run or 'nothing of it is stored'}")

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Print one line a validation, so that a log file shows how the draft learns."""
        metrics = trainer.callback_metrics
        module = cast(DraftModule, pl_module)
        if trainer.sanity_checking or module.monitor not in metrics:
            return
        rates = " ".join(f"{rate:.3f}" for rate in accept_rates(trainer, module, "pos"))
        say(
            f"step {trainer.global_step:>6}  {module.monitor} {float(metrics[module.monitor]):.3f}  "
            f"by position {rates}  val/loss {float(metrics['val/loss']):.4f}"
        )


class LastCheckpoint(Checkpoint):
    """Saves the last state as ``checkpoints/last.ckpt``: every so many steps, after each epoch, and on a signal.

    Lightning calls a ``Checkpoint`` after other callbacks and in the order given, here after the best has been chosen.

    Args:
        arguments: The words after ``specforge fit``.
        every_n_steps: Optimizer steps between two savings.
    """

    def __init__(self, arguments: list[str], every_n_steps: int) -> None:
        self.arguments = arguments
        self.every_n_steps = every_n_steps
        self._stop = StopRequest()
        self._saved_step = 0
        self._leaving = 0
        self._epoch_is_over = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Take over the signals that ask to stop: the step under way is finished and saved first."""
        epochs = trainer.fit_loop.epoch_progress.current
        if epochs.completed == epochs.ready:
            # Going on from the end of an epoch, there is no epoch to take up in its middle.
            trainer.fit_loop.epoch_loop.restarting = False
        self._saved_step = trainer.global_step
        self._stop.listen(trainer)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        """Leave, once the last step has been saved and logged."""
        if self._leaving:
            self._leave(trainer, self._leaving)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time, or when a signal asks to stop; where a validation follows the step, after that."""
        # What is saved before a validation goes on behind it, and the best draft would be chosen without it.
        loop = trainer.fit_loop
        if not loop.epoch_loop._should_check_val_fx(loop._data_fetcher):
            self._save_if_it_is_time(trainer)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after a validation in the middle of an epoch, for the step before it."""
        if not trainer.sanity_checking:
            self._save_if_it_is_time(trainer)

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save after each epoch; where the run ends inside one, its last step has been saved already."""
        if _epoch_is_complete(trainer):
            self._epoch_is_over = True
            self._save(trainer)
            self._epoch_is_over = False
        if number := self._stop.agreed(trainer):
            self._leave(trainer, number)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        """Store an epoch that has ended as one that is complete."""
        # Lightning stores it as one under way, and where max_steps is set it goes on one epoch too far.
        if self._epoch_is_over:
            for scope in checkpoint["loops"]["fit_loop"]["epoch_progress"].values():
                scope["completed"] = scope["processed"]

    def _save_if_it_is_time(self, trainer: Trainer) -> None:
        # Between optimizer steps there are gradients that a checkpoint does not hold.
        between_steps = trainer.global_step == self._saved_step or trainer.fit_loop._should_accumulate()
        if between_steps or _epoch_is_complete(trainer):  # the whole epoch is saved when it has ended
            return
        self._leaving = self._stop.agreed(trainer)
        is_last_step = trainer.global_step == trainer.max_steps or _stops_early(trainer)
        if self._leaving or is_last_step or trainer.global_step % self.every_n_steps == 0:
            self._save(trainer)

    def _save(self, trainer: Trainer) -> None:
        trainer.save_checkpoint(checkpoint_folder(trainer) / LAST)
        self._saved_step = trainer.global_step

    def _leave(self, trainer: Trainer, number: int) -> None:
        why = "Interrupted" if number == signal.SIGINT else f"Stopped by {signal.Signals(number).name}"
        environment = trainer._accelerator_connector.cluster_environment
        launched = trainer.world_size > 1 and environment.creates_processes_externally
        how = ", under the same launcher" if launched else ""
        say(
            f"\n{why} at step {trainer.global_step}; everything up to it is saved in "
            f"{checkpoint_folder(trainer) / LAST}.\nTo go on{how}:  {command('fit', self.arguments, 'last')}"
        )
        raise SystemExit(128 + number)


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
        best = _best(trainer)
        run = checkpoint_folder(trainer).parent
        next_steps = [f"look at it   tensorboard --logdir {run.parent}"] if writers(trainer) else []
        if best.best_model_path and best.best_model_score is not None:
            draft = draft_of_checkpoint(Path(best.best_model_path), module.draft)
            which = f"the best draft ({best.monitor} {float(best.best_model_score):.3f})"
            next_steps.append(f"measure it   {command('validate', self.arguments, 'best')}")
        else:
            draft = module.draft
            which = f"the last draft (step {trainer.global_step}; no validation chose a better one)"
        next_steps.append(f"talk to it   {shlex.join(['specforge', 'generate', str(run / 'draft')])}")
        next_steps.append(
            f"compare it   {shlex.join(['specforge', 'evaluate', str(run / 'draft'), '--prompts', 'FILE'])}"
        )
        next_steps.append(f"serve it     {shlex.join(['specforge', 'export', str(run), '--format', 'NAME'])}")
        next_steps.append(f"load it      SpeculatorModel.from_pretrained({str(run / 'draft')!r})")
        draft.save_pretrained(run / "draft")
        if trainer.global_step < module.length.steps:
            why = "trainer.max_time is over, or a callback asked to stop"
            say(f"\nEnded at step {trainer.global_step:,} of {module.length.steps:,}: {why}.")
        say("\n  ".join([f"\nDone: {run / 'draft'} holds {which}.", *next_steps]))


def draft_of_checkpoint(path: Path, like: SpeculatorModel) -> SpeculatorModel:
    """Build the draft that a training checkpoint holds.

    Args:
        path: A ``.ckpt`` file of a run.
        like: A draft of the same configuration.
    """
    check_checkpoint(path)
    saved = torch.load(path, map_location="cpu", weights_only=True)["state_dict"]
    prefix = "draft."
    state = {name.removeprefix(prefix): tensor for name, tensor in saved.items() if name.startswith(prefix)}
    return type(like).from_state(like.config, folded(state), where=str(path))


def checkpoint_folder(trainer: Trainer) -> Path:
    """Return the folder of a run's checkpoints; its parent is the run's folder."""
    return Path(str(_best(trainer).dirpath))


def _best(trainer: Trainer) -> BestCheckpoint:
    return next(one for one in trainer.checkpoint_callbacks if isinstance(one, BestCheckpoint))


def _stops_early(trainer: Trainer) -> bool:
    """Tell whether ``max_time`` is over, or a callback has asked to stop, and the trainer will do so."""
    return bool(trainer.should_stop and trainer.fit_loop._can_stop_early)


def _epoch_is_complete(trainer: Trainer) -> bool:
    batches = trainer.fit_loop.epoch_loop.batch_progress.current.ready
    return bool(trainer.is_last_batch or batches >= trainer.num_training_batches)


def command(subcommand: str, arguments: list[str], checkpoint: str) -> str:
    """Return the command line that goes on from a checkpoint, or measures it."""
    words = [word for word in arguments if not word.startswith("--ckpt_path=")]
    if "--ckpt_path" in words:
        place = words.index("--ckpt_path")
        del words[place : place + 2]
    return shlex.join(["specforge", subcommand, *words, "--ckpt_path", checkpoint])
