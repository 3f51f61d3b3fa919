"""What decoding with a draft says is what the verifier says alone: token by token at temperature 0, in law above."""

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
    logits_alone,
    random_draft,
    random_model,
)
from toys import filtered
from transformers import BloomConfig, GPT2Config, GPTNeoConfig, LlamaConfig, Phi3Config, PreTrainedModel

from specforge.config import TokenProposalConfig
from specforge.decoding.loop import Decoder
from specforge.decoding.verification import Verification
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
ToTheEnd = Callable[[str, Prompt], list[int]]

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


def cut(said: Sequence[int], stop: Sequence[int], most: int) -> list[int]:
    """What is left of a text that ends with its first stop token or is full."""
    end = next((place + 1 for place, token in enumerate(said) if token in stop), len(said))
    return list(said[: min(end, most)])


@pytest.fixture(scope="session")
def draft_for(
    verifier_named: NamedVerifiers, prompts: list[Prompt], to_the_end: ToTheEnd
) -> Callable[[str, str], SpeculatorModel]:
    """Drafts of a verifier: knowing nothing, knowing few tokens, having learnt the answers by heart, and an oracle."""
    made: dict[tuple[str, str], SpeculatorModel] = {}

    def draft(name: str, kind: str) -> SpeculatorModel:
        if (name, kind) in made:
            return made[name, kind]
        verifier = verifier_named(name)
        texts = [[*prompt, *to_the_end(name, prompt)] for prompt in prompts]
        if kind == "oracle":
            made[name, kind] = Oracle(texts, VOCABULARY)
        elif kind == "learnt":
            made[name, kind] = random_draft(verifier, fc_norm=True)
            learn(made[name, kind], verifier, [torch.tensor(text) for text in texts])
        else:
            made[name, kind] = random_draft(verifier, size=7 if kind == "pruned" else None, num_layers=2)
        return made[name, kind]

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
    to_the_end: ToTheEnd,
) -> None:
    name = data.draw(st.sampled_from(NAMES), label="method")
    config, verification = method_named(name)
    kind = data.draw(st.sampled_from(["random", "pruned", "oracle"]), label="draft")
    draft = None if name in WITHOUT_DRAFT else draft_for(family, kind)
    batch = data.draw(st.lists(st.sampled_from(prompts), min_size=1, max_size=4), label="prompts")
    most = data.draw(st.integers(1, CONTEXT), label="max_new_tokens")
    whole = [to_the_end(family, prompt) for prompt in batch]
    # Stop tokens that are said.
    stop = data.draw(st.lists(st.sampled_from([token for one in whole for token in one]), max_size=2), label="stop")
    decoder = Decoder(verifier_named(family), draft, config, verification=verification, stop_tokens=stop)
    assert decoded(decoder, batch, most) == [cut(one, stop, most) for one in whole]


@pytest.mark.parametrize(
    ("name", "kind"), [(name, kind) for name in NAMES for kind in ("random", "oracle")[: 1 + (name in DRAFTED)]]
)
def test_every_method_goes_to_the_end_of_the_context(
    name: str,
    kind: str,
    verifier_named: NamedVerifiers,
    draft_for: Callable[[str, str], SpeculatorModel],
    method_named: Any,
    prompts: list[Prompt],
    to_the_end: ToTheEnd,
) -> None:
    """Sequences end at different times, the first with its first token, the last where the context is full."""
    config, verification = method_named(name)
    draft = None if name in WITHOUT_DRAFT else draft_for("gemma3", kind)
    decoder = Decoder(verifier_named("gemma3"), draft, config, verification=verification)
    said = decoded(decoder, prompts, 10 * CONTEXT)
    assert said == [to_the_end("gemma3", prompt) for prompt in prompts]
    assert [len(one) + len(prompt) for one, prompt in zip(said, prompts, strict=True)] == [CONTEXT] * len(prompts)


