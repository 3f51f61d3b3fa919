"""A run with a wasteful recipe prints advice on what to change."""

from __future__ import annotations

from collections.abc import Callable

import pytest
from quickstart_runs import rows
from training_runs import write_rows

Advice = Callable[..., list[str]]


@pytest.fixture
def advice(workshop, fit, capfd) -> Advice:
    """Run ``specforge fit`` and return the lines of advice."""

    def run(output_dir: str, *more: str) -> list[str]:
        capfd.readouterr()
        fit(output_dir, "--trainer.logger=false", *more)
        return [line for line in capfd.readouterr().out.splitlines() if line.startswith("advice: ")]

    return run


def test_too_few_rows_a_constant_rate_and_a_small_vocabulary(workshop, advice):
    # Six rows make one batch, so an epoch is a step. Validation rows without an origin have proxy figures.
    train = write_rows(workshop.folder / "six.jsonl", rows("train.jsonl", 6))
    plain = [{name: row[name] for name in ("input_ids", "loss_mask")} for row in rows("validation.jsonl", 8)]
    validation = write_rows(workshop.folder / "plain.jsonl", plain)
    workshop.values["data"] |= {"train": str(train), "validation": str(validation)}
    workshop.values["trainer"] |= {"max_epochs": 99, "check_val_every_n_epoch": 10}
    workshop.values["model"] |= {
        "draft": {"draft_vocab_size": 16},
        "optimizer": {"name": "muon", "lr": 2e-2},
        "schedule": {"name": "constant", "warmup": 0},
    }
    vocabulary, overfitting, rate = advice("straight", "--trainer.max_steps=40")
    assert "the 16 draft tokens cover" in vocabulary and "model.draft.draft_vocab_size" in vocabulary
    assert "memorises" in overfitting and "is kept" in overfitting
    assert "at 100% of its peak" in rate and "model.schedule.name" in rate
    # Resumed between two validations, it has the losses since the last one and repeats only the advice at the end.
    assert advice("parts", "--trainer.max_steps=25") == [vocabulary, rate]
    assert advice("parts", "--trainer.max_steps=40", "--ckpt_path=last") == [overfitting, rate]


def test_a_sound_recipe_prints_no_advice(advice):
    assert advice("runs", "--trainer.val_check_interval=4") == []


def test_a_run_without_validation(advice):
    assert advice("runs", "--data.validation=null", "--data.validation_share=0", "--trainer.max_steps=2") == []
