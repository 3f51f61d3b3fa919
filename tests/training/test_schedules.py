from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from specforge.training.schedules import ScheduleSettings, build_schedule, learning_rate_factor

NAMES = ["cosine", "linear", "constant", "wsd"]


def factors(total: int, **settings: Any) -> list[float]:
    return [learning_rate_factor(step, ScheduleSettings(**settings), total) for step in range(total + 1)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize(("warmup", "length"), [(0.1, 4), (4, 4), (4.0, 4), (0.095, 4), (0, 0), (1, 1)])
def test_warmup_is_a_share_or_a_number_of_steps(name: str, warmup: float, length: int) -> None:
    values = factors(40, name=name, warmup=warmup)
    assert values[:length] == pytest.approx([(step + 1) / (length + 1) for step in range(length)])
    assert values[length] == pytest.approx(1.0)
    assert all(0 < value < 1 for value in values[:length])


def test_a_share_of_a_hundred_steps_is_the_number_of_steps() -> None:
    shares = range(1, 100)
    lengths = [sum(value < 1 for value in factors(100, name="constant", warmup=share / 100)) for share in shares]
    assert lengths == list(shares)


@pytest.mark.parametrize("name", ["cosine", "linear", "wsd"])
@pytest.mark.parametrize("final", [0.0, 0.1, 1.0])
@pytest.mark.parametrize("warmup", [0, 0.2, 7])
def test_the_end_is_the_final_ratio(name: str, final: float, warmup: float) -> None:
    values = factors(50, name=name, final_ratio=final, warmup=warmup)
    assert values[50] == pytest.approx(final)
    settings = ScheduleSettings(name=name, final_ratio=final, warmup=warmup)  # type: ignore[arg-type]
    assert learning_rate_factor(80, settings, 50) == pytest.approx(final)


def test_shapes() -> None:
    assert factors(8, name="linear", warmup=0) == pytest.approx([1 - step / 8 for step in range(9)])
    cosine = factors(8, name="cosine", warmup=0, final_ratio=0.2)
    assert cosine == pytest.approx([0.2 + 0.4 * (1 + math.cos(math.pi * step / 8)) for step in range(9)])
    assert factors(8, name="constant", warmup=0, final_ratio=0.3) == [1.0] * 9


def test_wsd_stays_at_the_peak_and_decays_at_the_end() -> None:
    values = factors(100, name="wsd", warmup=10, decay_share=0.3, final_ratio=0.4)
    assert values[10:71] == pytest.approx([1.0] * 61)
    assert values[70:] == pytest.approx([1 - 0.6 * step / 30 for step in range(31)])


@given(
    name=st.sampled_from(NAMES),
    total=st.integers(1, 60),
    warmup=st.one_of(st.floats(0, 1, exclude_max=True), st.integers(1, 90)),
    final=st.floats(0, 1),
    decay=st.floats(0.01, 1),
)
def test_every_factor_is_a_share_of_the_peak(name: Any, total: int, warmup: float, final: float, decay: float) -> None:
    values = factors(total, name=name, warmup=warmup, final_ratio=final, decay_share=decay)
    assert all(0 <= value <= 1 + 1e-9 for value in values)
    assert all(value > 0 for value in values[:-1])
    peak = values.index(max(values))
    assert values[: peak + 1] == sorted(values[: peak + 1])
    assert all(low <= high + 1e-9 for high, low in zip(values[peak:], values[peak + 1 :], strict=False))


def test_the_optimizer_follows() -> None:
    parameter = torch.nn.Parameter(torch.zeros(1))
    optimizer = torch.optim.SGD([{"params": [parameter], "lr": 2.0}])
    settings = ScheduleSettings(name="cosine", warmup=2)
    schedule = build_schedule(optimizer, settings, 6)
    for step in range(7):
        assert optimizer.param_groups[0]["lr"] == pytest.approx(2 * learning_rate_factor(step, settings, 6))
        optimizer.step()
        schedule.step()


@pytest.mark.parametrize(
    "wrong",
    [{"warmup": -1}, {"final_ratio": 1.1}, {"final_ratio": -0.1}, {"decay_share": 0}, {"name": "step"}, {"x": 1}],
    ids=str,
)
def test_wrong_settings_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        ScheduleSettings(**wrong)


@pytest.mark.parametrize("steps", [1, 2, 3, 4, 5, 9])
def test_a_decay_of_less_than_one_step_ends_at_the_final_ratio(steps: int) -> None:
    settings = ScheduleSettings(name="wsd", warmup=0, final_ratio=0.1)
    factors = [learning_rate_factor(step, settings, steps) for step in range(steps + 1)]
    assert factors[0] == 1 and factors[-1] == pytest.approx(0.1)
    assert factors == sorted(factors, reverse=True)
