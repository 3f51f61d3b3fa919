"""Decoding with a draft gives the verifier's own output: token by token at temperature 0, in distribution above."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_verifiers import VOCABULARY, fill
from small_models import (
    CONTEXT,
    SHAPE,
    Oracle,
    decoded,
    emissions,
    generated,
    learn,
    random_draft,
    random_model,
    uncached_logits,
)
from toys import filtered
from transformers import BloomConfig, GPT2Config, GPTNeoConfig, LlamaConfig, Phi3Config, PreTrainedModel

from specforge.config import TokenProposalConfig
from specforge.decoding.loop import Decoder
from specforge.decoding.settings import Verification
from specforge.errors import UsageError
from specforge.models.speculator import SpeculatorModel
from specforge.proposals import (
    BigramTokenProposalConfig,
    DynamicTreeTokenProposalConfig,
    GreedyTokenProposalConfig,
    PromptLookupTokenProposalConfig,
    SamplingTokenProposalConfig,
    StaticTreeTokenProposalConfig,
)
from specforge.sampling import Sampling
from specforge_draft_model.model import DraftModel

Prompt = tuple[int, ...]
NamedVerifiers = Callable[[str], PreTrainedModel]
FullAnswer = Callable[[str, Prompt], list[int]]

TOKEN, BLOCK = Verification(method="token"), Verification(method="block")
FAMILIES = ["llama", "qwen3", "gemma2", "gemma3", "mistral"]
WITHOUT_DRAFT = ["none", "prompt_lookup", "bigram"]
METHODS: dict[str, tuple[TokenProposalConfig | None, Verification]] = {
    "none": (None, TOKEN),
    "greedy": (GreedyTokenProposalConfig(speculative_tokens=4), TOKEN),
    "greedy, block": (GreedyTokenProposalConfig(speculative_tokens=3), BLOCK),
    "sampling": (SamplingTokenProposalConfig(speculative_tokens=4), TOKEN),
    "sampling, block": (SamplingTokenProposalConfig(speculative_tokens=5), BLOCK),
    "static_tree": (StaticTreeTokenProposalConfig(initial_branching_factor=3, depth=3), TOKEN),
    "static_tree, sampled": (StaticTreeTokenProposalConfig(initial_branching_factor=2, sampled=True), TOKEN),
    "dynamic_tree": (DynamicTreeTokenProposalConfig(speculative_tokens=9, expansion_factor=3, depth=4), TOKEN),
    "prompt_lookup": (PromptLookupTokenProposalConfig(speculative_tokens=4), TOKEN),
}


@pytest.fixture(scope="session")
def method_named(bigram_table: str) -> Callable[[str], tuple[TokenProposalConfig | None, Verification]]:
    def named(name: str) -> tuple[TokenProposalConfig | None, Verification]:
        return (BigramTokenProposalConfig(table=bigram_table), TOKEN) if name == "bigram" else METHODS[name]

    return named


NAMES = [*METHODS, "bigram"]
DRAFTED = [name for name in NAMES if name not in WITHOUT_DRAFT]


def cut(output: Sequence[int], stop: Sequence[int], most: int) -> list[int]:
    """Cut a text after its first stop token or at the length limit."""
    end = next((index + 1 for index, token in enumerate(output) if token in stop), len(output))
    return list(output[: min(end, most)])


@pytest.fixture(scope="session")
def draft_for(
    verifier_named: NamedVerifiers, prompts: list[Prompt], full_answer: FullAnswer
) -> Callable[[str, str], SpeculatorModel]:
    """Drafts for a verifier: untrained, with a pruned vocabulary, overfitted on the answers, and an oracle."""
    cache: dict[tuple[str, str], SpeculatorModel] = {}

    def draft(name: str, kind: str) -> SpeculatorModel:
        if (name, kind) in cache:
            return cache[name, kind]
        verifier = verifier_named(name)
        texts = [[*prompt, *full_answer(name, prompt)] for prompt in prompts]
        if kind == "oracle":
            cache[name, kind] = Oracle(texts, VOCABULARY)
        elif kind == "learnt":
            cache[name, kind] = random_draft(verifier, fc_norm=True)
            learn(cache[name, kind], verifier, [torch.tensor(text) for text in texts])
        else:
            cache[name, kind] = random_draft(verifier, size=7 if kind == "pruned" else None, num_layers=2)
        return cache[name, kind]

    return draft


@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=25)
@given(data=st.data())
def test_output_is_the_verifiers_own_token_for_token(
    family: str,
    data: st.DataObject,
    verifier_named: NamedVerifiers,
    draft_for: Callable[[str, str], SpeculatorModel],
    method_named: Any,
    prompts: list[Prompt],
    full_answer: FullAnswer,
) -> None:
    name = data.draw(st.sampled_from(NAMES), label="method")
    config, verification = method_named(name)
    kind = data.draw(st.sampled_from(["random", "pruned", "oracle"]), label="draft")
    draft = None if name in WITHOUT_DRAFT else draft_for(family, kind)
    batch = data.draw(st.lists(st.sampled_from(prompts), min_size=1, max_size=4), label="prompts")
    most = data.draw(st.integers(1, CONTEXT), label="max_new_tokens")
    texts = [full_answer(family, prompt) for prompt in batch]
    # Stop tokens that occur in the output.
    stop = data.draw(st.lists(st.sampled_from([token for text in texts for token in text]), max_size=2), label="stop")
    decoder = Decoder(verifier_named(family), draft, config, verification=verification, stop_tokens=stop)
    assert decoded(decoder, batch, most) == [cut(text, stop, most) for text in texts]


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in NAMES for kind in ("random", "oracle")[: 1 + (name in DRAFTED)]]
)
def test_every_method_fills_the_context(
    name: str,
    kind: str,
    verifier_named: NamedVerifiers,
    draft_for: Callable[[str, str], SpeculatorModel],
    method_named: Any,
    prompts: list[Prompt],
    full_answer: FullAnswer,
) -> None:
    """Sequences end at different times, the first with its first token, the last when the context is full."""
    config, verification = method_named(name)
    draft = None if name in WITHOUT_DRAFT else draft_for("gemma3", kind)
    decoder = Decoder(verifier_named("gemma3"), draft, config, verification=verification)
    output = decoded(decoder, prompts, 10 * CONTEXT)
    assert output == [full_answer("gemma3", prompt) for prompt in prompts]
    assert [len(text) + len(prompt) for text, prompt in zip(output, prompts, strict=True)] == [CONTEXT] * len(prompts)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_draft_trained_on_the_answers_is_mostly_accepted(
    family: str,
    verifier_named: NamedVerifiers,
    draft_for: Callable[[str, str], SpeculatorModel],
    prompts: list[Prompt],
    full_answer: FullAnswer,
) -> None:
    batch = [prompt for prompt in prompts if len(prompt) < CONTEXT // 2]
    for name in ("greedy", "sampling, block", "static_tree", "dynamic_tree"):
        config, verification = METHODS[name]
        decoder = Decoder(verifier_named(family), draft_for(family, "learnt"), config, verification=verification)
        assert decoded(decoder, batch, CONTEXT) == [full_answer(family, prompt) for prompt in batch]
        rounds = [emission for emission in emissions(decoder, batch, CONTEXT) if emission.drafted is not None]
        assert sum(len(emission.tokens) for emission in rounds) > 2.5 * len(rounds), name


def test_a_stop_token_within_an_accepted_path_ends_the_text(
    verifier_named: NamedVerifiers, prompts: list[Prompt], full_answer: FullAnswer
) -> None:
    verifier, prompt = verifier_named("llama"), prompts[3]
    output = full_answer("llama", prompt)
    oracle = Oracle([[*prompt, *output]], VOCABULARY, share=1.0)
    config = GreedyTokenProposalConfig(speculative_tokens=4)
    for index, token in enumerate(output):
        if token in output[:index]:
            continue
        own = generated(verifier, prompt, CONTEXT, eos_token_id=token)
        assert own == output[: index + 1]
        decoder = Decoder(verifier, oracle, config, stop_tokens=[token])
        assert decoded(decoder, [prompt, prompts[1]], CONTEXT)[0] == own
    # The verifier's own stop tokens are the default.
    verifier.generation_config.eos_token_id = [0, output[2]]
    try:
        assert decoded(Decoder(verifier, oracle, config), [prompt], CONTEXT) == [output[:3]]
    finally:
        verifier.generation_config.eos_token_id = None


@pytest.mark.parametrize("name", ["greedy", "dynamic_tree"])
def test_sequences_that_end_with_their_first_token_do_not_stop_the_others(
    name: str, verifier_named: NamedVerifiers, prompts: list[Prompt], full_answer: FullAnswer
) -> None:
    verifier, batch = verifier_named("llama"), [prompts[0], prompts[4], prompts[2]]
    output = [full_answer("llama", prompt) for prompt in batch]
    draft = random_draft(verifier)
    decoder = Decoder(verifier, draft, METHODS[name][0], stop_tokens=[output[1][0]])
    assert decoded(decoder, batch, 9) == [cut(text, [output[1][0]], 9) for text in output]


@pytest.mark.parametrize("temperature", [0.0, 1.0])
@pytest.mark.parametrize("name", NAMES)
def test_every_limit_of_new_tokens_is_kept(
    name: str, temperature: float, verifier_named: NamedVerifiers, method_named: Any, prompts: list[Prompt]
) -> None:
    verifier = verifier_named("llama")
    config, verification = method_named(name)
    draft = None if name in WITHOUT_DRAFT else random_draft(verifier)
    decoder = Decoder(verifier, draft, config, Sampling(temperature=temperature), verification)
    for most in range(1, 5):
        output = decoded(decoder, [prompts[2], prompts[-1]], most, seed=0)
        assert [len(text) for text in output] == [most, min(most, 3)]


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gemma3, eager", "mistral, eager", "llama, eager"])
def test_a_prompt_longer_than_the_window_is_decoded_correctly(
    family: str, verifier_named: NamedVerifiers, prompts: list[Prompt], full_answer: FullAnswer
) -> None:
    batch = [prompt for prompt in prompts if len(prompt) > 6]
    output = decoded(Decoder(verifier_named(family)), batch, 12)
    assert output == [full_answer(family, prompt)[:12] for prompt in batch]


GPT2_SHAPE = {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}
UNUSUAL_ATTENTION = {
    "local attention": lambda: GPTNeoConfig(
        **NAMELESS, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]], window_size=4
    ),
    "ALiBi": lambda: BloomConfig(**NAMELESS, n_layer=3, n_head=4),
    # Frequencies change once a text exceeds the original length; keys computed earlier do not.
    "LongRoPE": lambda: Phi3Config(
        **{**SHAPE, "head_dim": 4},
        original_max_position_embeddings=12,
        rope_parameters={
            "rope_type": "longrope",
            "rope_theta": 10000.0,
            "short_factor": [1.0, 1.0],
            "long_factor": [3.0, 3.0],
            "original_max_position_embeddings": 12,
        },
    ),
}
NAMELESS: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "max_position_embeddings": CONTEXT,
    "bos_token_id": None,
    "eos_token_id": None,
}


def test_learned_positions_beyond_the_context_are_not_used(prompts: list[Prompt]) -> None:
    """In a batch of a nearly full sequence and a shorter one, the shorter one's nodes set the width."""
    verifier = random_model(GPT2Config(**GPT2_SHAPE, vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None))
    batch = [prompts[1], prompts[-1], prompts[-2]]
    output = [generated(verifier, prompt, CONTEXT - len(prompt)) for prompt in batch]
    for share in (0.0, 1.0):
        draft = oracle_of(batch, output, share)
        for name in ("greedy", "dynamic_tree"):
            assert decoded(Decoder(verifier, draft, METHODS[name][0]), batch, CONTEXT) == output


