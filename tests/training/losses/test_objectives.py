from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from specforge.hookspecs import Objective
from specforge.registry import installed
from specforge.training.losses import objectives
from specforge.training.losses.objectives import Distributions

NAMES = ["kl", "reverse_kl", "cross_entropy", "total_variation", "jsd", "lk_alpha", "lk_lambda", "text", "argmax"]


def function_of(name: str) -> Any:
    return installed().load(installed().all(Objective)[name], "function")


@st.composite
def distributions(draw: st.DrawFn, pruned: bool | None = None) -> Distributions:
    """Distributions of a few rows, flat to nearly one-hot; the draft vocabulary is a prefix of the verifier's."""
    rows, size = draw(st.integers(1, 3)), draw(st.integers(1, 6))
    outside = draw(st.integers(1, 4)) if pruned or (pruned is None and draw(st.booleans())) else 0
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    sharpness = draw(st.sampled_from([0.1, 1.0, 10.0, 60.0]))

    def log_probabilities(width: int) -> Tensor:
        return (sharpness * torch.randn(rows, width, generator=generator)).log_softmax(-1)

    full = log_probabilities(size + outside)[:, :size]
    mean, text = torch.rand(rows, generator=generator), torch.randint(-1, size, (rows,), generator=generator)
    return Distributions(log_probabilities(size), full.log_softmax(-1), full, mean, text)


def test_all_losses_of_the_core_are_tested() -> None:
    core = next(plugin for plugin in installed().plugins if plugin.name == "core")
    losses = {descriptor.name: descriptor for descriptor in core.descriptors if isinstance(descriptor, Objective)}
    assert sorted(losses) == sorted(NAMES)
    needs_mean = [name for name, loss in losses.items() if loss.uses_mean_acceptance]
    assert needs_mean == ["lk_lambda"]
    assert [name for name, loss in losses.items() if loss.uses_text] == ["text"]


@given(rows=distributions())
def test_values_follow_the_definitions(rows: Distributions) -> None:
    for number in range(rows.log_q.shape[0]):
        q = [math.exp(log_prob) for log_prob in rows.log_q[number].tolist()]
        log_q, log_p = rows.log_q[number].tolist(), rows.log_p[number].tolist()
        p = [math.exp(log_prob) for log_prob in log_p]
        full = [math.exp(log_prob) for log_prob in rows.log_p_full[number].tolist()]
        accepted = sum(map(min, full, q))
        kl = sum(a * (b - c) for a, b, c in zip(p, log_p, log_q, strict=True))
        middle = [(a + b) / 2 for a, b in zip(p, q, strict=True)]
        fading = math.exp(-3 * float(rows.mean_acceptance[number]))
        expected = {
            "kl": kl,
            "reverse_kl": sum(a * (c - b) for a, b, c in zip(q, log_p, log_q, strict=True)),
            "cross_entropy": -sum(a * b for a, b in zip(p, log_q, strict=True)),
            "total_variation": 1 - accepted,
            "jsd": sum(
                (a * math.log(a / m) if a else 0) + (b * math.log(b / m) if b else 0)
                for a, b, m in zip(p, q, middle, strict=True)
            )
            / 2,
            "lk_lambda": fading * kl + (1 - fading) * (1 - accepted),
            "argmax": -log_q[log_p.index(max(log_p))],
            "text": -log_q[int(rows.text[number])] if rows.text[number] >= 0 else 0.0,
        }
        if accepted > 1e-30:
            expected["lk_alpha"] = -math.log(accepted)
        for name, value in expected.items():
            ours = float(function_of(name)(rows)[number])
            assert ours == pytest.approx(value, rel=1e-4, abs=2e-5), name
        assert float(rows.acceptance[number]) == pytest.approx(accepted, rel=1e-4, abs=1e-5)


@given(rows=distributions())
def test_bounds(rows: Distributions) -> None:
    tolerance = 1e-5
    accepted = rows.acceptance
    assert accepted.shape == rows.log_q.shape[:1]
    assert (accepted >= 0).all() and (accepted <= 1 + tolerance).all()
    # The verifier's probability of tokens outside the draft vocabulary is lost.
    assert (accepted <= rows.log_p_full.exp().sum(-1) + tolerance).all()
    torch.testing.assert_close(objectives.total_variation(rows), 1 - accepted)
    for name in ("kl", "reverse_kl", "jsd", "cross_entropy"):
        assert (function_of(name)(rows) >= -tolerance).all(), name
    assert (function_of("jsd")(rows) <= math.log(2) + tolerance).all()
    assert (function_of("lk_alpha")(rows) >= -tolerance).all()
    assert all(function_of(name)(rows).isfinite().all() for name in NAMES)


@given(rows=distributions(pruned=False))
def test_losses_vanish_if_the_draft_equals_the_verifier(rows: Distributions) -> None:
    same = replace(rows, log_q=rows.log_p)
    for name in NAMES[:-2]:  # the last two are cross-entropies with one token
        value = function_of(name)(same)
        if name == "cross_entropy":
            value = value + (rows.log_p.exp() * rows.log_p).sum(-1)
        torch.testing.assert_close(value, torch.zeros_like(value), atol=1e-5, rtol=0, msg=name)
    torch.testing.assert_close(same.acceptance, torch.ones(rows.log_q.shape[0]))


@given(rows=distributions())
def test_jensen_shannon_is_symmetric(rows: Distributions) -> None:
    swapped = replace(rows, log_q=rows.log_p, log_p=rows.log_q)
    torch.testing.assert_close(
        objectives.jensen_shannon(rows), objectives.jensen_shannon(swapped), atol=1e-6, rtol=1e-5
    )


@given(rows=distributions(), acceptance=st.floats(0, 1))
def test_lk_lambda_fades_from_divergence_to_rejection(rows: Distributions, acceptance: float) -> None:
    mean = torch.full(rows.log_q.shape[:1], acceptance)
    kl, rejection = objectives.forward_kl(rows), objectives.total_variation(rows)
    value = objectives.lk_lambda(replace(rows, mean_acceptance=mean))
    torch.testing.assert_close(value, rejection + math.exp(-3 * acceptance) * (kl - rejection), atol=1e-5, rtol=1e-4)
    if acceptance == 0:
        torch.testing.assert_close(value, kl)


def test_an_acceptance_that_underflows_still_has_a_gradient() -> None:
    log_q = torch.tensor([[-200.0, 0.0]], requires_grad=True)
    log_p = torch.tensor([[0.0, -200.0]])
    value = objectives.lk_alpha(Distributions(log_q.log_softmax(-1), log_p, log_p))
    assert float(value) == pytest.approx(200 - math.log(2), abs=1e-3)
    value.sum().backward()
    assert log_q.grad is not None and log_q.grad.isfinite().all() and log_q.grad[0, 0] < 0
