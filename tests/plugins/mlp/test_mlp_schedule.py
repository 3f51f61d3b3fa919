"""The published learning rate: one cycle for each stage."""

from __future__ import annotations

import math
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from specforge_mlp.schedule import two_stage_factor


def factors(begin: int | None, total: int) -> list[float]:
    return [two_stage_factor(step, begin, total) for step in range(total)]


@st.composite
def runs(draw: st.DrawFn) -> tuple[int | None, int]:
    total = draw(st.integers(1, 4000))
    return draw(st.none() | st.integers(1, total - 1)) if total > 1 else None, total


def test_the_published_run() -> None:
    """21,000 steps, stage 2 from step 15,000: warmups of 750 and 300 steps."""
    rates = factors(15_000, 21_000)
    stage_one, stage_two = rates[:15_000], rates[15_000:]
    assert max(stage_one) == pytest.approx(1, abs=0.01) and stage_one.index(max(stage_one)) == pytest.approx(
        750, abs=60
    )
    assert max(stage_two) == pytest.approx(0.1, abs=0.001) and stage_two.index(max(stage_two)) == pytest.approx(
        300, abs=25
    )
    assert stage_one[-1] == pytest.approx(0.1, abs=1e-6) and stage_two[-1] == pytest.approx(0.01, abs=1e-6)
    # Halfway between peak and end in the middle of a stage.
    assert stage_one[7_500] == pytest.approx(0.55) and stage_two[3_000] == pytest.approx(0.055)
    for step in (0, 1, 99, 374, 600):
        assert stage_one[step] == pytest.approx(1 - (1 - (step + 1) / 750) ** 2)
    for step in (0, 1, 99, 149, 240):
        assert stage_two[step] == pytest.approx(0.1 * (1 - (1 - (step + 1) / 300) ** 2))
    for step in (1_000, 5_000, 14_000):
        assert stage_one[step] == pytest.approx(0.1 + 0.45 * (1 + math.cos(math.pi * step / 15_000)))


def test_a_warmup_takes_2000_steps_at_most() -> None:
    assert two_stage_factor(999, None, 10**6) == pytest.approx(0.75)
    assert two_stage_factor(1_999, None, 10**6) == pytest.approx(1, abs=1e-4)
    assert two_stage_factor(500_999, 500_000, 10**6) == pytest.approx(0.075)


def test_without_stage_two_the_run_is_one_cycle() -> None:
    assert factors(None, 400) == factors(400, 500)[:400]
    assert factors(None, 400)[-1] == pytest.approx(0.1, abs=1e-4)


@given(run=runs())
def test_no_step_has_rate_zero_and_none_is_above_its_peak(run: tuple[int | None, int]) -> None:
    begin, total = run
    rates = factors(begin, total)
    assert min(rates) > 0
    assert max(rates[:begin]) <= 1
    if begin is not None:
        assert max(rates[begin:]) <= 0.1


@given(run=runs())
def test_each_stage_rises_once_and_then_falls(run: tuple[int | None, int]) -> None:
    begin, total = run
    rates = factors(begin, total)
    for stage in (rates[:begin], rates[begin:] if begin is not None else []):
        if not stage:
            continue
        top = stage.index(max(stage))
        assert all(first < second for first, second in pairwise(stage[: top + 1]))
        assert all(first >= second for first, second in pairwise(stage[top:]))


@pytest.mark.parametrize(("begin", "total"), [(15_000, 21_000), (700, 1_000), (None, 2_000)])
def test_no_jumps_within_a_stage(begin: int | None, total: int) -> None:
    rates = factors(begin, total)
    for first, last, peak in ((0, begin or total, 1.0), (begin or total, total, 0.1)):
        stage = rates[first:last]
        if not stage:
            continue
        # The parabola is steepest at its beginning, 2 / w a step.
        steepest = 2 * peak / max(1, min(2000, len(stage) / 20))
        assert stage[0] <= steepest
        assert max(abs(rate - other) for rate, other in pairwise(stage)) <= steepest
