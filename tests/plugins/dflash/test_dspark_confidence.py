"""DSpark's confidence: calibrated slot by slot, and used to cut chains without loss."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from block_drafts import random_draft
from torch import Tensor
from transformers import PreTrainedModel

from specforge.decoding.loop import Decoder, Emission
from specforge.errors import UsageError
from specforge.proposals.choice import choose_proposal
from specforge.sampling import Sampling
from specforge.training.module import Drafted
from specforge_dflash.calibration import GRID, ConfidenceRecord
from specforge_dflash.confident_chain import ConfidentChainTokenProposalConfig
from specforge_dflash.config import DSparkSpeculatorConfig

VerifierOf = Callable[[str], PreTrainedModel]
STEPS, ROWS = 3, 4000


def record(sharpness: list[float], parts: int = 1) -> tuple[ConfidenceRecord, Tensor, Tensor, Tensor]:
    """Log-odds that are too sharp by a factor for each slot, and the acceptance; each row reaches fewer slots."""
    generator = torch.Generator().manual_seed(0)
    true = torch.randn(STEPS, ROWS, generator=generator)
    accepted = (torch.rand(STEPS, ROWS, generator=generator) < true.sigmoid()).float()
    log_odds = true * torch.tensor(sharpness)[:, None]
    counted = torch.arange(ROWS) < torch.tensor([ROWS, 3000, 2500])[:, None]
    made = ConfidenceRecord()
    for part in torch.arange(ROWS).chunk(parts):
        own = counted[:, part]
        state_index = torch.full(own.shape, -1)
        state_index[own] = torch.arange(int(own.sum()))
        states = torch.stack([torch.zeros(int(own.sum())), log_odds[:, part][own]], dim=1)
        made.add(Drafted(states, state_index, state_index, own), accepted[:, part])
    return made, log_odds, accepted, counted


def slow_error(log_odds: Tensor, accepted: Tensor, counted: Tensor, temperatures: list[float]) -> float:
    """Expected calibration error by its definition, pair by pair: 15 bins of equal width, all slots pooled."""
    survival = (log_odds / torch.tensor(temperatures)[:, None]).sigmoid().cumprod(0)
    gaps = 0.0
    for step in range(STEPS):
        pairs = [(float(survival[step, row]), float(accepted[: step + 1, row].prod())) for row in range(ROWS)]
        chosen = [pair for pair, counts in zip(pairs, counted[step].tolist(), strict=True) if counts]
        for number in range(15):
            inside = [pair for pair in chosen if min(int(pair[0] * 15), 14) == number]
            gaps += abs(sum(chance for chance, _ in inside) - sum(other for _, other in inside))
    return gaps / int(counted.sum())


def test_temperatures_correct_a_confidence_that_is_too_sharp() -> None:
    made, log_odds, accepted, counted = record([2.0, 4.0, 0.5])
    found = made.calibrated()
    for temperature, sharpness in zip(found.temperatures, [2.0, 4.0, 0.5], strict=True):
        assert sharpness / 1.3 < temperature < sharpness * 1.3
    assert found.raw_error == pytest.approx(slow_error(log_odds, accepted, counted, [1.0] * STEPS), abs=1e-4)
    assert found.error == pytest.approx(slow_error(log_odds, accepted, counted, found.temperatures), abs=1e-4)
    assert found.error < 0.02 < 0.05 < found.raw_error


def test_batches_add_up_and_slots_without_data_keep_their_confidence() -> None:
    at_once, parts = (record([2.0, 1.0, 1.0], parts)[0].calibrated() for parts in (1, 7))
    assert at_once == parts
    empty = ConfidenceRecord()
    nothing = torch.zeros(STEPS, 5, dtype=torch.bool)
    empty.add(Drafted(torch.zeros(1, 2), torch.zeros(STEPS, 5, dtype=torch.int64), nothing, nothing), nothing.float())
    assert empty.calibrated().temperatures == [1.0] * STEPS and 1.0 in GRID


def decode(verifier: PreTrainedModel, *speculation: Any, sampling: Sampling | None = None) -> list[Emission]:
    decoder = Decoder(verifier, *speculation, sampling=sampling, stop_tokens=[])
    return list(decoder.decode([torch.tensor([3, 4, 5]), torch.tensor([9])], 20, seed=0))


def texts(emissions: list[Emission]) -> list[list[int]]:
    return [
        [token for emission in emissions if emission.sequence == number for token in emission.tokens]
        for number in (0, 1)
    ]


@pytest.mark.parametrize("kind", ["dspark", "dspark, gated", "dspark, rnn"])
def test_the_chain_is_cut_and_the_text_stays_the_verifiers(kind: str, verifier_of: VerifierOf) -> None:
    verifier = verifier_of("llama")
    draft = random_draft(verifier, kind)
    expected = texts(decode(verifier))
    drafted = []
    for threshold in (0.0, 0.2, 1.0):
        proposal = ConfidentChainTokenProposalConfig(speculative_tokens=4, threshold=threshold)
        emissions = decode(verifier, draft, proposal)
        assert texts(emissions) == expected
        assert len(texts(decode(verifier, draft, proposal, sampling=Sampling(temperature=1.0)))[0]) == 20
        drafted.append(sum(emission.drafted for emission in emissions if emission.drafted is not None))
    assert drafted[0] > drafted[1] > drafted[2] == 0


@torch.no_grad()
def test_a_chain_ends_before_the_first_token_that_is_unlikely_to_survive(verifier_of: VerifierOf) -> None:
    verifier = verifier_of("llama")
    draft = random_draft(verifier, "dspark")
    draft.config.confidence_temperatures = [2.0, 0.5, 1.0, 3.0]
    states = torch.randn(2, 4, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    drafter = draft.drafter(2)
    drafter.states = states
    before = torch.tensor([[1, 2, 3], [4, 5, 6]])
    embedded = draft.markov_head.markov_w1(before)
    weight, bias = draft.confidence_head.proj.weight[0], draft.confidence_head.proj.bias
    log_odds = torch.cat([states[:, :3], embedded], dim=-1) @ weight + bias
    expected = (log_odds / torch.tensor([2.0, 0.5, 1.0])).sigmoid().cumprod(1)
    torch.testing.assert_close(drafter.survival(before), expected)


def test_a_draft_without_a_confidence_is_refused(verifier_of: VerifierOf) -> None:
    verifier = verifier_of("llama")
    draft = random_draft(verifier, "dspark", enable_confidence_head=False)
    with pytest.raises(UsageError, match="this draft has no confidence head; train it with"):
        decode(verifier, draft, ConfidentChainTokenProposalConfig(speculative_tokens=4))


def test_other_drafts_are_refused(verifier_of: VerifierOf) -> None:
    verifier = verifier_of("llama")
    with pytest.raises(UsageError, match="dflash drafts do not support the proposal method 'confident_chain'"):
        decode(verifier, random_draft(verifier, "dflash"), ConfidentChainTokenProposalConfig())


def test_it_is_chosen_by_name_and_never_stored(verifier_of: VerifierOf) -> None:
    draft = random_draft(verifier_of("llama"), "dspark")
    assert isinstance(choose_proposal("confident_chain:threshold=0.5", draft.config), ConfidentChainTokenProposalConfig)
    assert "confident_chain" not in str(draft.stored_config())


def test_there_is_one_temperature_for_each_token() -> None:
    with pytest.raises(ValueError, match="one for each of the 8 drafted tokens"):
        DSparkSpeculatorConfig(mask_token_id=3, confidence_temperatures=[1.0])
