from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

import pytest
import torch
from random_verifiers import VOCABULARY
from small_models import CONTEXT, SHAPE, Oracle, OracleDrafter, decoded, emissions, random_draft, random_model
from torch import Tensor
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    LlamaConfig,
    MambaConfig,
    PreTrainedModel,
    Qwen3_5TextConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from specforge.config import TokenProposalConfig
from specforge.decoding import loop
from specforge.decoding.loop import Decoder, Emission, Times
from specforge.decoding.settings import Verification
from specforge.errors import UsageError
from specforge.proposals import (
    BigramTokenProposalConfig,
    DynamicTreeTokenProposalConfig,
    GreedyTokenProposalConfig,
    PromptLookupTokenProposalConfig,
    SamplingTokenProposalConfig,
    StaticTreeTokenProposalConfig,
)
from specforge.sampling import Sampling
from specforge.verifier.features import Features, capture

NamedVerifiers = Callable[[str], PreTrainedModel]
WARM = Sampling(temperature=1.0)
GREEDY_CHAIN = GreedyTokenProposalConfig(speculative_tokens=4)


@pytest.fixture
def verifier(verifier_named: NamedVerifiers) -> PreTrainedModel:
    return verifier_named("llama")


@pytest.fixture
def oracle(prompts: Any, full_answer: Any) -> Oracle:
    return Oracle([[*prompt, *full_answer("llama", prompt)] for prompt in prompts], VOCABULARY)


def by_sequence(all_emissions: list[Emission]) -> dict[int, list[Emission]]:
    sorted_out = defaultdict(list)
    for emission in all_emissions:
        sorted_out[emission.sequence].append(emission)
    return sorted_out


@pytest.mark.parametrize(
    ("config", "most"),
    [
        (None, 0),
        (GREEDY_CHAIN, 4),
        (StaticTreeTokenProposalConfig(initial_branching_factor=2, branching_factor=1, depth=3), 6),
        (DynamicTreeTokenProposalConfig(speculative_tokens=7, expansion_factor=3, depth=3), 7),
        (PromptLookupTokenProposalConfig(speculative_tokens=3), 3),
    ],
    ids=["none", "greedy", "static_tree", "dynamic_tree", "prompt_lookup"],
)
def test_a_round_yields_one_token_more_than_it_accepts(
    config: Any, most: int, verifier: PreTrainedModel, oracle: Oracle, prompts: Any, full_answer: Any
) -> None:
    batch = prompts[:6]
    decoder = Decoder(verifier, oracle, config)
    every = by_sequence(emissions(decoder, batch, 15))
    assert every.keys() == set(range(6))
    lengths = []
    for number, own in every.items():
        output = [token for emission in own for token in emission.tokens]
        assert output == full_answer("llama", batch[number])[:15]
        first, *rounds = own
        # The first token comes from the prefill.
        assert (first.drafted, first.path, first.accepted) == (None, 0, 0)
        for emission in rounds:
            assert emission.accepted == len(emission.tokens) - 1 >= 0
            assert emission.drafted is not None and emission.accepted <= emission.drafted <= most
        # Nothing is cut here: there is no stop token, and no proposal exceeds the remaining length.
        assert all(emission.path == emission.accepted for emission in rounds)
        lengths.append(len(rounds))
    assert decoder.times.rounds == max(lengths)
    assert (sum(lengths) < 6 * 14) == (config is not None)


def test_every_round_emits_once_for_each_unfinished_sequence(
    verifier: PreTrainedModel, oracle: Oracle, prompts: Any
) -> None:
    every = emissions(Decoder(verifier, oracle, GREEDY_CHAIN), prompts, 12)
    left, index = list(range(len(prompts))), 0
    output = defaultdict(int)
    while left:
        now = every[index : index + len(left)]
        assert [emission.sequence for emission in now] == left
        for emission in now:
            output[emission.sequence] += len(emission.tokens)
        index += len(left)
        left = [number for number in left if output[number] < min(12, CONTEXT - len(prompts[number]))]
    assert index == len(every)


def test_a_proposed_stop_token_ends_the_text_like_the_verifiers(
    verifier: PreTrainedModel, prompts: Any, full_answer: Any
) -> None:
    output = full_answer("llama", prompts[3])
    stop = next(token for index, token in enumerate(output) if index >= 3 and token not in output[:index])
    index = output.index(stop)
    sure = Oracle([[*prompts[3], *output]], VOCABULARY, share=1.0)
    every = emissions(
        Decoder(verifier, sure, GreedyTokenProposalConfig(speculative_tokens=20), stop_tokens=[stop]), [prompts[3]], 30
    )
    first, only = every
    assert first.tokens == output[:1] and only.tokens == output[1 : index + 1]
    assert only.drafted == 20
    # All of its tokens were proposed, the stop token included.
    assert only.path == index
    assert only.accepted == index - 1


