"""Replay against real decoding and the estimates of other tools, on the same data.

    python benchmarks/replay.py DRAFT --prompts PROMPTS.jsonl [...] [--verifier VERIFIER] [--temperature 1]

The verifier answers each prompt without a draft; replay and the estimates read these answers. Then the draft's chains
are really decoded, with other random numbers above temperature 0. Standard errors come from resampling prompts.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from specforge import SpeculatorModel
from specforge.config import SpeculatorModelConfig
from specforge.data.text.prompts import prompt_set_name, read_prompts
from specforge.data.text.verifier import VerifierTokenizer
from specforge.decoding.loop import Decoder
from specforge.decoding.recorded import chain_acceptance
from specforge.decoding.replay import replay
from specforge.proposals import GreedyTokenProposalConfig, SamplingTokenProposalConfig
from specforge.sampling import Sampling
from specforge.verifier.features import capture
from specforge.verifier.loading import load_verifier

RESAMPLES = 200


@dataclass(frozen=True)
class Counted:
    """One prompt: rounds and tokens of real decoding, and the acceptance of every step at every anchor."""

    rounds: int
    tokens: int
    acceptance: Tensor


def replayed(prompts: list[Counted], chain: int) -> float:
    """The exact figure."""
    found = [replay(prompt.acceptance.T[None], torch.tensor([prompt.acceptance.shape[1]])) for prompt in prompts]
    return float(sum(result.tokens for result in found) / sum(result.rounds[chain - 1] for result in found))


def real(prompts: list[Counted], chain: int) -> float:
    """The figure of real decoding."""
    return sum(prompt.tokens for prompt in prompts) / sum(prompt.rounds for prompt in prompts)


def anchors(prompts: list[Counted], chain: int) -> Tensor:
    """Anchors from which the complete chain is inside the response, [K, N]."""
    counts = [max(prompt.acceptance.shape[1] - chain + 1, 0) for prompt in prompts]
    return torch.cat(
        [counted.acceptance[:chain, :number] for counted, number in zip(prompts, counts, strict=True)], dim=1
    )


def mean_over_anchors(prompts: list[Counted], chain: int) -> float:
    """1 + mean over all anchors of the accepted tokens, the sum of prefix accuracies (speculators)."""
    return float(1 + anchors(prompts, chain).cumprod(0).sum(0).mean())


def product_of_means(prompts: list[Counted], chain: int) -> float:
    """1 + a_0 + a_0 a_1 + ... of means over all anchors (NeMo AutoModel's tau_sim)."""
    return float(1 + anchors(prompts, chain).mean(1).cumprod(0).sum())


def without_bonus(prompts: list[Counted], chain: int) -> float:
    """The same without the bonus token (SpecForge of sgl-project: eval/simulated_acc_len)."""
    return product_of_means(prompts, chain) - 1


def one_rate(prompts: list[Counted], chain: int) -> float:
    """(1 - a^(K+1)) / (1 - a) of one acceptance rate (Leviathan et al., equation 1)."""
    rate = float(anchors(prompts, chain)[0].mean())
    return (1 - rate ** (chain + 1)) / (1 - rate)


FIGURES: dict[str, Callable[[list[Counted], int], float]] = {
    "real decoding": real,
    "replay": replayed,
    "mean over anchors": mean_over_anchors,
    "product of means": product_of_means,
    "same, no bonus": without_bonus,
    "one rate": one_rate,
}


def standard_errors(prompts: list[Counted], chain: int) -> dict[str, float]:
    """Standard error of real decoding, and of its difference from replay, by resampling prompts."""
    generator = np.random.default_rng(0)
    values = []
    for _ in range(RESAMPLES):
        drawn = [prompts[number] for number in generator.integers(len(prompts), size=len(prompts))]
        values.append((real(drawn, chain), replayed(drawn, chain)))
    both = np.array(values)
    return {"real": float(both[:, 0].std()), "difference": float((both[:, 0] - both[:, 1]).std())}


def main() -> None:
    """Print one row of a Markdown table for each prompt set and kind of chain."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("draft")
    parser.add_argument("--prompts", nargs="+", required=True)
    parser.add_argument("--verifier")
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--chain", type=int, default=5)
    parser.add_argument("--limit", type=int)
    parser.add_argument("--max-new-tokens", type=int, default=128)
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--samples", type=int, default=1, help="answers to each prompt, above temperature 0")
    parser.add_argument("--threads", type=int, default=1)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    name = arguments.verifier
    if name is None:
        name = SpeculatorModelConfig.from_pretrained(arguments.draft).speculators_config.verifier.name_or_path
    verifier, template = load_verifier(name), VerifierTokenizer(name).template
    draft = SpeculatorModel.from_pretrained(arguments.draft, verifier=verifier, dtype=verifier.dtype)
    sampling = Sampling(temperature=arguments.temperature)
    methods = {"greedy": GreedyTokenProposalConfig(speculative_tokens=arguments.chain)}
    if not sampling.is_greedy:
        methods["sampled"] = SamplingTokenProposalConfig(speculative_tokens=arguments.chain)
    print(f"| prompts | chain | {' | '.join(FIGURES)} | real - replay, standard errors |")
    print(f"|---|---|{'---|' * len(FIGURES)}---|")
    for source in arguments.prompts:
        conversations = read_prompts(source, limit=arguments.limit)
        prompts = [torch.tensor(conversation.prompt(0, [], template)) for conversation in conversations]
        counted: dict[str, list[Counted]] = {kind: [] for kind in methods}
        plain = Decoder(verifier, sampling=sampling)
        decoders = {kind: Decoder(verifier, draft, method, sampling) for kind, method in methods.items()}
        for sample in range(1 if sampling.is_greedy else arguments.samples):
            for first in tqdm(range(0, len(prompts), arguments.batch_size), desc=source, disable=None):
                batch = prompts[first : first + arguments.batch_size]
                measure(batch, plain, decoders, draft, arguments, counted, seed=10 * sample)
        for kind, found in counted.items():
            values = " | ".join(f"{figure(found, arguments.chain):.3f}" for figure in FIGURES.values())
            error = standard_errors(found, arguments.chain)
            gap = (real(found, arguments.chain) - replayed(found, arguments.chain)) / max(error["difference"], 1e-9)
            name = prompt_set_name(source)
            print(f"| {name} | {kind} | {values} | {gap:+.1f} (s.e. {error['real']:.3f}) |", flush=True)


def measure(
    batch: list[Tensor],
    plain: Decoder,
    decoders: dict[str, Decoder],
    draft: SpeculatorModel,
    arguments: argparse.Namespace,
    counted: dict[str, list[Counted]],
    seed: int,
) -> None:
    """Answer a batch of prompts without a draft and with each kind of chain; add the counts."""
    responses: list[list[int]] = [[] for _ in batch]
    for emission in plain.decode(batch, arguments.max_new_tokens, seed):
        responses[emission.sequence] += emission.tokens
    rounds = {kind: [[0, 0] for _ in batch] for kind in decoders}
    for number, (kind, decoder) in enumerate(decoders.items()):
        for emission in decoder.decode(batch, arguments.max_new_tokens, seed + 1 + number):
            if emission.drafted is not None:
                rounds[kind][emission.sequence][0] += 1
                rounds[kind][emission.sequence][1] += len(emission.tokens)
    for row, (prompt, response) in enumerate(zip(batch, responses, strict=True)):
        if len(response) < 2:
            continue
        text = torch.cat([prompt, torch.tensor(response)])
        features = capture(plain.verifier, text[None], torch.arange(len(text))[None], draft.aux_layers)
        greedy, drawn = chain_acceptance(
            draft, plain.parts, text, features, len(prompt), arguments.chain, plain.sampling
        )
        for kind in decoders:
            acceptance = (greedy if kind == "greedy" else drawn).double()
            counted[kind].append(Counted(*rounds[kind][row], acceptance))


if __name__ == "__main__":
    main()
