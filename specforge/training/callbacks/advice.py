"""Advice that a run prints about a wasteful recipe: one line each, with the setting to change."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import astuple, dataclass
from typing import Any, cast

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_only
from torch import Tensor

from specforge.data.module import DraftDataModule, data_of
from specforge.data.rows.coverage import coverage_by_size
from specforge.training.attached import FIT, is_fitting
from specforge.training.callbacks.board.acceptance import accept_rates
from specforge.training.module import DraftModule
from specforge.training.saying import say
from specforge.training.schedules import ScheduleSettings

# Acceptance lengths that differ by less than this share count as equal.
NOISE = 0.01
# Validations without a rise before the advice, and the share by which the training loss must have fallen meanwhile.
PATIENCE = 2
LEAST_FALL = 0.05
# The share of that fall by which the validation loss may fall, too, if rows are memorised.
FOLLOWING = 0.25
# A learning rate at the end of a run is called high from this share of the peak.
HIGH_RATE = 0.25
# Share of the acceptance length that a draft vocabulary may cost, and the coverage to recommend instead.
LEAST_COST = 0.05
GOOD_COVERAGE = 0.99


@dataclass(frozen=True)
class Validation:
    """Results of a validation, and of training since the previous one.

    Attributes:
        step: Optimizer steps until then.
        acceptance_length: Tokens per verifier forward pass, by replay.
        loss: Mean loss of the validation rows.
        train_loss: Mean loss of the training batches since the previous validation.
        train_error: Standard error of that mean; infinite if it is not known.
    """

    step: int
    acceptance_length: float
    loss: float
    train_loss: float
    train_error: float


def overfitting(validations: Sequence[Validation], is_first_epoch: bool) -> str | None:
    """Return advice if the training loss falls and acceptance length does not rise, else None.

    Acceptance length counts as risen if it rose by more than 1 %. The training loss must have fallen by more than its
    noise and at least 5 %, and the validation loss by less than a quarter of that: at the start of a run both losses
    may fall before acceptance length rises.

    Args:
        validations: All of the run so far, in order.
        is_first_epoch: Whether no row has been trained on twice.
    """
    best, now = max(validations, key=lambda one: one.acceptance_length), validations[-1]
    risen = [one.acceptance_length * (1 + NOISE) >= best.acceptance_length for one in validations]
    first = risen.index(True)
    since = validations[first]
    noise = 2 * math.hypot(since.train_error, now.train_error)
    fall = _fall(since.train_loss, now.train_loss)
    if (
        len(validations) - 1 - first < PATIENCE
        or since.train_loss - now.train_loss <= noise
        or fall < LEAST_FALL
        or _fall(since.loss, now.loss) > FOLLOWING * fall
    ):
        return None
    if is_first_epoch:
        why = "no row was trained on twice, so the validation rows must differ in kind from the training rows"
        what = "train on rows like those that the draft is validated on and will serve"
    else:
        why = "the draft memorises its training rows"
        what = "train on more rows, for fewer epochs (trainer.max_epochs), or raise model.optimizer.weight_decay"
    return (
        f"acceptance length has not risen by more than {NOISE:.0%} since step {since.step:,}, while the training loss "
        f"fell from {since.train_loss:.4g} to {now.train_loss:.4g}: {why}. The draft of step {best.step:,} "
        f"({best.acceptance_length:.3f}), the best, is kept; {what}"
    )


def high_rate(share: float, step: int, steps: int, schedule: ScheduleSettings) -> str | None:
    """Return advice if the learning rate was high when the run ended; None below a quarter of the peak.

    Args:
        share: The schedule's learning rate for the next step, as a share of the peak.
        step: Optimizer steps that were trained.
        steps: Optimizer steps that the schedule spans.
        schedule: Settings of the schedule.
    """
    if schedule.warmup >= step > 0 and schedule.warmup >= 1:
        return (
            f"the run ended at step {step:,}, in its warmup of {schedule.warmup:,.0f} steps; set model.schedule.warmup "
            "to fewer steps, or to a share of the run such as 0.03"
        )
    if share < HIGH_RATE or not step:
        return None
    if step < steps and schedule.name != "constant":
        when = f"when the run ended, at step {step:,} of the {steps:,} that its schedule spans"
        what = f"set trainer.max_steps {step} so that the schedule ends with the run"
    else:
        when, what = "at the end of the run", "set model.schedule.name cosine or linear, with final_ratio 0"
    return (
        f"the learning rate was at {share:.0%} of its peak {when}. Decay to zero gives a better draft in the "
        f"same time; {what}"
    )


def small_vocabulary(rates: Sequence[float], coverage: float, size: int, larger: int | None) -> str | None:
    """Return advice if the draft vocabulary costs acceptance length; None if it costs less than 5 %.

    A token of the text is in the draft vocabulary with probability c, its coverage. So a chain of K tokens cannot
    exceed the acceptance length 1 + c + c^2 + ... + c^K. With the whole vocabulary, the share of the rounds that accept
    at least k tokens would be at most c^-k times as large.

    Args:
        rates: Share of the rounds that accept at least k = 1 .. K tokens.
        coverage: Share c of the supervised tokens of validation that are in the draft vocabulary.
        size: Number of draft tokens.
        larger: A size that is enough; None for the whole vocabulary.
    """
    length, chain = 1 + sum(rates), range(1, len(rates) + 1)
    cap = 1 + sum(coverage**k for k in chain)
    cost = sum(rate * (coverage**-k - 1) for k, rate in zip(chain, rates, strict=True)) if coverage else len(rates)
    if cost < LEAST_COST * length:
        return None
    return (
        f"the {size:,} draft tokens cover {coverage:.1%} of the supervised tokens of validation, which caps acceptance "
        f"length at about {cap:.2f} of {1 + len(rates)} and costs up to {min(cost, 1 + len(rates) - length):.2f} now; "
        f"set model.draft.draft_vocab_size {larger or 'null, which is the whole vocabulary'}"
    )


class Advice(Callback):
    """Prints advice about a wasteful recipe: at the validation that shows it, or at the end about the learning rate.

    Earlier validations and advice are stored in checkpoints, so that a resumed run does not repeat itself. Advice about
    the learning rate is printed at each end.
    """

    def __init__(self) -> None:
        self._validations: list[Validation] = []
        self._printed: list[str] = []
        # Number, sum and sum of squares of the first process's losses since the last validation.
        self._losses = torch.zeros(3)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Add the loss of a batch."""
        loss = outputs["loss"].float()
        self._losses = self._losses.to(loss.device) + torch.stack([torch.ones_like(loss), loss, loss.square()])

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the validations so far."""
        module, metrics = cast(DraftModule, pl_module), trainer.callback_metrics
        if not is_fitting(trainer) or module.monitor not in metrics:
            return
        figures = float(metrics[module.monitor]), float(metrics["val/loss"])
        self._validations.append(Validation(trainer.global_step, *figures, *mean_and_error(self._losses)))
        self._losses = torch.zeros(3)
        self._print_once("overfitting", overfitting(self._validations, trainer.current_epoch == 0))
        draft_ids, rates = module.draft.draft_ids, accept_rates(trainer, module, "pos")
        if draft_ids is not None:
            self._print_once("vocabulary", _of_vocabulary(draft_ids.cpu(), rates, data_of(trainer)))

    @rank_zero_only
    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Evaluate the final learning rate."""
        # Not on_train_end: the progress bar would be drawn again below the line.
        if stage != FIT:
            return
        module = cast(DraftModule, pl_module)
        share = trainer.optimizers[0].param_groups[0]["lr"] / module.optimizer_settings.lr
        if line := high_rate(share, trainer.global_step, module.length.steps, module.schedule_settings):
            say(f"\nadvice: {line}.")

    def state_dict(self) -> dict[str, Any]:
        """Return validations and printed advice, for the checkpoint."""
        return {
            "validations": [astuple(one) for one in self._validations],
            "said": self._printed,
            "losses": self._losses.tolist(),
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore validations and printed advice."""
        self._validations = [Validation(*one) for one in state_dict["validations"]]
        self._printed = list(state_dict["said"])
        self._losses = torch.tensor(state_dict["losses"])

    def _print_once(self, subject: str, line: str | None) -> None:
        if line is not None and subject not in self._printed:
            self._printed.append(subject)
            say(f"advice: {line}.")


def mean_and_error(sums: Tensor) -> tuple[float, float]:
    """Return a mean and its standard error.

    Args:
        sums: Number of values, their sum and the sum of their squares, [3].
    """
    number, total, squares = sums.tolist()
    mean = total / max(1, number)
    if number < 2:
        return mean, math.inf
    return mean, math.sqrt(max(0.0, squares / number - mean**2) / (number - 1))


def _fall(before: float, now: float) -> float:
    """Return the relative decrease of a loss."""
    return (before - now) / abs(before) if before else 0.0


def _of_vocabulary(draft_ids: Tensor, rates: Sequence[float], data: DraftDataModule) -> str | None:
    assert data.validation_rows is not None
    counts, size = data.validation_rows.supervised_counts, draft_ids.numel()
    coverage = float(counts[draft_ids].sum() / counts.sum())
    larger = (
        one.draft_vocab_size
        for one in coverage_by_size(data.vocabulary_counts(), counts)
        if one.draft_vocab_size > size and (one.validation or 0) >= GOOD_COVERAGE
    )
    return small_vocabulary(rates, coverage, size, next(larger, None))