def test_nothing_is_proposed_beyond_the_length_limit(verifier: PreTrainedModel, oracle: Oracle, prompts: Any) -> None:
    for config in (
        GreedyTokenProposalConfig(speculative_tokens=20),
        PromptLookupTokenProposalConfig(speculative_tokens=20),
    ):
        for own in by_sequence(emissions(Decoder(verifier, oracle, config), prompts[:6], 8)).values():
            left = 8 - len(own[0].tokens)
            for emission in own[1:]:
                assert emission.drafted is not None and emission.drafted <= left - 1
                left -= len(emission.tokens)
            assert left == 0


class RecordingOracle(Oracle):
    """An oracle that records what is committed for each sequence, and reads features of two layers."""

    @property
    def aux_layers(self) -> list[int]:
        return [1, 2]

    def drafter(self, batch_size: int) -> OracleDrafter:
        self.last_drafter = RecordingDrafter(self, batch_size)
        return self.last_drafter


class RecordingDrafter(OracleDrafter):
    def __init__(self, oracle: Oracle, batch_size: int) -> None:
        super().__init__(oracle, batch_size)
        self.numbers = list(range(batch_size))
        self.received: dict[int, list[tuple[int, Tensor, Tensor]]] = defaultdict(list)

    def begin(self, tokens: Tensor) -> None:
        self.first = tokens.tolist()

    def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
        super().commit(tokens, features, counts)
        for row, (number, count) in enumerate(zip(self.numbers, counts.tolist(), strict=True)):
            for index in range(count):
                pair = (int(tokens[row, index]), features.aux[row, index], features.last[row, index])
                self.received[number].append(pair)

    def select(self, rows: Tensor) -> None:
        super().select(rows)
        self.numbers = [self.numbers[row] for row in rows.tolist()]


@pytest.mark.parametrize(
    "config",
    [
        GREEDY_CHAIN,
        StaticTreeTokenProposalConfig(initial_branching_factor=3, depth=3),
        DynamicTreeTokenProposalConfig(speculative_tokens=9, expansion_factor=3, depth=4),
    ],
    ids=["greedy", "static_tree", "dynamic_tree"],
)
@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_all_decided_tokens_and_their_features_are_committed_to_the_draft(
    family: str, config: TokenProposalConfig, verifier_named: NamedVerifiers, prompts: Any, full_answer: Any
) -> None:
    """Sequences end at different times, and each token is paired with the states of the one before it."""
    verifier, batch = verifier_named(family), prompts[:6]
    texts = [[*prompt, *full_answer(family, prompt)] for prompt in batch]
    oracle = RecordingOracle(texts, VOCABULARY)
    decoded(Decoder(verifier, oracle, config), batch, 1000)
    assert oracle.last_drafter.first == [prompt[0] for prompt in batch]
    assert oracle.last_drafter.received.keys() == set(range(len(batch)))
    for number, received in oracle.last_drafter.received.items():
        tokens, aux, last = zip(*received, strict=True)
        # The end of a sequence is not committed.
        assert len(batch[number]) <= len(tokens) < len(texts[number])
        assert list(tokens) == texts[number][1 : 1 + len(tokens)]
        read = torch.tensor([texts[number][: len(tokens)]])
        expected = capture(verifier, read, torch.arange(len(tokens))[None], [1, 2])
        torch.testing.assert_close(torch.stack(aux), expected.aux[0], atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(torch.stack(last), expected.last[0], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        (None, WARM),
        (GREEDY_CHAIN, WARM),
        (SamplingTokenProposalConfig(speculative_tokens=3), WARM),
        (StaticTreeTokenProposalConfig(depth=2, sampled=True), Sampling(temperature=0.7, top_k=5)),
        (DynamicTreeTokenProposalConfig(speculative_tokens=7), WARM),
    ],
    ids=["none", "greedy", "sampling", "static_tree", "dynamic_tree"],
)
def test_a_seed_determines_the_output(config: Any, sampling: Sampling, verifier: PreTrainedModel, prompts: Any) -> None:
    decoder = Decoder(verifier, random_draft(verifier, size=9), config, sampling)

    def output(seed: int) -> list[Emission]:
        return emissions(decoder, prompts[:5], 16, seed=seed)

    assert output(1) == output(1)
    assert output(1) != output(2)


def test_without_a_seed_the_default_generator_is_used(verifier: PreTrainedModel, prompts: Any) -> None:
    decoder = Decoder(verifier, sampling=WARM)
    torch.manual_seed(5)
    first = decoded(decoder, prompts[:3], 12)
    other = decoded(decoder, prompts[:3], 12)
    torch.manual_seed(5)
    assert first == decoded(decoder, prompts[:3], 12) != other
    # A seed does not change the default generator.
    state = torch.get_rng_state()
    decoded(decoder, prompts[:3], 3, seed=0)
    assert torch.equal(state, torch.get_rng_state())


