"""Weights along a chain by hand, and of a plugin; the loss itself is in test_distillation."""

from __future__ import annotations

import pytest
import torch

from specforge.errors import UsageError
from specforge.training.losses.named import chain_weighting
from specforge.training.losses.objectives import Distributions
from specforge.training.losses.weightings import agreement, confidence, dpace, vat

EVERY = torch.ones(4, 1, dtype=torch.bool)


def column(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)[:, None]


def test_dpace_sums_the_products_of_smoothed_confidences() -> None:
    weights = dpace(column(0.6, 0.2, 1.0, 0.0), EVERY)
    reached = [0.8, 0.8 * 0.6, 0.8 * 0.6 * 1.0, 0.8 * 0.6 * 1.0 * 0.5]
    assert weights[:, 0].tolist() == pytest.approx([sum(reached[step:]) for step in range(4)])


def test_dpace_is_the_derivative_of_the_smoothed_expected_length() -> None:
    confidences = torch.rand(4, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    log_smoothed = (0.5 * confidences + 0.5).log().requires_grad_()
    expected_length = log_smoothed.exp().cumprod(0).sum()
    (derivative,) = torch.autograd.grad(expected_length, log_smoothed)
    torch.testing.assert_close(dpace(confidences, torch.ones_like(confidences, dtype=torch.bool)), derivative)


def test_dpace_skips_steps_that_do_not_count() -> None:
    counts = torch.tensor([[True], [False], [True], [False]])
    weights = dpace(column(0.6, 0.2, 0.4, 0.9), counts)
    assert weights[counts].tolist() == pytest.approx([0.8 + 0.8 * 0.7, 0.8 * 0.7])


@pytest.mark.parametrize(
    ("agreements", "expected"),
    [
        ((1, 1, 1, 1), [1, 1, 1, 1]),
        ((1, 0, 1, 0), [1, 1, 0.8, 0.64]),
        ((0, 1, 1, 1), [1, 0.8, 0.64, 0.512]),
        ((1, 1, 1, 0), [1, 1, 1, 1]),
    ],
)
def test_vat_decays_from_the_first_rejected_step_on(agreements: tuple[int, ...], expected: list[float]) -> None:
    assert vat(column(*agreements), EVERY)[:, 0].tolist() == pytest.approx(expected)


def test_statistics_read_the_text_and_the_verifiers_best_token() -> None:
    log_q = torch.tensor([[0.5, 0.3, 0.2], [0.1, 0.1, 0.8], [0.2, 0.7, 0.1]]).log()
    tokens = torch.tensor([0, 1, -1])
    rows = Distributions(log_q, log_q, log_q, text=tokens, verifier_top=tokens)
    assert confidence(rows).tolist() == pytest.approx([0.5, 0.1, 0.0])
    assert agreement(rows).tolist() == [1.0, 0.0, 0.0]


def test_an_unknown_name_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageError, match=r"model\.weighting: .*'vatt'.*dpace, vat.*vat"):
        chain_weighting("vatt")