@pytest.mark.parametrize("kind", UNUSUAL_ATTENTION)
def test_unusual_attention_is_rejected_or_correct(kind: str, prompts: list[Prompt]) -> None:
    verifier = random_model(UNUSUAL_ATTENTION[kind](), seed=1)
    batch = [prompts[0], prompts[2], prompts[3], prompts[5]]
    output = [generated(verifier, prompt, CONTEXT - len(prompt)) for prompt in batch]
    try:
        for name in ("none", "greedy", "dynamic_tree"):
            decoder = Decoder(verifier, oracle_of(batch, output, 0.7), METHODS[name][0])
            assert decoded(decoder, batch, CONTEXT) == output
    except UsageError:
        pass


def oracle_of(batch: list[Prompt], output: list[list[int]], share: float) -> Oracle:
    return Oracle([[*prompt, *own] for prompt, own in zip(batch, output, strict=True)], VOCABULARY, share)


def assert_greedy_up_to_ties(verifier: PreTrainedModel, prompt: Prompt, output: list[int], expected: list[int]) -> None:
    """The output is as expected or first differs at a tie, and each token is one of the verifier's best."""
    assert len(output) == len(expected)
    logits = uncached_logits(verifier, [*prompt, *output])[len(prompt) - 1 : -1]
    gap_to_best = logits.max(-1).values - logits.gather(1, torch.tensor(output)[:, None]).squeeze(1)
    assert gap_to_best.max() < 1e-9
    index = next(
        (position for position, (ours, other) in enumerate(zip(output, expected, strict=True)) if ours != other), None
    )
    if index is not None:
        best = logits[index].topk(2).values
        assert best[0] - best[1] < 1e-9