def test_times_are_measured(verifier: PreTrainedModel, oracle: Oracle, prompts: Any) -> None:
    decoder = Decoder(verifier, oracle, GREEDY_CHAIN)
    assert astuple(decoder.times) == astuple(Times())
    rounds = len(emissions(decoder, prompts[2:3], 10)) - 1
    times = decoder.times
    assert times.rounds == rounds
    assert min(times.draft, times.verifier, times.prompt) > 0
    assert times.verifier <= times.total
    # Each decoding starts from zero.
    assert emissions(decoder, prompts[2:3], 1) and decoder.times.rounds == 0
    assert decoder.times.verifier == decoder.times.total == 0
    fresh = Decoder(verifier)
    emissions(fresh, prompts[2:3], 10)
    assert fresh.times.rounds == 9 and fresh.times.verifier > 0


@pytest.mark.parametrize("timed", [False, True])
def test_the_device_is_synchronised_only_if_times_are_measured(
    timed: bool, verifier: PreTrainedModel, oracle: Oracle, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    waits: list[int] = []
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda: waits.append(1))
    decoder = Decoder(verifier, oracle, GREEDY_CHAIN, timed=timed)
    assert emissions(decoder, prompts[2:3], 10) and decoder.times.total > 0
    assert bool(waits) == timed


