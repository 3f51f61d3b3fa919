"""The loss by kernels against float64 and the plain path, run by ``test_kernels.py`` in Triton's interpreter."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from test_distillation import NAMES, Problem, by_pair, make_problem, plain, run
from torch import Tensor

from specforge.sampling import Sampling
from specforge.training.losses import triton_rows
from specforge.training.losses.chunks import for_accelerator
from specforge.training.losses.comparison import weighted
from specforge.training.losses.distillation import DraftSteps, Labels, distill
from specforge.training.losses.fused import FusedPairs, why_not_fused
from specforge.training.losses.named import objective_terms
from specforge.training.losses.objectives import Distributions
from specforge.training.losses.targets import FusedTarget

MIXTURE = {name: 0.5 + number for number, name in enumerate(NAMES)}
EVERY = MIXTURE | {"top_k": 1.5}


@pytest.fixture(autouse=True)
def accelerator(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Losses are computed as on a GPU, with few columns at a time."""
    monkeypatch.setattr(triton_rows, "BLOCK", 8)
    token = for_accelerator.set(True)
    yield
    for_accelerator.reset(token)


def in_float32(problem: Problem) -> Problem:
    parts = problem.teacher.parts
    narrow = replace(parts, norm=deepcopy(parts.norm).float(), lm_head=deepcopy(parts.lm_head).float())
    assert isinstance(problem.head, Tensor)
    return replace(
        problem,
        hidden=problem.hidden.detach().float().requires_grad_(),
        head=problem.head.detach().float().requires_grad_(),
        teacher=replace(problem.teacher, last=problem.teacher.last.float(), parts=narrow),
        weights=problem.weights.float(),
    )


@pytest.mark.parametrize(
    ("pruned", "objective", "weighting"),
    [(True, MIXTURE, None), (False, MIXTURE, "dpace"), (True, {"total_variation": 1.0}, "vat")],
    ids=["pruned", "full, with dpace", "vat"],
)
def test_losses_and_gradients_are_those_of_float64(
    pruned: bool, objective: dict[str, float], weighting: str | None
) -> None:
    exact = make_problem(pruned=pruned)
    problem = in_float32(exact)
    assert why_not_fused(problem.hidden.device, torch.float32, objective_terms(objective), None) is None
    expected = plain(exact, objective, weighting)
    (expected["hidden"], expected["head"]) = torch.autograd.grad(expected["loss"], [exact.hidden, exact.head])
    outcome = run(problem, objective, weighting=weighting)
    gradients = torch.autograd.grad(outcome.loss, [problem.hidden, problem.head])
    found = {"loss": outcome.loss, "hidden": gradients[0], "head": gradients[1], "acceptance": outcome.acceptance}
    for name, one in (found | dict(outcome.terms)).items():
        wanted = expected[name] if name in expected else expected["terms"][name]
        torch.testing.assert_close(one.double(), wanted.double(), rtol=2e-6, atol=2e-6, msg=name)
    torch.testing.assert_close(outcome.agreement, expected["agreement"])