@pytest.mark.parametrize("name", ["none", "greedy", "static_tree", "static_tree, sampled", "dynamic_tree"])
def test_ties_are_broken_only_among_the_best_tokens(name: str, prompts: list[Prompt]) -> None:
    verifier = random_model(LlamaConfig(**SHAPE, tie_word_embeddings=False), seed=3)
    # Every token has a twin of the same probability, which is followed by different tokens.
    half = VOCABULARY // 2
    verifier.lm_head.weight[half : 2 * half] = verifier.lm_head.weight[:half]
    batch = prompts[:6]
    expected = [generated(verifier, prompt, 20) for prompt in batch]
    draft = random_draft(verifier)
    # A draft that is often right, up to the twin.
    draft.borrow_weights()
    config, verification = METHODS[name]
    decoder = Decoder(verifier, draft, config, verification=verification)
    for prompt, output, own in zip(batch, decoded(decoder, batch, 20), expected, strict=True):
        assert_greedy_up_to_ties(verifier, prompt, output, own)


# Above temperature 0.

FEW = 6
LENGTH = 3
COPIES = 400
SEEDS = 4
CLOSE_PROMPTS: list[Prompt] = [(1, 2), (4, 4, 0, 3, 5)]


def few_tokens_verifier() -> PreTrainedModel:
    shape = {**SHAPE, "vocab_size": FEW, "pad_token_id": None, "num_hidden_layers": 3}
    return random_model(LlamaConfig(**shape, tie_word_embeddings=False), seed=1, scale=0.25)