def test_the_consumers_time_is_not_counted(
    verifier: PreTrainedModel, oracle: Oracle, prompts: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = 0

    def now() -> float:
        nonlocal clock
        clock += 1
        return float(clock)

    monkeypatch.setattr(loop.time, "perf_counter", now)
    decoder = Decoder(verifier, oracle, GREEDY_CHAIN)
    for _ in decoder.decode([torch.tensor(prompts[2])], 10):
        clock += 1000
    assert decoder.times.total < 1000 and decoder.times.prompt < 1000


def test_the_times_of_the_parts_add_up_to_at_most_the_total(
    verifier: PreTrainedModel, prompts: Any, full_answer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The draft's time over the prompt counts as prefill, as the verifier's does."""
    clock = 0.0

    def now() -> float:
        nonlocal clock
        clock += 1
        return clock

    class SlowDrafter(OracleDrafter):
        def commit(self, tokens: Tensor, features: Features, counts: Tensor) -> None:
            nonlocal clock
            clock += 100 * tokens.shape[1]
            super().commit(tokens, features, counts)

    class Slow(Oracle):
        def drafter(self, batch_size: int) -> OracleDrafter:
            return SlowDrafter(self, batch_size)

    monkeypatch.setattr(loop.time, "perf_counter", now)
    slow = Slow([[*prompts[5], *full_answer("llama", prompts[5])]], VOCABULARY)
    decoder = Decoder(verifier, slow, GREEDY_CHAIN)
    emissions(decoder, prompts[5:6], 6)
    assert decoder.times.draft + decoder.times.verifier <= decoder.times.total


def test_prompts_that_cannot_be_continued_are_rejected(verifier: PreTrainedModel) -> None:
    decoder = Decoder(verifier)
    full = [1] * CONTEXT
    for batch, message in [
        ([[]], "the prompt is empty"),
        ([[1], [], [2]], "prompt 2 of 3 is empty"),
        ([full], f"the prompt has {CONTEXT} tokens, and the verifier's context is {CONTEXT}"),
        ([[1], [*full, 1]], f"prompt 2 of 2 has {CONTEXT + 1} tokens"),
    ]:
        with pytest.raises(UsageError, match=message):
            list(decoder.decode([torch.tensor(prompt, dtype=torch.int64) for prompt in batch], 5))
    assert len(decoded(decoder, [full[:-1]], 5)[0]) == 1


def test_no_prompts_or_a_limit_of_0_give_no_emissions(verifier: PreTrainedModel, oracle: Oracle) -> None:
    decoder = Decoder(verifier, oracle, GREEDY_CHAIN)
    assert emissions(decoder, [], 5) == []
    assert decoded(decoder, [[1, 2]], 0) == [[]]
    assert all(emission.accepted >= 0 for emission in emissions(decoder, [[1, 2]], 0))


def test_a_draft_of_another_verifier_is_refused(verifier: PreTrainedModel) -> None:
    for change, message in [
        ({"vocab_size": 40}, "vocabulary of 40; llama has 31"),
        ({"hidden_size": 32, "head_dim": 8}, "width of 32; llama has 16"),
    ]:
        other = random_model(LlamaConfig(**{**SHAPE, **change}))
        with pytest.raises(UsageError, match=f"the draft was made for a verifier with a {message}"):
            Decoder(verifier, random_draft(other), GREEDY_CHAIN)
    # Methods without a draft ignore it.
    Decoder(verifier, random_draft(other), PromptLookupTokenProposalConfig())


@pytest.mark.parametrize("kind", ["greedy", "sampling", "static_tree", "dynamic_tree"])
def test_methods_that_need_a_draft_are_rejected_without_one(kind: str, verifier: PreTrainedModel) -> None:
    config = {
        "greedy": GREEDY_CHAIN,
        "sampling": SamplingTokenProposalConfig(),
        "static_tree": StaticTreeTokenProposalConfig(),
        "dynamic_tree": DynamicTreeTokenProposalConfig(),
    }[kind]
    with pytest.raises(UsageError, match=f"{kind!r} needs a draft"):
        Decoder(verifier, proposal=config)


def test_a_proposal_deeper_than_the_draft_supports_is_rejected(verifier: PreTrainedModel) -> None:
    short = Oracle([], VOCABULARY, max_depth=3)
    Decoder(verifier, short, GreedyTokenProposalConfig(speculative_tokens=3))
    Decoder(verifier, short, StaticTreeTokenProposalConfig(depth=3))
    Decoder(verifier, short, PromptLookupTokenProposalConfig(speculative_tokens=9))
    for config in (GREEDY_CHAIN, DynamicTreeTokenProposalConfig(depth=4), StaticTreeTokenProposalConfig(depth=4)):
        with pytest.raises(UsageError, match=f"{config.proposal_type} proposes 4 tokens ahead, .* at most 3"):
            Decoder(verifier, short, config)


def test_unknown_methods_are_refused(verifier: PreTrainedModel) -> None:
    with pytest.raises(UsageError, match=r"greedi"):
        Decoder(verifier, random_draft(verifier), TokenProposalConfig(proposal_type="greedi"))


def test_a_drawn_tree_is_not_verified_as_a_block(verifier: PreTrainedModel, prompts: Any) -> None:
    config = StaticTreeTokenProposalConfig(sampled=True)
    decoder = Decoder(verifier, random_draft(verifier), config, WARM, Verification(method="block"))
    with pytest.raises(UsageError, match="block verification takes a chain"):
        decoded(decoder, prompts[:1], 9)


@pytest.mark.parametrize("content", [None, "nonsense", "other"])
def test_a_missing_or_damaged_table_is_named(
    content: str | None, verifier: PreTrainedModel, prompts: Any, tmp_path: Any
) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "table.safetensors"
    if content == "other":
        save_file({"something": torch.zeros(3)}, path)
    elif content:
        path.write_text(content)
    with pytest.raises(UsageError, match=r"bigram: .*table\.safetensors holds no table 'successors'"):
        decoded(Decoder(verifier, proposal=BigramTokenProposalConfig(table=str(path))), prompts[:1], 9)


@pytest.mark.parametrize("table", [[1, 2, 3], [VOCABULARY] * VOCABULARY], ids=["short", "foreign"])
def test_a_table_of_another_vocabulary_is_refused(
    table: list[int], verifier: PreTrainedModel, prompts: Any, tmp_path: Any
) -> None:
    from safetensors.torch import save_file

    path = tmp_path / "table.safetensors"
    save_file({"successors": torch.tensor(table)}, path)
    with pytest.raises(UsageError, match="bigram"):
        decoded(Decoder(verifier, proposal=BigramTokenProposalConfig(table=str(path))), prompts[:1], 9)


def test_attention_that_takes_no_mask_is_refused(prompts: Any) -> None:
    name = "attention that specforge does not know"
    AttentionInterface.register(name, sdpa_attention_forward)
    AttentionMaskInterface.register(name, sdpa_mask)
    verifier = random_model(LlamaConfig(**SHAPE), attn_implementation=name)
    with pytest.raises(UsageError, match=f"attn_implementation='{name}'.* load it with one of: sdpa, eager"):
        decoded(Decoder(verifier), prompts[:1], 3)


def test_a_state_that_cannot_be_rolled_back_is_refused(prompts: Any) -> None:
    recurrent = {
        "linear_num_value_heads": 2,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 8,
        "linear_value_head_dim": 8,
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
    }
    verifier = random_model(Qwen3_5TextConfig(**{**SHAPE, **recurrent}))
    with pytest.raises(UsageError, match=r"cannot verify drafts: it has layers of linear_attention.* rolled back"):
        decoded(Decoder(verifier), prompts[:1], 3)
    mamba = MambaConfig(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=2, state_size=4)
    with pytest.raises(UsageError, match="MambaForCausalLM"):
        decoded(Decoder(random_model(mamba)), prompts[:1], 3)
