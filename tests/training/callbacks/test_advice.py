"""Advice about wasteful recipes."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from specforge.decoding.replay import figures, replay
from specforge.training.callbacks.advice import (
    LEAST_COST,
    NOISE,
    Advice,
    Validation,
    high_rate,
    mean_and_error,
    overfitting,
    small_vocabulary,
)
from specforge.training.schedules import ScheduleSettings, learning_rate_factor

lengths = st.floats(1, 8)
losses = st.floats(0.1, 20)
validations = st.lists(st.builds(Validation, st.integers(1, 999), lengths, losses, losses, st.floats(0, 1)), min_size=1)


def run(*figures: tuple[float, float, float], error: float = 0.01) -> list[Validation]:
    """Validations every 100 steps, of (acceptance length, validation loss, training loss)."""
    return [Validation(100 * number, *figure, error) for number, figure in enumerate(figures, start=1)]


OVERFITTING = run((1.5, 5.0, 6.0), (2.0, 4.0, 4.5), (1.99, 4.0, 4.0), (1.98, 4.1, 3.6))


class TestOverfitting:
    def test_names_the_best_step_and_what_to_do(self):
        line = overfitting(OVERFITTING, is_first_epoch=False)
        assert line is not None
        for part in ("since step 200", "from 4.5 to 3.6", "draft of step 200 (2.000)", "more rows", "weight_decay"):
            assert part in line

    def test_waits_for_two_validations(self):
        assert overfitting(OVERFITTING[:-1], is_first_epoch=False) is None

    def test_it_is_not_overfitting_if_no_row_was_seen_twice(self):
        line = overfitting(OVERFITTING, is_first_epoch=True)
        assert line is not None and "differ in kind from the training rows" in line and "memorises" not in line

    def test_a_rise_within_noise_does_not_count(self):
        slow = [*OVERFITTING[:-1], replace(OVERFITTING[-1], acceptance_length=2.0 * (1 + NOISE / 2))]
        line = overfitting(slow, is_first_epoch=False)
        assert line is not None and "since step 200" in line and "draft of step 400 (2.010)" in line

    @pytest.mark.parametrize(
        "change",
        [{"acceptance_length": 2.1}, {"train_loss": 4.4}, {"train_error": math.inf}, {"train_error": 1.0}, {"loss": 3}],
        ids=lambda change: next(iter(change)),
    )
    def test_all_conditions_must_hold(self, change):
        assert overfitting([*OVERFITTING[:-1], replace(OVERFITTING[-1], **change)], is_first_epoch=False) is None

    def test_acceptance_length_may_wait_at_the_start(self):
        waiting = run((1.0, 10.0, 11.0), (1.0, 8.0, 8.5), (1.0, 6.0, 6.5))
        assert overfitting(waiting, is_first_epoch=True) is None

    @given(validations)
    def test_no_advice_while_acceptance_length_rises(self, before):
        best = max(validation.acceptance_length for validation in before)
        risen = replace(before[-1], acceptance_length=best * (1 + 2 * NOISE))
        assert overfitting([*before, risen], is_first_epoch=False) is None

    @given(validations)
    def test_no_advice_while_the_training_loss_stays(self, before):
        level = [replace(validation, train_loss=before[0].train_loss) for validation in before]
        assert overfitting(level, is_first_epoch=False) is None


class TestHighRate:
    @given(
        st.sampled_from(["cosine", "linear", "wsd"]),
        st.integers(2, 5000),
        st.floats(0, 0.2),
        st.floats(0, 0.2),
    )
    def test_a_schedule_that_ends_with_the_run_is_right(self, name, steps, final_ratio, warmup):
        schedule = ScheduleSettings(name=name, final_ratio=final_ratio, warmup=warmup)
        share = learning_rate_factor(steps, schedule, steps)
        assert high_rate(share, steps, steps, schedule) is None

    def test_a_constant_rate_is_reported(self):
        line = high_rate(1.0, 520, 520, ScheduleSettings(name="constant"))
        assert line is not None and "100% of its peak" in line and "cosine or linear" in line

    def test_a_run_that_ended_early_gets_its_number_of_steps(self):
        schedule = ScheduleSettings()
        line = high_rate(learning_rate_factor(1200, schedule, 3000), 1200, 3000, schedule)
        assert line is not None and "step 1,200 of the 3,000" in line and "trainer.max_steps 1200" in line

    def test_fewer_steps_do_not_help_a_constant_rate(self):
        line = high_rate(1.0, 300, 520, ScheduleSettings(name="constant"))
        assert line is not None and "max_steps" not in line

    def test_a_run_that_ends_in_its_warmup_is_reported(self):
        schedule = ScheduleSettings(name="linear", warmup=2000)
        line = high_rate(learning_rate_factor(12, schedule, 12), 12, 12, schedule)
        assert line is not None and "warmup of 2,000 steps" in line and "model.schedule.warmup" in line


class TestSmallVocabulary:
    def test_names_the_cap_and_a_size(self):
        line = small_vocabulary([0.5, 0.3, 0.2], coverage=0.9, size=256, larger=1024)
        assert line is not None
        for part in ("256 draft tokens cover 90.0%", "about 3.44 of 4", "costs up to 0.20", "draft_vocab_size 1024"):
            assert part in line

    def test_the_full_vocabulary_if_no_smaller_size_is_enough(self):
        assert "draft_vocab_size null" in str(small_vocabulary([0.5, 0.3], coverage=0.8, size=256, larger=None))

    def test_a_draft_that_can_accept_nothing(self):
        line = small_vocabulary([0.0, 0.0], coverage=0.0, size=256, larger=None)
        assert line is not None and "about 1.00 of 3 and costs up to 2.00" in line

    @given(st.lists(st.floats(0, 1), min_size=1, max_size=8))
    def test_a_vocabulary_that_covers_all_costs_nothing(self, rates):
        assert small_vocabulary(rates, coverage=1.0, size=256, larger=None) is None

    @given(st.floats(0.05, 0.999), st.floats(0, 1), st.integers(1, 8))
    def test_the_cost_is_the_gain_of_an_equal_draft_of_all_tokens(self, coverage, accepted, steps):
        rates = [(coverage * accepted) ** k for k in range(1, steps + 1)]
        now, with_all = 1 + sum(rates), 1 + sum(accepted**k for k in range(1, steps + 1))
        assume(abs(with_all - now - LEAST_COST * now) > 1e-6)
        line = small_vocabulary(rates, coverage, size=256, larger=None)
        assert (line is not None) == (with_all - now > LEAST_COST * now)
        assert line is None or f"costs up to {with_all - now:.2f} now" in line

    def test_a_perfect_draft_reaches_the_cap_by_replay(self):
        coverage, steps, tokens = 0.9, 4, 20_000
        inside = torch.rand(tokens, generator=torch.Generator().manual_seed(0)) < coverage
        matches = inside.float().unfold(0, steps, 1)
        rounds = replay(matches[None], torch.tensor([len(matches)]))
        found = figures(float(rounds.tokens), float(rounds.rounds[-1]), rounds.accepted[-1].tolist())
        line = small_vocabulary([found[f"accept_rate_pos_{k}"] for k in range(1, 5)], coverage, 256, None)
        assert line is not None
        cap = float(line.partition("about ")[2].partition(" of")[0])
        assert found["acceptance_length"] == pytest.approx(cap, rel=0.02)


@given(st.lists(st.floats(-10, 10), min_size=2, max_size=50))
def test_mean_and_standard_error(values):
    wide = torch.tensor(values, dtype=torch.float64)
    mean, error = mean_and_error(torch.stack([torch.tensor(float(len(values))), wide.sum(), wide.square().sum()]))
    assert mean == pytest.approx(float(wide.mean()), abs=1e-6)
    assert error == pytest.approx(float(wide.std()) / math.sqrt(len(values)), abs=1e-4)


def test_one_value_has_no_known_error():
    assert mean_and_error(torch.tensor([1.0, 3.0, 9.0])) == (3.0, math.inf)


def test_a_resumed_run_keeps_its_validations_and_advice():
    before, after = Advice(), Advice()
    before.load_state_dict(
        {"validations": [(8, 1.5, 2.0, 3.0, math.inf)], "said": ["overfitting"], "losses": [2.0, 5.0, 13.0]}
    )
    after.load_state_dict(before.state_dict())
    assert after.state_dict() == before.state_dict()