def exact_distribution(verifier: PreTrainedModel, prompt: Prompt, sampling: Sampling) -> dict[Prompt, float]:
    """The distribution of the first tokens, from the verifier's logits after every possible prefix."""
    distribution: dict[Prompt, float] = {(): 1.0}
    for _ in range(LENGTH):
        following = {}
        for output, probability in distribution.items():
            p = filtered(uncached_logits(verifier, [*prompt, *output])[-1].tolist(), sampling)
            following |= {(*output, token): probability * more for token, more in enumerate(p) if more > 0}
        distribution = following
    return distribution


def surprise(counts: Counter[Prompt], distribution: dict[Prompt, float]) -> float:
    """The z-score of a chi-square statistic (Wilson and Hilferty 1931)."""
    assert not counts.keys() - distribution.keys(), "an impossible sequence was generated"
    total = sum(counts.values())
    common = [cell for cell, probability in distribution.items() if probability * total >= 5]
    rare = 1 - sum(distribution[cell] for cell in common)
    cells = [(counts[cell], distribution[cell] * total) for cell in common]
    if rare * total >= 5:
        cells.append((total - sum(counts[cell] for cell in common), rare * total))
    statistic, freedom = sum((seen - expected) ** 2 / expected for seen, expected in cells), len(cells) - 1
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