class Pairs:
    """Random pairs of a draft's logits and targets, by the kernels and in float64."""

    def __init__(self, seed: int, pairs: int, draft: int, outside: int, dtype: torch.dtype, scale: float = 3.0) -> None:
        generator = torch.Generator().manual_seed(seed)
        targets = 2
        self.logits = (scale * torch.randn(pairs, draft, generator=generator)).to(dtype)
        self.verifier = (scale * torch.randn(targets, draft + outside, generator=generator)).to(dtype)
        ids = torch.randperm(draft + outside, generator=generator)[:draft].sort().values
        self.ids = ids if outside else None
        self.target_of = torch.randint(targets, (pairs,), generator=generator)
        self.text = torch.randint(-1, draft, (pairs,), generator=generator)
        self.mean, self.weights = torch.rand(2, pairs, generator=generator)

    def fused(self, objective: dict[str, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the terms' values, acceptance, the draft's top token and the gradient."""
        target = FusedTarget.of(self.verifier, self.ids, None)
        logits = self.logits.clone()
        pairs = FusedPairs(logits, target, self.target_of, self.text, self.mean)
        loss, values = weighted(objective_terms(objective), pairs.sums, self.weights)
        pairs.differentiate(loss)
        return values, pairs.sums.acceptance.detach(), pairs.sums.top, logits

    def exact(self, objective: dict[str, float]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Return the same in float64."""
        leaf = self.logits.double().requires_grad_()
        full = self.verifier.double().log_softmax(-1)[:, slice(None) if self.ids is None else self.ids]
        log_p = full.log_softmax(-1)[self.target_of]
        rows = Distributions(leaf.log_softmax(-1), log_p, full[self.target_of], self.mean, self.text)
        loss, values = weighted(objective_terms(objective), rows, self.weights.double())
        return values, rows.acceptance.detach(), rows.top, torch.autograd.grad(loss, leaf)[0]


@pytest.mark.parametrize("name", EVERY)
def test_each_loss(name: str) -> None:
    pairs = Pairs(seed=3, pairs=3, draft=13, outside=5, dtype=torch.float32)
    for found, expected in zip(pairs.fused({name: 1.0}), pairs.exact({name: 1.0}), strict=True):
        torch.testing.assert_close(found.to(expected.dtype), expected, rtol=3e-6, atol=1e-6)


@settings(max_examples=6, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    pairs=st.integers(0, 3),
    draft=st.integers(1, 20),
    outside=st.sampled_from([0, 1, 7]),
    scale=st.sampled_from([0.1, 5.0, 40.0]),
)
def test_any_shape(seed: int, pairs: int, draft: int, outside: int, scale: float) -> None:
    """Distributions that are flat, and so sharp that probabilities underflow."""
    some = Pairs(seed, pairs, draft, outside, torch.float32, scale)
    for found, expected in zip(some.fused(EVERY), some.exact(EVERY), strict=True):
        torch.testing.assert_close(found.to(expected.dtype), expected, rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("outside", [0, 6])
def test_bfloat16_rounds_only_the_gradient(outside: int) -> None:
    pairs = Pairs(seed=1, pairs=3, draft=21, outside=outside, dtype=torch.bfloat16)
    (values, accepted, top, gradient), (exact_values, exact_accepted, exact_top, exact_gradient) = (
        pairs.fused(EVERY),
        pairs.exact(EVERY),
    )
    torch.testing.assert_close(values.double(), exact_values, rtol=3e-6, atol=1e-6)
    torch.testing.assert_close(accepted.double(), exact_accepted, rtol=3e-6, atol=1e-6)
    assert torch.equal(top, exact_top)
    assert gradient.dtype == torch.bfloat16
    # Triton's interpreter cuts digits off, GPUs round.
    torch.testing.assert_close(gradient.double(), exact_gradient, rtol=2**-7, atol=1e-6)


def test_logits_that_are_not_finite_make_the_loss_so() -> None:
    pairs = Pairs(seed=0, pairs=3, draft=9, outside=0, dtype=torch.float32)
    for number, bad in enumerate((torch.nan, torch.inf)):
        pairs.logits[number, 4] = bad
    values, *_ = pairs.fused({"kl": 1.0})
    assert values[0].isfinite().tolist() == [False, False, True]


def softly_capped(logits: Tensor) -> Tensor:
    return torch.tanh((logits + 0.5) / 3.0) * 3.0


def test_logits_may_be_finished_and_steps_have_their_own_heads() -> None:
    problem = in_float32(make_problem(pruned=False))
    assert isinstance(problem.head, Tensor)
    heads = [problem.head.detach() * factor for factor in (1.0, 0.7, 1.3)]

    def outcome() -> tuple[DraftSteps, list[Tensor]]:
        own = [one.clone().requires_grad_() for one in heads]
        steps = distill(
            *(problem.hidden, own, problem.teacher, problem.targets, problem.supervised),
            objective_terms({"kl": 1.0, "lk_lambda": 1.0}),
            by_pair(problem),
            labels=Labels(problem.tokens, Sampling(temperature=0.8)),
            finish=softly_capped,
            candidates=2,
        )
        return steps, list(torch.autograd.grad(steps.loss, [problem.hidden, *own]))

    found, gradients = outcome()
    token = for_accelerator.set(False)
    expected, expected_gradients = outcome()
    for_accelerator.reset(token)
    torch.testing.assert_close(gradients, expected_gradients, rtol=2e-5, atol=2e-6)
    for name in ("loss", "acceptance", "agreement", "matches", "drawn"):
        torch.testing.assert_close(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6, msg=name)
    for name in ("candidates", "verifier_tops", "supervised"):
        assert torch.equal(getattr(found, name), getattr(expected, name))


def test_nothing_keeps_the_logits_of_a_chunk() -> None:
    """Not even a cycle of references, which would wait for the garbage collector."""
    some = Pairs(seed=0, pairs=2, draft=9, outside=3, dtype=torch.float32)
    target, logits = FusedTarget.of(some.verifier, some.ids, None), some.logits.clone()
    pairs, kept = FusedPairs(logits, target, some.target_of, some.text, some.mean), weakref.ref(logits)
    loss, _ = weighted(objective_terms({"top_k": 1.0}), pairs.sums, some.weights)
    pairs.differentiate(loss)
    gc.disable()
    del logits, pairs, loss
    gone = kept() is None
    gc.enable()
    assert gone


def test_without_gradients_nothing_is_overwritten() -> None:
    problem = in_float32(make_problem())
    with torch.no_grad():
        outcome = run(problem, {"kl": 1.0})
    assert not outcome.loss.requires_grad
    torch.testing.assert_close(outcome.loss, run(problem, {"kl": 1.0}).loss.detach())


def test_nothing_supervised_costs_nothing() -> None:
    problem = in_float32(make_problem())
    outcome = run(replace(problem, supervised=torch.zeros_like(problem.supervised)), {"lk_lambda": 1.0})
    outcome.loss.backward()
    assert float(outcome.loss) == 0
    assert problem.hidden.grad is not None and not problem.hidden.grad.any()
