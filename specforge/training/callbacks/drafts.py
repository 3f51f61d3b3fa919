"""The draft that a run writes."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only

from specforge.hookspecs import CheckpointFormat
from specforge.models.speculator import SpeculatorModel
from specforge.registry import installed
from specforge.training.attached import FIT
from specforge.training.callbacks.board.charts import ADDRESS
from specforge.training.callbacks.board.writers import writers
from specforge.training.callbacks.checkpoints import best_checkpoint, checkpoint_folder
from specforge.training.callbacks.configuration import next_call
from specforge.training.identity import draft_weights
from specforge.training.module import DraftModule
from specforge.training.runs import check_checkpoint
from specforge.training.saying import say

# Share of a run's steps after its last validation from which on they are mentioned.
NOTABLE_SHARE = 0.02


class DraftWriter(Callback):
    """Writes the best draft to ``draft/`` when training ends, and prints its folder and the next commands."""

    @rank_zero_only
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the draft of the best validation, or the last draft if there was no validation."""
        # Not on_fit_end: the progress bar would be drawn again below the closing lines.
        if stage != FIT:
            return
        module = cast(DraftModule, pl_module)
        best = best_checkpoint(trainer)
        run = checkpoint_folder(trainer).parent
        next_steps = []
        for writer in writers(trainer)[:1]:  # its folder is the run's, unless trainer.logger sets another
            command = shlex.join(["tensorboard", "--logdir", str(Path(writer.log_dir).parent)])
            next_steps += [f"look at it   {command}", f"             {ADDRESS}"]
        if best.best_model_path and best.best_model_score is not None:
            draft = _best_draft(Path(best.best_model_path), module.draft)
            which = f"the best draft ({best.monitor} {float(best.best_model_score):.3f})"
            next_steps.append(f"measure it   {next_call(trainer, 'validate', Path(best.best_model_path))}")
        else:
            draft = module.draft
            which = f"the last draft (step {trainer.global_step}; no validation chose a better one)"
        next_steps.append(f"talk to it   {shlex.join(['specforge', 'generate', str(run / 'draft')])}")
        next_steps.append(
            f"compare it   {shlex.join(['specforge', 'evaluate', str(run / 'draft'), '--prompts', 'FILE'])}"
        )
        formats = installed().all(CheckpointFormat).values()
        if any(one.algorithm == draft.config.speculators_model_type for one in formats):
            next_steps.append(f"serve it     {shlex.join(['specforge', 'export', str(run), '--format', 'NAME'])}")
        next_steps.append(f"load it      SpeculatorModel.from_pretrained({str(run / 'draft')!r})")
        draft.save_pretrained(run / "draft")
        if trainer.global_step < module.length.steps:
            why = "trainer.max_time is over, or a callback asked to stop"
            say(f"\nEnded at step {trainer.global_step:,} of {module.length.steps:,}: {why}.")
        unseen = trainer.global_step - best.validated_step
        if best.validated_step and unseen > trainer.global_step * NOTABLE_SHARE:
            say(
                f"\nThe last {unseen:,} of {trainer.global_step:,} steps were not validated, so the best draft is an "
                "earlier one. Set trainer.val_check_interval so that a validation ends the run."
            )
        say("\n  ".join([f"\nDone: {run / 'draft'} holds {which}.", *next_steps]))


def _best_draft(path: Path, last: SpeculatorModel) -> SpeculatorModel:
    check_checkpoint(path)
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    # How candidates are chosen may have been found in validation.
    stored = checkpoint.get("draft_config", {})
    chosen = {name: stored[name] for name in last.config.proposal_fields if name in stored}
    config = last.config.model_copy(update=chosen)
    return type(last).from_state(config, draft_weights(checkpoint), where=str(path))