def sampled_surprises(decoder: Decoder) -> list[float]:
    """Decode many copies of the prompts; compare the first tokens with the exact distribution of each prompt."""
    counts: list[Counter[Prompt]] = [Counter() for _ in CLOSE_PROMPTS]
    for seed in range(SEEDS):
        # More tokens than are compared, and trees deeper than that.
        output = decoded(decoder, CLOSE_PROMPTS * COPIES, LENGTH + 2, seed=seed)
        for number, text in enumerate(output):
            counts[number % len(CLOSE_PROMPTS)][tuple(text[:LENGTH])] += 1
    return [
        surprise(own, exact_distribution(decoder.verifier, prompt, decoder.sampling))
        for own, prompt in zip(counts, CLOSE_PROMPTS, strict=True)
    ]


def good_draft(verifier: PreTrainedModel, size: int | None) -> SpeculatorModel:
    """A draft that is right often enough for every branch to be reached."""
    draft = random_draft(verifier, seed=2, size=size)
    draft.lm_head.weight.data *= 0.3
    return draft


@pytest.mark.parametrize(
    ("name", "sampling", "size"),
    [
        ("none", Sampling(temperature=1.0), None),
        ("greedy", Sampling(temperature=1.0), None),
        ("sampling", Sampling(temperature=1.0), 4),
        ("sampling", Sampling(temperature=0.7, top_k=4), None),
        ("sampling, block", Sampling(temperature=1.0), 4),
        ("sampling, block", Sampling(temperature=1.3, top_p=0.9), None),
        ("static_tree", Sampling(temperature=1.0), 4),
        ("static_tree, sampled", Sampling(temperature=1.0), None),
        ("static_tree, sampled", Sampling(temperature=1.2, top_k=3), 4),
        ("dynamic_tree", Sampling(temperature=1.0, top_p=0.95), 4),
        ("prompt_lookup", Sampling(temperature=1.0), None),
    ],
)
def test_sampled_output_has_the_verifiers_own_distribution(name: str, sampling: Sampling, size: int | None) -> None:
    verifier = few_tokens_verifier()
    config, verification = METHODS[name]
    draft = None if name in WITHOUT_DRAFT else good_draft(verifier, size)
    assert max(sampled_surprises(Decoder(verifier, draft, config, sampling, verification))) < 4


@pytest.mark.parametrize(("name", "size"), [("sampling", FEW), ("static_tree, sampled", 4)])
def test_a_language_model_as_draft_keeps_the_distribution(name: str, size: int) -> None:
    verifier = few_tokens_verifier()
    config = LlamaConfig(**{**SHAPE, "vocab_size": size, "pad_token_id": None, "num_hidden_layers": 1})
    draft = DraftModel.from_training_args(verifier.config, config)
    fill(draft, seed=2)
    draft.cast(torch.float64).attach_verifier(verifier)
    proposal, verification = METHODS[name]
    decoder = Decoder(verifier, draft, proposal, Sampling(temperature=1.0), verification)
    assert max(sampled_surprises(decoder)) < 4


def test_another_distribution_would_be_noticed() -> None:
    verifier = few_tokens_verifier()
    lossy = Verification(method="typical")
    decoder = Decoder(verifier, good_draft(verifier, None), METHODS["sampling"][0], Sampling(temperature=1.0), lossy)
    assert max(sampled_surprises(decoder)) > 8
    # A slightly different distribution is noticed too.
    warmer = Decoder(verifier, sampling=Sampling(temperature=1.0))
    counts: Counter[Prompt] = Counter()
    for seed in range(SEEDS):
        counts.update(tuple(text[:LENGTH]) for text in decoded(warmer, [CLOSE_PROMPTS[0]] * COPIES, LENGTH, seed=seed))
    assert surprise(counts, exact_distribution(verifier, CLOSE_PROMPTS[0], Sampling(temperature=1.3))) > 6


def test_the_exact_distribution_covers_every_sequence() -> None:
    distribution = exact_distribution(few_tokens_verifier(), CLOSE_PROMPTS[0], Sampling(temperature=1.0))
    assert distribution.keys() == set(product(range(FEW), repeat=LENGTH))
    assert sum(distribution.values()) == pytest.approx(1)
