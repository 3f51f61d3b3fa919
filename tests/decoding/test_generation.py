"""``SpeculatorModel.generate``, with the interface of transformers' ``generate``."""

from __future__ import annotations

import pytest
import torch
from random_verifiers import VOCABULARY
from small_models import CONFIGS, random_draft, random_model

from specforge.errors import UsageError
from specforge.proposals import StaticTreeTokenProposalConfig
from specforge.sampling import Sampling


@pytest.fixture(scope="module")
def verifier():
    return random_model(CONFIGS["llama"](), seed=3, scale=0.5)


@pytest.fixture(scope="module")
def draft(verifier):
    return random_draft(verifier)


@pytest.fixture(scope="module")
def batch():
    """Three prompts, padded on the left."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, VOCABULARY, (3, 6), generator=generator)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1], [0, 0, 0, 0, 1, 1]])
    return ids * mask, mask


@pytest.mark.parametrize("proposal", [None, "dynamic_tree:depth=3", StaticTreeTokenProposalConfig(depth=2)])
def test_output_equals_the_verifiers(verifier, draft, batch, proposal):
    ids, mask = batch
    ours = draft.generate(ids, mask, max_new_tokens=12, proposal=proposal)
    theirs = verifier.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)
    assert torch.equal(ours, theirs)


def test_ends_at_stop_tokens_and_pads(verifier, draft, batch):
    ids, mask = batch
    free = verifier.generate(ids, attention_mask=mask, max_new_tokens=12, do_sample=False)[:, ids.shape[1] :]
    stops = [int(free[0, 3]), int(free[1, 5])]
    ours = draft.generate(ids, mask, max_new_tokens=12, eos_token_id=stops, pad_token_id=VOCABULARY - 1)
    theirs = verifier.generate(
        ids, attention_mask=mask, max_new_tokens=12, do_sample=False, eos_token_id=stops, pad_token_id=VOCABULARY - 1
    )
    assert torch.equal(ours, theirs)


def test_right_padding_and_no_mask_are_supported(verifier, draft):
    ids = torch.tensor([[4, 9, 2], [7, 3, 0]])
    both = draft.generate(ids, torch.tensor([[1, 1, 1], [1, 1, 0]]), max_new_tokens=6)
    assert torch.equal(both[0], draft.generate(ids[:1], max_new_tokens=6)[0])
    assert torch.equal(both[1, 3:], draft.generate(ids[1:, :2], max_new_tokens=6)[0, 2:])


def test_the_same_seed_gives_the_same_text(draft, batch):
    options = {"max_new_tokens": 10, "temperature": 1.0, "top_k": 20, "proposal": "sampling", "verification": "block"}
    first = draft.generate(*batch, seed=4, **options)
    assert torch.equal(first, draft.generate(*batch, seed=4, **options))
    assert not torch.equal(first, draft.generate(*batch, seed=5, **options))


def test_a_streamer_gets_the_prompt_then_the_new_tokens(draft):
    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, tokens):
            self.tokens += tokens.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Streamer()
    ids = torch.tensor([[4, 9, 2]])
    text = draft.generate(ids, max_new_tokens=9, streamer=streamer)
    assert streamer.ended and streamer.tokens == text[0].tolist()
    with pytest.raises(ValueError, match="one sequence"):
        draft.generate(ids.repeat(2, 1), streamer=streamer)


def test_needs_the_complete_verifier(verifier):
    draft = random_draft(verifier)
    draft.attach_verifier(verifier, mode="train_only")
    with pytest.raises(ValueError, match="needs the whole verifier; call attach_verifier"):
        draft.generate(torch.tensor([[4, 9]]))
    draft.detach_verifier()
    with pytest.raises(ValueError, match="needs the whole verifier; call attach_verifier"):
        draft.generate(torch.tensor([[4, 9]]))


def test_an_unknown_method_is_rejected(draft):
    with pytest.raises(UsageError, match=r"'gready'.*Did you mean 'greedy'"):
        draft.generate(torch.tensor([[4, 9]]), proposal="gready")


@pytest.mark.parametrize("temperature", [5e-324, 1e-38, 1e-6])
@pytest.mark.parametrize("proposal", ["greedy", "sampling", "dynamic_tree"])
def test_temperatures_down_to_the_smallest_float_are_greedy(draft, batch, temperature, proposal):
    options = {"max_new_tokens": 8, "proposal": proposal}
    found = draft.generate(*batch, do_sample=True, temperature=temperature, top_k=5, top_p=0.9, **options)
    assert torch.equal(found, draft.generate(*batch, **options))


@pytest.mark.parametrize("temperature", [2e-5, 1e-3, 1e308])
def test_other_temperatures_neither_overflow_nor_give_nan(temperature):
    logits = torch.tensor([[60000.0, 59999.0, -60000.0]])
    for dtype in (torch.float16, torch.float32):
        chances = Sampling(temperature=temperature, top_k=2, top_p=0.99).log_probs(logits.to(dtype)).exp()
        assert float(chances.sum()) == pytest.approx(1) and not chances.isnan().any()


def test_common_arguments_of_transformers_are_accepted(verifier, draft, batch):
    ids, mask = batch
    greedy = draft.generate(ids, mask, max_new_tokens=8)
    neutral = {
        "num_beams": 1,
        "num_return_sequences": 1,
        "repetition_penalty": 1.0,
        "use_cache": True,
        "max_length": None,
    }
    off = {"temperature": None, "top_k": None, "top_p": None, "logits_processor": [], "output_scores": False}
    assert torch.equal(draft.generate(input_ids=ids, attention_mask=mask, max_new_tokens=8, **neutral, **off), greedy)
    with pytest.warns(UserWarning, match=r"temperature=0\.7 is ignored"):
        assert torch.equal(draft.generate(ids, mask, max_new_tokens=8, do_sample=False, temperature=0.7), greedy)
    sampled = {"max_new_tokens": 8, "proposal": "sampling", "seed": 3}
    drawn = draft.generate(ids, mask, do_sample=True, **sampled)
    assert torch.equal(drawn, draft.generate(ids, mask, temperature=1.0, **sampled)) and not torch.equal(drawn, greedy)
    assert torch.equal(draft.generate(ids, mask, max_new_tokens=0), ids)


def test_a_dictionary_holds_rounds_acceptance_and_time(verifier, draft, batch):
    options = {"max_new_tokens": 9, "proposal": "static_tree:depth=3"}
    found = draft.generate(*batch, return_dict_in_generate=True, **options)
    assert torch.equal(found.sequences, draft.generate(*batch, **options))
    accepted, rounds = found.accepted_by_position, found.rounds
    # The first token comes from the prefill; each round gives one more than it accepts.
    assert (1 + rounds + accepted.sum(1)).tolist() == [9, 9, 9] and int(accepted.sum()) > 0
    assert (accepted.diff(dim=1) <= 0).all() and found.seconds > 0
    assert found.acceptance_length == pytest.approx(float(24 / rounds.sum()))
    none = draft.generate(*batch, max_new_tokens=1, return_dict_in_generate=True)
    assert none.rounds.tolist() == [0, 0, 0] and none.acceptance_length == 1


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"num_beams": 4}, ValueError, "num_beams is not possible.*repeat the prompt"),
        ({"num_return_sequences": 2}, ValueError, "num_return_sequences is not possible"),
        ({"repetition_penalty": 1.2}, ValueError, "repetition_penalty is not possible.*temperature, top_k and top_p"),
        ({"max_length": 40}, ValueError, "max_length is not possible.*max_new_tokens"),
        ({"stopping_criteria": [1]}, ValueError, "stopping_criteria is not possible.*eos_token_id"),
        ({"assistant_model": object()}, ValueError, "assistant_model is not possible.*proposal"),
        ({"generation_config": object()}, ValueError, "generation_config is not possible.*do_sample"),
        ({"output_scores": True}, ValueError, "output_scores is not possible.*return_dict_in_generate"),
        ({"max_new_token": 4}, TypeError, "'max_new_token'.*Did you mean 'max_new_tokens'"),
        ({"eos_token_id": "</s>"}, TypeError, "eos_token_id is '</s>'.*convert_tokens_to_ids"),
        ({"max_new_tokens": 2.5}, TypeError, "max_new_tokens is 2.5"),
        ({"max_new_tokens": -1}, ValueError, "max_new_tokens is -1"),
        ({"temperature": -1.0}, ValueError, "temperature: .*greater than or equal to 0"),
        ({"temperature": float("nan")}, ValueError, "temperature: "),
        ({"top_p": 1.5}, ValueError, "top_p: .*less than or equal to 1"),
        ({"verification": "blocks"}, ValueError, "verification: .*'block'"),
        ({"proposal": 5}, TypeError, "proposal is 5"),
        ({"input_ids": "How many?"}, TypeError, "got text; tokenize it first.*generate.*inputs"),
        ({"input_ids": ["a", "b"]}, TypeError, "got text; tokenize it first"),
        ({"input_ids": {"input_ids": torch.tensor([[4]])}}, TypeError, r"generate\(\*\*inputs\)"),
        ({"input_ids": [[4, 9]]}, TypeError, "input_ids is a list"),
        ({"input_ids": torch.tensor([4, 9])}, ValueError, r"has shape \[2\].*input_ids\[None\]"),
        ({"input_ids": torch.tensor([[4.0]])}, TypeError, "torch.float32"),
        ({"input_ids": torch.tensor([[4, VOCABULARY]])}, ValueError, f"ids from 4 to {VOCABULARY}"),
        ({"attention_mask": torch.ones(1, 5)}, ValueError, r"attention_mask has shape \[1, 5\]"),
    ],
    ids=lambda value: next(iter(value)) if isinstance(value, dict) else None,
)
def test_other_arguments_are_rejected_with_advice(draft, options, error, message):
    with pytest.raises(error, match=message):
        draft.generate(**{"input_ids": torch.tensor([[4, 9]]), **options})
