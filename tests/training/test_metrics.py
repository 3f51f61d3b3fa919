from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specforge.training.losses.distillation import DraftSteps
from specforge.training.metrics import StepMeans, results_text, step_sums

TERMS = ("kl", "jsd")
BY_ROW = ("acceptance", "agreement", "matches", "drawn")


def random_outcome(
    rows: int, steps: int, generator: torch.Generator, reach: int
) -> tuple[DraftSteps, dict[str, Tensor]]:
    """An outcome, and the value of every quantity at each row; steps from ``reach`` on are not supervised."""
    supervised = torch.rand(steps, rows, generator=generator) < 0.6
    supervised[reach:] = False
    values = {name: torch.rand(steps, rows, generator=generator) * supervised for name in (*TERMS, "acceptance")}
    for name in BY_ROW[1:]:
        values[name] = (torch.rand(steps, rows, generator=generator) < 0.5) * supervised * 1.0
    sums = {name: values[name].sum(1) for name in TERMS}
    outcome = DraftSteps(torch.zeros(()), sums, supervised, *(values[name] for name in BY_ROW))
    return outcome, {**values, "supervised": supervised}


def direct_means(values: list[dict[str, Tensor]], steps: int) -> dict[str, float]:
    means = {}
    for name in (*TERMS, "acceptance", "agreement"):
        for step in range(steps):
            kept = torch.cat([value[name][step][value["supervised"][step]] for value in values])
            if kept.numel():
                means[f"{name}/step_{step}"] = float(kept.double().mean())
    return means


@given(
    sizes=st.lists(st.integers(1, 30), min_size=1, max_size=5),
    steps=st.integers(1, 4),
    reach=st.integers(0, 4),
    seed=st.integers(0, 999),
)
def test_means_over_uneven_batches(sizes: list[int], steps: int, reach: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    batches = [random_outcome(rows, steps, generator, reach) for rows in sizes]
    metric = StepMeans(TERMS, steps)
    for outcome, _ in batches:
        metric.update(outcome)
    expected = direct_means([values for _, values in batches], steps)
    ours = {name: float(value) for name, value in metric.compute().items()}
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(ours[name], value, atol=1e-6, rtol=1e-6)


def test_ranks_add_up() -> None:
    """Ranks exchange sums: the result is the mean of all rows, not of the ranks' means."""
    generator = torch.Generator().manual_seed(0)
    batches = [random_outcome(rows, 2, generator, 2) for rows in (3, 50)]
    ranks = [StepMeans(TERMS, 2) for _ in batches]
    for metric, (outcome, _) in zip(ranks, batches, strict=True):
        metric.update(outcome)
    ranks[0].merge_state(ranks[1])
    expected = direct_means([values for _, values in batches], 2)
    for name, value in ranks[0].compute().items():
        torch.testing.assert_close(float(value), expected[name], atol=1e-6, rtol=1e-6)


def test_reset() -> None:
    generator = torch.Generator().manual_seed(0)
    metric = StepMeans(TERMS, 2)
    metric.update(random_outcome(9, 2, generator, 2)[0])
    metric.reset()
    outcome, values = random_outcome(4, 2, generator, 2)
    metric.update(outcome)
    for name, value in metric.compute().items():
        torch.testing.assert_close(float(value), direct_means([values], 2)[name], atol=1e-6, rtol=1e-6)


def test_sums_of_millions_of_rows_keep_their_digits() -> None:
    supervised = torch.ones(1, 2**20, dtype=torch.bool)
    values = torch.full((1, 2**20), 0.3)
    outcome = DraftSteps(torch.zeros(()), {"kl": values.double().sum(1)}, supervised, *[values] * len(BY_ROW))
    metric = StepMeans(("kl",), 1)
    for _ in range(40):
        metric.update(outcome)
    assert abs(float(metric.compute()["kl/step_0"]) - 0.3) < 1e-6


def test_sums_of_a_batch() -> None:
    outcome, values = random_outcome(6, 3, torch.Generator().manual_seed(1), 3)
    expected = torch.stack([values[name].sum(1) for name in (*TERMS, "acceptance", "agreement")])
    torch.testing.assert_close(step_sums(outcome), expected)


def test_results_begin_with_what_counts():
    tags = ["loss", "kl/step_0", "acceptance_length_at_1", "accept_rate_pos_1", "acceptance_length_proxy"]
    lines = results_text({f"val/{tag}": torch.tensor(3.41268) for tag in tags}).splitlines()
    assert [line.split() for line in lines] == [
        [f"val/{tag}", "3.4127"]
        for tag in ("acceptance_length_proxy", "acceptance_length_at_1", "accept_rate_pos_1", "loss", "kl/step_0")
    ]
