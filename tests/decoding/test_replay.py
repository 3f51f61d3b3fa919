"""Replay: against a slow reference, real decoding of toys, and the estimates of other tools."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from specforge.decoding.replay import AcceptanceLength, figures, find_turns, replay


def slow_rounds(acceptance: list[list[float]], chain: int) -> float:
    """The renewal equation of one turn, from end to start: expected rounds from each anchor."""
    anchors = len(acceptance)
    rounds = [0.0] * (anchors + chain + 2)
    for anchor in reversed(range(anchors)):
        reached, expected = 1.0, 1.0
        for step in range(chain):
            if anchor + step >= anchors:
                break
            accepted = acceptance[anchor][step]
            expected += reached * (1 - accepted) * rounds[anchor + step + 1]
            reached *= accepted
        rounds[anchor] = expected + reached * rounds[min(anchor + chain + 1, anchors)]
    return rounds[0]


def simulated(acceptance: torch.Tensor, chain: int, runs: int) -> tuple[float, list[float]]:
    """Simulate decoding of one turn many times: rounds and, by position, rounds that accepted at least that many."""
    generator = torch.Generator().manual_seed(0)
    rounds, reached = 0, [0] * chain
    for _ in range(runs):
        index = 0
        while index < len(acceptance):
            accepted = 0
            while accepted < chain and index + accepted < len(acceptance):
                if torch.rand((), generator=generator) >= acceptance[index, accepted]:
                    break
                accepted += 1
            # The turn's last token counts as the verifier's own.
            accepted = min(accepted, len(acceptance) - index - 1)
            rounds += 1
            for position in range(accepted):
                reached[position] += 1
            index += accepted + 1
    return rounds / runs, [result / runs for result in reached]


@given(st.integers(0, 2**31 - 1), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.integers(1, 5))
def test_rounds_are_those_of_the_renewal_equation(seed, lengths, steps):
    generator = torch.Generator().manual_seed(seed)
    acceptance = torch.rand(len(lengths), max(lengths), steps, generator=generator, dtype=torch.float64)
    acceptance[torch.rand(acceptance.shape, generator=generator) < 0.2] = 1.0
    found = replay(acceptance, torch.tensor(lengths))
    for chain in range(1, steps + 1):
        turns = [row[:length].tolist() for row, length in zip(acceptance, lengths, strict=True)]
        assert float(found.rounds[chain - 1]) == pytest.approx(sum(slow_rounds(turn, chain) for turn in turns))
    assert int(found.tokens) == sum(lengths)


@given(st.integers(0, 2**31 - 1), st.integers(1, 12), st.integers(1, 5))
def test_every_round_yields_one_more_than_it_accepts(seed, length, steps):
    acceptance = torch.rand(1, length, steps, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    found = replay(acceptance, torch.tensor([length]))
    for chain in range(1, steps + 1):
        accepted = found.accepted[chain - 1]
        assert float(found.rounds[chain - 1] + accepted.sum()) == pytest.approx(length)
        assert not accepted[chain:].any()


def test_rates_by_position_are_those_of_a_simulation():
    acceptance = torch.rand(7, 3, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    found = replay(acceptance[None], torch.tensor([7]))
    rounds, reached = simulated(acceptance, 3, 4000)
    assert float(found.rounds[2]) == pytest.approx(rounds, rel=0.03)
    assert found.accepted[2].tolist() == pytest.approx(reached, rel=0.06)


def test_a_certain_draft_needs_a_round_for_every_k_plus_one_tokens():
    found = replay(torch.ones(1, 10, 4), torch.tensor([10]))
    assert found.rounds.tolist() == [5, 4, 3, 2]
    useless = replay(torch.zeros(1, 10, 4), torch.tensor([10]))
    assert useless.rounds.tolist() == [10, 10, 10, 10] and not useless.accepted.any()


def test_values_beyond_a_turn_are_not_read():
    acceptance = torch.rand(2, 6, 3)
    first = replay(acceptance, torch.tensor([4, 6]))
    acceptance[0, 4:] = torch.nan
    acceptance[0, 3, 1:] = torch.nan
    assert torch.equal(first.rounds, replay(acceptance, torch.tensor([4, 6])).rounds)


def test_the_mean_over_all_anchors_differs():
    # Text with hard and easy spans: more rounds begin in the hard ones.
    acceptance = torch.full((1, 200, 4), 0.95, dtype=torch.float64)
    acceptance[:, 50:150] = 0.1
    found = replay(acceptance, torch.tensor([200]))
    exact = float(found.tokens / found.rounds[3])
    mean_over_anchors = float(1 + acceptance.cumprod(-1).sum(-1).mean())
    assert mean_over_anchors > 1.3 * exact


def test_turns_are_unbroken_runs_within_a_row():
    reachable = torch.tensor([[0, 1, 1, 0, 1], [1, 0, 0, 1, 1]], dtype=torch.bool)
    starts, lengths = find_turns(reachable)
    assert (starts.tolist(), lengths.tolist()) == ([1, 4, 5, 8], [2, 1, 1, 2])


def test_batches_add_up():
    generator = torch.Generator().manual_seed(5)
    acceptance = torch.rand(3, 4, 12, generator=generator)
    reachable = torch.rand(4, 12, generator=generator) < 0.7
    full, parts = AcceptanceLength(3), [AcceptanceLength(3), AcceptanceLength(3)]
    full.update(acceptance, reachable)
    parts[0].update(acceptance[:, :1], reachable[:1])
    parts[1].update(acceptance[:, 1:], reachable[1:])
    # As torchmetrics does across ranks with summed states.
    for name in ("tokens", "rounds", "accepted"):
        setattr(parts[0], name, getattr(parts[0], name) + getattr(parts[1], name))
    for chain, expected in full.compute().items():
        assert parts[0].compute()[chain] == pytest.approx(expected)


def test_nothing_reachable_gives_no_figures():
    metric = AcceptanceLength(3)
    metric.update(torch.rand(3, 2, 5), torch.zeros(2, 5, dtype=torch.bool))
    assert metric.compute() == {}


def test_figures_by_hand():
    assert figures(tokens=10, rounds=4, accepted=[3, 3, 0]) == {
        "acceptance_length": 2.5,
        "accept_rate_pos_1": 0.75,
        "accept_rate_cond_1": 0.75,
        "accept_rate_pos_2": 0.75,
        "accept_rate_cond_2": 1.0,
        "accept_rate_pos_3": 0.0,
        "accept_rate_cond_3": 0.0,
    }


def _rank(rank: int, folder: str) -> None:
    """One of two processes; the second has no turns."""
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2)
    acceptance, reachable = _example()
    metric = AcceptanceLength(3)
    if rank == 0:
        metric.update(acceptance, reachable)
    else:
        metric.update(acceptance, torch.zeros_like(reachable))
    torch.save(metric.compute(), f"{folder}/{rank}.pt")
    torch.distributed.destroy_process_group()


def _example() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(8)
    return torch.rand(3, 2, 12, generator=generator), torch.rand(2, 12, generator=generator) < 0.8


def test_two_processes_agree_on_the_total(tmp_path):
    torch.multiprocessing.spawn(_rank, args=(str(tmp_path),), nprocs=2)
    full = AcceptanceLength(3)
    full.update(*_example())
    for rank in (0, 1):
        assert torch.load(tmp_path / f"{rank}.pt", weights_only=True) == full.compute()
