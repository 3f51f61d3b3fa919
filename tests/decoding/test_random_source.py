from __future__ import annotations

from itertools import permutations

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from specforge.sampling import RandomSource, Sampling

NUMBER = 20000


def rng(seed: int = 0) -> RandomSource:
    return RandomSource(torch.Generator().manual_seed(seed))


def assert_shares(drawn: Tensor, distribution: dict[tuple[int, ...], float]) -> None:
    """Rows of draws have the given probabilities, within five standard deviations."""
    rows, counts = drawn.unique(dim=0, return_counts=True)
    seen = {tuple(row): count for row, count in zip(rows.tolist(), counts.tolist(), strict=True)}
    assert not seen.keys() - distribution.keys()
    for row, probability in distribution.items():
        deviation = (len(drawn) * probability * (1 - probability)) ** 0.5
        assert abs(seen.get(row, 0) - len(drawn) * probability) < 5 * deviation + 1, row


def test_certain_events_happen_and_impossible_ones_do_not() -> None:
    assert rng().bernoulli(torch.ones(NUMBER)).all()
    assert not rng().bernoulli(torch.zeros(NUMBER)).any()
    assert rng().bernoulli(torch.full((NUMBER,), 7.0)).all()
    assert not rng().bernoulli(torch.full((3, 2), float("nan"))).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_events_have_the_given_probabilities(dtype: torch.dtype) -> None:
    happened = rng().bernoulli(torch.tensor([0.1, 0.5, 0.93], dtype=dtype).expand(NUMBER, 3))
    assert happened.dtype == torch.bool
    for index, probability in enumerate([0.1, 0.5, 0.93]):
        assert_shares(happened[:, [index]].long(), {(0,): 1 - probability, (1,): probability})


def test_tokens_have_the_given_probabilities() -> None:
    probabilities = torch.tensor([[0.2, 0.0, 0.5, 0.3], [0.0, 1.0, 0.0, 0.0]])
    drawn = rng().categorical(probabilities.expand(NUMBER, 2, 4))
    assert drawn.shape == (NUMBER, 2)
    assert (drawn[:, 1] == 1).all()
    assert_shares(drawn[:, :1], {(0,): 0.2, (2,): 0.5, (3,): 0.3})


def test_draws_without_replacement_have_the_right_distribution() -> None:
    q = [0.5, 0.2, 0.25, 0.05]
    for number in (1, 2, 4):
        drawn = rng().draw_without_replacement(torch.tensor(q).log().expand(NUMBER, 4), number)
        distribution = {}
        for order in permutations(range(4), number):
            distribution[order], left = 1.0, 1.0
            for token in order:
                distribution[order] *= q[token] / left
                left -= q[token]
        assert_shares(drawn, distribution)


def test_indices_of_probability_0_are_drawn_last() -> None:
    log_probs = torch.tensor([[0.5, 0.0, 0.5, 0.0], [0.0, 0.0, 0.0, 1.0]]).log()
    drawn = rng().draw_without_replacement(log_probs.expand(500, 2, 4), 4)
    assert drawn.shape == (500, 2, 4)
    assert (drawn.sort(dim=-1).values == torch.arange(4)).all()
    assert set(drawn[:, 0, :2].flatten().tolist()) == {0, 2}
    assert (drawn[:, 1, 0] == 3).all()


def test_a_seed_determines_all_draws() -> None:
    probabilities = torch.rand(50, 9, generator=torch.Generator().manual_seed(0))
    for draw in (
        lambda source: source.bernoulli(probabilities),
        lambda source: source.categorical(probabilities),
        lambda source: source.draw_without_replacement(probabilities.log(), 3),
    ):
        assert torch.equal(draw(rng(1)), draw(rng(1)))
        assert not torch.equal(draw(rng(1)), draw(rng(2)))


def test_the_greedy_choice_breaks_ties_by_the_lowest_id() -> None:
    logits = torch.tensor([[1.0, 3.0, 3.0, 2.0], [5.0, 5.0, 5.0, 5.0]])
    assert Sampling().is_greedy
    assert Sampling().choose(logits, rng()).tolist() == [1, 0]


@pytest.mark.parametrize("shape", [(6,), (2, 6), (2, 3, 6)])
def test_logits_may_have_any_number_of_dimensions(shape: tuple[int, ...]) -> None:
    logits = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sampling = Sampling(temperature=0.7, top_k=4, top_p=0.9)
    log_probs = sampling.log_probs(logits)
    assert log_probs.shape == shape
    torch.testing.assert_close(log_probs.exp().sum(-1), torch.ones(shape[:-1]))
    assert sampling.choose(logits, rng()).shape == shape[:-1]


def test_narrow_dtypes_are_widened() -> None:
    logits = torch.randn(2, 6)
    assert Sampling(temperature=1.0).log_probs(logits.bfloat16()).dtype == torch.float32
    assert Sampling(temperature=1.0).log_probs(logits.double()).dtype == torch.float64


def test_equally_probable_tokens_are_kept_together() -> None:
    logits = torch.tensor([[2.0, 1.0, 1.0, 0.0]])
    assert (Sampling(temperature=1.0, top_k=2).log_probs(logits).exp() > 0).tolist() == [[True, True, True, False]]


@pytest.mark.parametrize("wrong", [{"temperature": -0.1}, {"top_k": -1}, {"top_p": 0.0}, {"top_p": 1.1}, {"top": 1}])
def test_wrong_settings_are_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError):
        Sampling(**wrong)
