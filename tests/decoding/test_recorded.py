"""Acceptance on recorded texts: against real decoding, and against probabilities computed one by one."""

from __future__ import annotations

import pytest
import torch
from random_verifiers import VOCABULARY
from small_models import CONFIGS, learn, random_draft, random_model

from specforge.decoding.loop import Decoder
from specforge.decoding.recorded import chain_acceptance, draft_indices, replay_text
from specforge.decoding.replay import replay
from specforge.models.speculator import SpeculatorModel
from specforge.proposals import (
    DynamicTreeTokenProposalConfig,
    GreedyTokenProposalConfig,
    PromptLookupTokenProposalConfig,
    SamplingTokenProposalConfig,
    StaticTreeTokenProposalConfig,
)
from specforge.sampling import RandomSource, Sampling
from specforge.verifier.features import capture

STEPS = 4
NEW = 20


@pytest.fixture(scope="module")
def verifier():
    return random_model(CONFIGS["qwen3"](), seed=3, scale=0.5)


@pytest.fixture(scope="module")
def prompts():
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(1, VOCABULARY, (length,), generator=generator) for length in (2, 5, 9, 3)]


def verifier_texts(verifier, prompts, sampling, seed=0):
    """Each prompt with the verifier's own output."""
    texts = [prompt.tolist() for prompt in prompts]
    for emission in Decoder(verifier, sampling=sampling).decode(prompts, NEW, seed):
        texts[emission.sequence] += emission.tokens
    return [torch.tensor(text) for text in texts]


@pytest.fixture(scope="module", params=[None, 12], ids=["full vocabulary", "pruned"])
def draft(request, verifier, prompts):
    draft = random_draft(verifier, seed=2, size=request.param)
    if request.param is None:
        learn(draft, verifier, verifier_texts(verifier, prompts, Sampling()), updates=25)
    return draft


def features_of(verifier, draft, text):
    return capture(verifier, text[None], torch.arange(len(text))[None], draft.aux_layers)


def rounds_of(decoder, prompts):
    """Rounds of each sequence of a real decoding, as proposed and accepted tokens."""
    found = [[] for _ in prompts]
    for emission in decoder.decode(prompts, NEW):
        if emission.drafted is not None:
            found[emission.sequence].append((emission.drafted, emission.accepted))
    return found


@pytest.mark.parametrize("chain", [1, 2, STEPS])
def test_greedy_chains_take_the_rounds_of_real_decoding(verifier, draft, prompts, chain):
    decoder = Decoder(verifier, draft, GreedyTokenProposalConfig(speculative_tokens=chain))
    real = rounds_of(decoder, prompts)
    for prompt, text, rounds in zip(prompts, verifier_texts(verifier, prompts, Sampling()), real, strict=True):
        greedy, drawn = chain_acceptance(
            draft, decoder.parts, text, features_of(verifier, draft, text), len(prompt), STEPS, Sampling()
        )
        assert torch.equal(greedy, drawn)
        found = replay(greedy.T[None], torch.tensor([len(text) - 1 - len(prompt)]))
        assert int(found.tokens) == sum(1 + accepted for _, accepted in rounds)
        assert float(found.rounds[chain - 1]) == len(rounds)
        for position in range(1, chain + 1):
            assert float(found.accepted[chain - 1, position - 1]) == sum(count >= position for _, count in rounds)


@pytest.mark.parametrize(
    "proposal",
    [
        GreedyTokenProposalConfig(speculative_tokens=3),
        StaticTreeTokenProposalConfig(initial_branching_factor=3, branching_factor=2, depth=3),
        DynamicTreeTokenProposalConfig(speculative_tokens=9, expansion_factor=3, depth=4),
        PromptLookupTokenProposalConfig(),
    ],
    ids=lambda config: config.proposal_type,
)
def test_every_fixed_method_takes_the_rounds_of_real_decoding(verifier, draft, prompts, proposal):
    decoder = Decoder(verifier, draft, proposal)
    real = rounds_of(decoder, prompts)
    proposer = decoder._proposer(proposal, Sampling(), RandomSource())
    for prompt, text, rounds in zip(prompts, verifier_texts(verifier, prompts, Sampling()), real, strict=True):
        drafter = draft.drafter(1) if proposer.needs_draft else None
        assert replay_text(proposer, drafter, text, features_of(verifier, draft, text), len(prompt)) == rounds