@pytest.mark.parametrize("family", ["llama", "gemma3"])
def test_a_draft_that_has_learnt_the_answers_is_mostly_right(
    family: str,
    verifier_named: NamedVerifiers,
    draft_for: Callable[[str, str], SpeculatorModel],
    prompts: list[Prompt],
    to_the_end: ToTheEnd,
) -> None:
    batch = [prompt for prompt in prompts if len(prompt) < CONTEXT // 2]
    for name in ("greedy", "sampling, block", "static_tree", "dynamic_tree"):
        config, verification = METHODS[name]
        decoder = Decoder(verifier_named(family), draft_for(family, "learnt"), config, verification=verification)
        assert decoded(decoder, batch, CONTEXT) == [to_the_end(family, prompt) for prompt in batch]
        rounds = [one for one in emissions(decoder, batch, CONTEXT) if one.drafted is not None]
        assert sum(len(one.tokens) for one in rounds) > 2.5 * len(rounds), name


def test_a_stop_token_within_an_accepted_path_ends_the_text(
    verifier_named: NamedVerifiers, prompts: list[Prompt], to_the_end: ToTheEnd
) -> None:
    verifier, prompt = verifier_named("llama"), prompts[3]
    said = to_the_end("llama", prompt)
    oracle = Oracle([[*prompt, *said]], VOCABULARY, share=1.0)
    config = GreedyTokenProposalConfig(speculative_tokens=4)
    for place, token in enumerate(said):
        if token in said[:place]:
            continue
        own = generated(verifier, prompt, CONTEXT, eos_token_id=token)
        assert own == said[: place + 1]
        decoder = Decoder(verifier, oracle, config, stop_tokens=[token])
        assert decoded(decoder, [prompt, prompts[1]], CONTEXT)[0] == own
    # The verifier's own stop tokens count without being asked for.
    verifier.generation_config.eos_token_id = [0, said[2]]
    try:
        assert decoded(Decoder(verifier, oracle, config), [prompt], CONTEXT) == [said[:3]]
    finally:
        verifier.generation_config.eos_token_id = None


@pytest.mark.parametrize("name", ["greedy", "dynamic_tree"])
def test_sequences_that_end_with_their_first_token_leave_the_others_going(
    name: str, verifier_named: NamedVerifiers, prompts: list[Prompt], to_the_end: ToTheEnd
) -> None:
    verifier, batch = verifier_named("llama"), [prompts[0], prompts[4], prompts[2]]
    said = [to_the_end("llama", prompt) for prompt in batch]
    draft = random_draft(verifier)
    decoder = Decoder(verifier, draft, METHODS[name][0], stop_tokens=[said[1][0]])
    assert decoded(decoder, batch, 9) == [cut(one, [said[1][0]], 9) for one in said]


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
        said = decoded(decoder, [prompts[2], prompts[-1]], most, seed=0)
        assert [len(one) for one in said] == [most, min(most, 3)]


@pytest.mark.parametrize("family", ["gemma2", "gemma3", "gemma3, eager", "mistral, eager", "llama, eager"])
def test_a_prompt_beyond_the_window_is_read_as_the_verifier_reads_it(
    family: str, verifier_named: NamedVerifiers, prompts: list[Prompt], to_the_end: ToTheEnd
) -> None:
    batch = [prompt for prompt in prompts if len(prompt) > 6]
    said = decoded(Decoder(verifier_named(family)), batch, 12)
    assert said == [to_the_end(family, prompt)[:12] for prompt in batch]


GPT2_SHAPE = {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": CONTEXT}
OWN_WAYS = {
    "local attention": lambda: GPTNeoConfig(
        **NAMELESS, num_layers=4, num_heads=4, attention_types=[[["global", "local"], 2]], window_size=4
    ),
    "ALiBi": lambda: BloomConfig(**NAMELESS, n_layer=3, n_head=4),
    # Frequencies change where a text grows beyond the original length; keys that were computed before do not.
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


def test_learnt_positions_are_not_asked_for_behind_the_context(prompts: list[Prompt]) -> None:
    """A sequence that is nearly full stands beside one that is not, whose nodes set the width of the batch."""
    verifier = random_model(GPT2Config(**GPT2_SHAPE, vocab_size=VOCABULARY, bos_token_id=None, eos_token_id=None))
    batch = [prompts[1], prompts[-1], prompts[-2]]
    said = [generated(verifier, prompt, CONTEXT - len(prompt)) for prompt in batch]
    for share in (0.0, 1.0):
        draft = oracle_of(batch, said, share)
        for name in ("greedy", "dynamic_tree"):
            assert decoded(Decoder(verifier, draft, METHODS[name][0]), batch, CONTEXT) == said


@pytest.mark.parametrize("way", OWN_WAYS)
def test_attention_that_is_not_understood_is_refused_rather_than_wrong(way: str, prompts: list[Prompt]) -> None:
    verifier = random_model(OWN_WAYS[way](), seed=1)
    batch = [prompts[0], prompts[2], prompts[3], prompts[5]]
    said = [generated(verifier, prompt, CONTEXT - len(prompt)) for prompt in batch]
    try:
        for name in ("none", "greedy", "dynamic_tree"):
            decoder = Decoder(verifier, oracle_of(batch, said, 0.7), METHODS[name][0])
            assert decoded(decoder, batch, CONTEXT) == said
    except UsageError:
        pass


def oracle_of(batch: list[Prompt], said: list[list[int]], share: float) -> Oracle:
    return Oracle([[*prompt, *own] for prompt, own in zip(batch, said, strict=True)], VOCABULARY, share)


def assert_greedy_up_to_ties(verifier: PreTrainedModel, prompt: Prompt, said: list[int], expected: list[int]) -> None:
    """What is said is what is expected, or differs first at a tie; and each token is one of the verifier's best."""
    assert len(said) == len(expected)
    logits = logits_alone(verifier, [*prompt, *said])[len(prompt) - 1 : -1]
    behind_best = logits.max(-1).values - logits.gather(1, torch.tensor(said)[:, None]).squeeze(1)
    assert behind_best.max() < 1e-9
    place = next((one for one, (ours, other) in enumerate(zip(said, expected, strict=True)) if ours != other), None)
    if place is not None:
        best = logits[place].topk(2).values
        assert best[0] - best[1] < 1e-9


@pytest.mark.parametrize("name", ["none", "greedy", "static_tree", "static_tree, sampled", "dynamic_tree"])
def test_ties_are_broken_among_the_best_tokens_alone(name: str, prompts: list[Prompt]) -> None:
    verifier = random_model(LlamaConfig(**SHAPE, tie_word_embeddings=False), seed=3)
    # Every token has a twin, which is as probable but is followed by something else.
    half = VOCABULARY // 2
    verifier.lm_head.weight[half : 2 * half] = verifier.lm_head.weight[:half]
    batch = prompts[:6]
    expected = [generated(verifier, prompt, 20) for prompt in batch]
    draft = random_draft(verifier)
    # A draft that is often right up to the twin.
    draft.borrow_weights()
    config, verification = METHODS[name]
    decoder = Decoder(verifier, draft, config, verification=verification)
    for prompt, said, own in zip(batch, decoded(decoder, batch, 20), expected, strict=True):
        assert_greedy_up_to_ties(verifier, prompt, said, own)


# Above temperature 0.

FEW = 6
TOLD = 3
COPIES = 400
SEEDS = 4
CLOSE_PROMPTS: list[Prompt] = [(1, 2), (4, 4, 0, 3, 5)]


def few_tokens_verifier() -> PreTrainedModel:
    shape = {**SHAPE, "vocab_size": FEW, "pad_token_id": None, "num_hidden_layers": 3}
    return random_model(LlamaConfig(**shape, tie_word_embeddings=False), seed=1, scale=0.25)


def exact_law(verifier: PreTrainedModel, prompt: Prompt, sampling: Sampling) -> dict[Prompt, float]:
    """The law of the first tokens, from the verifier's logits behind everything that it may have said before."""
    law: dict[Prompt, float] = {(): 1.0}
    for _ in range(TOLD):
        following = {}
        for said, probability in law.items():
            p = filtered(logits_alone(verifier, [*prompt, *said])[-1].tolist(), sampling)
            following |= {(*said, token): probability * more for token, more in enumerate(p) if more > 0}
        law = following
    return law


def surprise(counts: Counter[Prompt], law: dict[Prompt, float]) -> float:
    """How many standard deviations a chi-square statistic lies above its mean (Wilson and Hilferty 1931)."""
    assert not counts.keys() - law.keys(), "something impossible was said"
    total = sum(counts.values())
    common = [cell for cell, probability in law.items() if probability * total >= 5]
    rare = 1 - sum(law[cell] for cell in common)
    cells = [(counts[cell], law[cell] * total) for cell in common]
    if rare * total >= 5:
        cells.append((total - sum(counts[cell] for cell in common), rare * total))
    statistic, freedom = sum((seen - expected) ** 2 / expected for seen, expected in cells), len(cells) - 1
    return ((statistic / freedom) ** (1 / 3) - (1 - 2 / (9 * freedom))) / (2 / (9 * freedom)) ** 0.5


def sampled_surprises(decoder: Decoder) -> list[float]:
    """Decode many copies of the prompts and compare their first tokens with the exact law, prompt by prompt."""
    counts: list[Counter[Prompt]] = [Counter() for _ in CLOSE_PROMPTS]
    for seed in range(SEEDS):
        # One token more than is looked at, and trees deeper than that.
        said = decoded(decoder, CLOSE_PROMPTS * COPIES, TOLD + 2, seed=seed)
        for number, one in enumerate(said):
            counts[number % len(CLOSE_PROMPTS)][tuple(one[:TOLD])] += 1
    return [
        surprise(own, exact_law(decoder.verifier, prompt, decoder.sampling))
        for own, prompt in zip(counts, CLOSE_PROMPTS, strict=True)
    ]


def good_draft(verifier: PreTrainedModel, size: int | None) -> SpeculatorModel:
    """A draft that is right often enough for every branch to be taken."""
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
def test_sampled_output_has_the_verifiers_own_law(name: str, sampling: Sampling, size: int | None) -> None:
    verifier = few_tokens_verifier()
    config, verification = METHODS[name]
    draft = None if name in WITHOUT_DRAFT else good_draft(verifier, size)
    assert max(sampled_surprises(Decoder(verifier, draft, config, sampling, verification))) < 4


@pytest.mark.parametrize(("name", "size"), [("sampling", FEW), ("static_tree, sampled", 4)])
def test_a_language_model_as_draft_leaves_the_law_as_it_is(name: str, size: int) -> None:
    verifier = few_tokens_verifier()
    config = LlamaConfig(**{**SHAPE, "vocab_size": size, "pad_token_id": None, "num_hidden_layers": 1})
    draft = DraftModel.from_training_args(verifier.config, config)
    fill(draft, seed=2)
    draft.cast(torch.float64).attach_verifier(verifier)
    proposal, verification = METHODS[name]
    decoder = Decoder(verifier, draft, proposal, Sampling(temperature=1.0), verification)
    assert max(sampled_surprises(decoder)) < 4


def test_another_law_would_be_noticed() -> None:
    verifier = few_tokens_verifier()
    lossy = Verification(method="typical")
    decoder = Decoder(verifier, good_draft(verifier, None), METHODS["sampling"][0], Sampling(temperature=1.0), lossy)
    assert max(sampled_surprises(decoder)) > 8
    # Nor would a law pass that is only a little off.
    warmer = Decoder(verifier, sampling=Sampling(temperature=1.0))
    counts: Counter[Prompt] = Counter()
    for seed in range(SEEDS):
        counts.update(tuple(one[:TOLD]) for one in decoded(warmer, [CLOSE_PROMPTS[0]] * COPIES, TOLD, seed=seed))
    assert surprise(counts, exact_law(verifier, CLOSE_PROMPTS[0], Sampling(temperature=1.3))) > 6


def test_the_exact_law_covers_everything_that_may_be_said() -> None:
    law = exact_law(few_tokens_verifier(), CLOSE_PROMPTS[0], Sampling(temperature=1.0))
    assert law.keys() == set(product(range(FEW), repeat=TOLD))
    assert sum(law.values()) == pytest.approx(1)
