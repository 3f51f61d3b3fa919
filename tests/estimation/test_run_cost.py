from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specforge.commands.units import duration, in_units
from specforge.estimation.estimate import Estimate, RunPlan, flops_per_token
from specforge.estimation.step import LAYERS, OPTIMIZER, VERIFIER, SplitVerifier, StepCost, StepMemory
from specforge.estimation.text import RunText

MEMORY = StepMemory(*range(10))


def make_estimate(plan: RunPlan, tokens: int = 1000, rows: int = 10) -> Estimate:
    text = RunText(tokens, 0.5, rows, [], "")
    return Estimate(
        text, plan, {VERIFIER: 2.0, LAYERS: 3.0, OPTIMIZER: 1.0}, MEMORY, 7, 4, 4096, 2.0, (0.25, 0.5), [8, 8]
    )


def test_states_on_disk():
    found = make_estimate(RunPlan(1, 1, 1, 1, None, 1.0))
    assert found.stored_bytes(torch.bfloat16) == 4 * 4096 * 2 == 32 * 1024
    assert found.stored_bytes(torch.float8_e4m3fn) == found.stored_bytes(torch.int8) == 4 * (4096 + 4)


class TestSteps:
    @pytest.mark.parametrize(
        ("plan", "steps"),
        [
            (RunPlan(1, 1, 1, 1, None, 1.0), 10),
            (RunPlan(3, 1, 1, 2, None, 1.0), 8),
            (RunPlan(1, 4, 1, 1, None, 1.0), 3),
            (RunPlan(1, 1, 4, 1, None, 1.0), 3),
            (RunPlan(1, 1, 1, 2, 15, 1.0), 15),
            (RunPlan(1, 1, 1, None, 25, 1.0), 25),
            (RunPlan(1, 1, 1, 2, None, 3), 6),
            (RunPlan(1, 1, 1, 1, None, 0.5), 5),
        ],
    )
    def test_number(self, plan, steps):
        assert make_estimate(plan).steps == steps

    @given(batch=st.integers(1, 4), devices=st.integers(1, 4), accumulated=st.integers(1, 4))
    def test_the_time_of_an_epoch_follows_from_its_tokens(self, batch, devices, accumulated):
        rows = 24 * batch * devices * accumulated
        found = make_estimate(RunPlan(batch, devices, accumulated, 1, None, 1.0), tokens=1000, rows=rows)
        shortest, longest = (seconds * found.steps for seconds in found.seconds_per_step())
        assert shortest == pytest.approx(1000 * 6.0 / (2.0 * devices) / 0.5)
        assert longest == pytest.approx(2 * shortest)
        stored = found.seconds_per_step(stored=True)[0] * found.steps
        assert stored == pytest.approx(shortest * 4.0 / 6.0)


def test_operations_per_token_exclude_padding_and_share_the_optimizer():
    batches = [{"document_ids": torch.tensor([[0, 0, 1, -1]])}, {"document_ids": torch.tensor([[0, -1, -1, -1]])}]
    costs = [StepCost({LAYERS: 10, OPTIMIZER: 4}, MEMORY, 7), StepCost({LAYERS: 6, OPTIMIZER: 4}, MEMORY, 7)]
    assert flops_per_token(costs, batches, 2) == {LAYERS: 4.0, OPTIMIZER: 1.0}


def test_the_maximum_of_each_field():
    other = StepMemory(9, *[0] * 9)
    assert StepMemory.largest([MEMORY, other]) == StepMemory(9, *range(1, 10))


def test_readable_numbers():
    assert [in_units(number, "B") for number in (0, 999, 32768, 1.5e12, 2e15, 3e18)] == [
        "0 B",
        "999 B",
        "32.77 kB",
        "1.50 TB",
        "2.00 PB",
        "3,000.00 PB",
    ]
    assert [duration(seconds) for seconds in (0.01234, 59, 3540, 3600, 90000, 86400 * 9)] == [
        "0.0123 s",
        "59 s",
        "59 min",
        "1 h 0 min",
        "25 h 0 min",
        "9.0 days",
    ]


def test_a_split_verifier_keeps_a_share_of_its_layers_and_two_whole_ones() -> None:
    split = SplitVerifier([40, 40, 40, 80], 4)
    memory = StepMemory(300, *[0] * 7, 500, 450)
    # 200 bytes of layers: 50 here, and two of up to 80 gathered.
    assert split.on_each(memory) == StepMemory(300 - 200 + 50 + 160, *[0] * 7, 500 - 200 + 50 + 160, 450)
    assert split.gathered == 150