@pytest.mark.parametrize("sampling", [Sampling(temperature=1.0), Sampling(temperature=0.6, top_k=9, top_p=0.9)])
def test_acceptance_is_the_ratio_of_both_probabilities(verifier, draft, prompts, sampling):
    """Each probability separately: one full verifier forward pass, and the draft stepped along the text."""
    prompt = prompts[1]
    text = verifier_texts(verifier, [prompt], sampling, seed=5)[0]
    features = features_of(verifier, draft, text)
    decoder = Decoder(verifier, sampling=sampling)
    greedy, drawn = chain_acceptance(draft, decoder.parts, text, features, len(prompt), STEPS, sampling)
    p = sampling.log_probs(verifier(text[None]).logits[0]).exp()
    ids = list(range(VOCABULARY)) if draft.draft_ids is None else draft.draft_ids.tolist()
    for anchor in range(len(text) - 1 - len(prompt)):
        drafter = draft.drafter(1)
        root = len(prompt) + anchor
        committed = type(features)(features.aux[:, :root], features.last[:, :root])
        with torch.no_grad():
            drafter.commit(text[None, 1 : root + 1], committed, torch.tensor([root]))
            logits = drafter.root
            for step in range(STEPS):
                index = root + 1 + step
                if index >= len(text):
                    break
                token = int(text[index])
                q = sampling.log_probs(logits)[0].exp()
                of_draft = float(q[ids.index(token)]) if token in ids else 0.0
                assert float(drawn[step, anchor]) == pytest.approx(
                    min(1.0, of_draft / float(p[index - 1, token])), abs=1e-5
                )
                assert float(greedy[step, anchor]) == float(ids[int(logits.argmax())] == token)
                logits = drafter.step(torch.tensor([[token]]), torch.tensor([[step - 1]]))[:, 0]


def test_replay_of_sampled_text_equals_sampled_decoding(verifier, draft):
    """The mean over many sampled texts equals the mean over many real decodings, within the errors of both."""
    sampling = Sampling(temperature=0.9)
    decoder = Decoder(verifier, draft, SamplingTokenProposalConfig(speculative_tokens=3), sampling)
    copies = [torch.tensor([7, 3, 11])] * 200
    real = torch.tensor([len(rounds) for rounds in rounds_of(decoder, copies)], dtype=torch.float64)
    replayed = []
    for text in verifier_texts(verifier, copies, sampling, seed=9):
        _, drawn = chain_acceptance(draft, decoder.parts, text, features_of(verifier, draft, text), 3, 3, sampling)
        replayed.append(float(replay(drawn.T[None], torch.tensor([drawn.shape[1]])).rounds[2]))
    expected = torch.tensor(replayed, dtype=torch.float64)
    error = (real.var() / len(real) + expected.var() / len(expected)).sqrt()
    assert abs(float(real.mean() - expected.mean())) < 3.5 * float(error)


def test_indices_in_the_draft_vocabulary():
    ids = torch.tensor([2, 5, 6])
    assert draft_indices(torch.tensor([5, 0, 6, 9, 2]), ids).tolist() == [1, -1, 2, -1, 0]
    assert draft_indices(torch.tensor([5, 0]), None).tolist() == [5, 0]


def test_a_draft_that_cannot_step_is_rejected():
    from specforge.config import SpeculatorModelConfig
    from specforge.errors import UsageError

    draft = SpeculatorModel(SpeculatorModelConfig(speculators_model_type="x"))
    with pytest.raises(UsageError, match="cannot draft step by step"):
        draft.drafter(1)
    with pytest.raises(UsageError, match="cannot be replayed"):
        draft.unroll(*[torch.zeros(1, 2, dtype=torch.int64)] * 4, 1)
