"""What a draft does beside its verifier on the probe's prompts: logits, and the acceptance length to be expected."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm
from transformers import PreTrainedModel

from specforge.checkpoints.verification.logits import difference, greatest_logits
from specforge.checkpoints.verification.probe import ProbeText, Served
from specforge.data.text.prompts import Conversation
from specforge.data.text.verifier import VerifierTokenizer
from specforge.decoding.agreement import Agreement, compare_rounds
from specforge.decoding.loop import Decoder, Emission
from specforge.decoding.recorded import chain_acceptance
from specforge.decoding.replay import figures, replay
from specforge.decoding.verifier import why_no_trees
from specforge.errors import UsageError
from specforge.models.speculator import SpeculatorModel
from specforge.proposals import GreedyTokenProposalConfig
from specforge.sampling import Sampling
from specforge.verifier.features import Features, capture
from specforge.verifier.parts import VerifierParts

CHAIN = 8
NEW_TOKENS = 64
QUESTIONS = (
    "How many days are 3 weeks?",
    "Explain in two sentences why the sky is blue.",
    "Write a short poem about a river.",
    "Name the planets of the solar system, in order.",
)
ACCEPTANCE_TOLERANCE = 0.02


def probe_prompts(text: VerifierTokenizer, conversations: list[Conversation] | None = None) -> list[list[int]]:
    """Return the tokens of the probe's prompts.

    Args:
        text: The verifier's tokenizer.
        conversations: Prompts to take the first turns of; some plain questions when None, and where the verifier comes
            without a tokenizer, or one without a chat template, some tokens that mean nothing.
    """
    if conversations is not None:
        return [one.prompt(0, [], text.template) for one in conversations]
    asked = [Conversation(([{"role": "user", "content": one}],), "probe") for one in QUESTIONS]
    try:
        return [one.prompt(0, [], text.template) for one in asked]
    except UsageError:
        size = text.vocabulary_size
        return [[(3 + (7 + one) * place) % size for place in range(8)] for one in range(len(QUESTIONS))]


def expected_of(model: SpeculatorModel, verifier: PreTrainedModel, prompts: list[list[int]]) -> Served:
    """Let the verifier answer, and measure what the draft does on what it says.

    Args:
        model: The draft.
        verifier: Its verifier.
        prompts: Tokens of each prompt.

    Raises:
        UsageError: They do not go together, or the verifier has nothing to say.
    """
    model.to(verifier.device).attach_verifier(verifier)
    spoken = _answers(verifier, prompts)
    texts = [ProbeText(tokens=asked + said, begin=len(asked)) for asked, said in zip(prompts, spoken, strict=True)]
    lengths, rates = greedy_acceptance(model, verifier, texts)
    tokens, features = _states(model, verifier, texts[0])
    return Served(
        texts=texts,
        logits=greatest_logits(model, tokens, features),
        acceptance_length=lengths,
        accept_rates=rates,
    )


def drafter_agreement(model: SpeculatorModel, verifier: PreTrainedModel, texts: list[ProbeText]) -> Agreement:
    """Decode the probe's prompts by greedy chains, and compare every round with a replay of what was decoded.

    Args:
        model: The draft, attached.
        verifier: Its verifier.
        texts: What the verifier answered to the prompts.

    Returns:
        The rounds; none where this pair can be trained and served, but not decoded here.
    """
    chain = model.drafter(1).max_depth or CHAIN
    prompts = [torch.tensor(text.tokens[: text.begin]) for text in texts]
    spoken: list[list[Emission]] = [[] for _ in prompts]
    try:
        decoder = Decoder(verifier, model, GreedyTokenProposalConfig(speculative_tokens=chain))
        for emission in decoder.decode(prompts, NEW_TOKENS):
            spoken[emission.sequence].append(emission)
    except UsageError:
        return Agreement()
    found = Agreement()
    for prompt, emissions in zip(prompts, spoken, strict=True):
        text = ProbeText(
            tokens=[*prompt.tolist(), *(token for one in emissions for token in one.tokens)], begin=len(prompt)
        )
        accepted = [one.accepted for one in emissions if one.drafted is not None]
        found += compare_rounds(model, *_states(model, verifier, text), text.begin, accepted, chain)
    return found


def _answers(verifier: PreTrainedModel, prompts: list[list[int]]) -> list[list[int]]:
    """Let the verifier answer each prompt greedily."""
    # disable=None shows the bar on a terminal only.
    with tqdm(total=len(prompts) * NEW_TOKENS, desc="the verifier answers", unit=" tokens", disable=None) as bar:
        spoken: list[list[int]] = [[] for _ in prompts]
        if why_no_trees(verifier) is not None:
            # It keeps a state, or attends, in a way that only its own code knows: one prompt a row.
            for number, prompt in enumerate(prompts):
                asked = torch.tensor([prompt], device=verifier.device)
                written = verifier.generate(
                    asked, attention_mask=torch.ones_like(asked), max_new_tokens=NEW_TOKENS, do_sample=False
                )
                spoken[number] = written[0, len(prompt) :].tolist()
                bar.update(NEW_TOKENS)
            return spoken
        for emission in Decoder(verifier).decode([torch.tensor(one) for one in prompts], NEW_TOKENS):
            spoken[emission.sequence] += emission.tokens
            bar.update(len(emission.tokens))
    return spoken


def served_differences(model: SpeculatorModel, verifier: PreTrainedModel, expected: Served) -> list[str]:
    """Say how a draft does otherwise beside its verifier than was expected of it."""
    model.to(verifier.device).attach_verifier(verifier)
    found = []
    tokens, features = _states(model, verifier, expected.texts[0])
    if differs := difference(model, tokens, features, expected.logits):
        found.append(f"beside the verifier, {differs}")
    lengths, _ = greedy_acceptance(model, verifier, expected.texts)
    got, wanted = lengths[max(lengths)], expected.expected(max(lengths))
    if abs(got - wanted) > ACCEPTANCE_TOLERANCE * wanted:
        found.append(f"the acceptance length of chains of {max(lengths)} is {got:.3f}, and {wanted:.3f} is expected")
    return found


@torch.no_grad()
def greedy_acceptance(
    model: SpeculatorModel, verifier: PreTrainedModel, texts: list[ProbeText]
) -> tuple[dict[int, float], list[float]]:
    """Replay greedy chains over texts of the verifier's.

    Returns:
        Acceptance length by length of the chain, and the share of rounds of the longest that accept at least k.

    Raises:
        UsageError: No text has two tokens of the verifier's, so that there is no round at all.
    """
    steps = model.drafter(1).max_depth or CHAIN
    by_text, lengths = [], []
    for text in texts:
        anchors = len(text.tokens) - 1 - text.begin
        if anchors < 1:
            continue
        tokens, features = _states(model, verifier, text)
        greedy, _ = chain_acceptance(model, VerifierParts.of(verifier), tokens, features, text.begin, steps, Sampling())
        by_text.append(greedy.T)
        lengths.append(anchors)
    if not by_text:
        raise UsageError("the verifier ends its answer to every probe prompt at once; give others as --prompts")
    rounds = replay(pad_sequence(by_text, batch_first=True), torch.tensor(lengths))
    total = float(rounds.tokens)
    found = {chain: total / float(rounds.rounds[chain - 1]) for chain in range(1, steps + 1)}
    longest = figures(total, float(rounds.rounds[-1]), rounds.accepted[-1].tolist())
    return found, [longest[f"accept_rate_pos_{place}"] for place in range(1, steps + 1)]


def _states(model: SpeculatorModel, verifier: PreTrainedModel, text: ProbeText) -> tuple[Tensor, Features]:
    tokens = torch.tensor(text.tokens, device=verifier.device)
    positions = torch.arange(len(tokens), device=tokens.device)[None]
    return tokens, capture(verifier, tokens[None], positions, model.aux_layers)
