"""Decoding of prompt sets without speculation and with each contender, alternating on the same prompts."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial

import torch
from torch import Tensor
from transformers import PreTrainedModel

from specforge.config import TokenProposalConfig
from specforge.data.text.prompts import Conversation, reply_text
from specforge.data.text.template import ChatTemplate
from specforge.decoding.agreement import Agreement, compare_rounds
from specforge.decoding.loop import Decoder, Emission, Times
from specforge.decoding.recorded import chain_acceptance, replay_text
from specforge.decoding.replay import Rounds, replay
from specforge.decoding.settings import Verification
from specforge.decoding.verification import is_lossy
from specforge.evaluation.cost import draft_cost
from specforge.evaluation.expecting import modelled_speedups
from specforge.evaluation.results import ContenderResult
from specforge.evaluation.tally import Response, RoundTally
from specforge.hookspecs import ProposalMethod
from specforge.models.speculator import SpeculatorModel
from specforge.proposals import GreedyTokenProposalConfig, SamplingTokenProposalConfig
from specforge.proposals.proposal import Proposer
from specforge.registry import installed
from specforge.sampling import RandomSource, Sampling
from specforge.verifier.features import Features, capture

# Maximum length of replayed chains.
CHAIN = 8
# Methods that propose the draft's most probable chain at temperature 0.
CHAINS = (GreedyTokenProposalConfig, SamplingTokenProposalConfig)


@dataclass
class Contender:
    """A draft with a proposal method, or a method without a draft.

    Attributes:
        name: Display name.
        proposal: Settings of the proposal method.
        draft: The draft; None for a method that needs none.
        draft_name: Folder or hub id of the draft.
        tallies: Counts by prompt set.
    """

    name: str
    proposal: TokenProposalConfig
    draft: SpeculatorModel | None = None
    draft_name: str | None = None
    tallies: dict[str, RoundTally] = field(default_factory=dict)

    @property
    def proposer(self) -> type[Proposer]:
        """Class of the proposal method."""
        method = installed().find(ProposalMethod, self.proposal.proposal_type)
        proposer: type[Proposer] = installed().load(method, "proposer")
        return proposer

    def result(self, verification: Verification, verifier: PreTrainedModel) -> ContenderResult:
        """Return its results."""
        pooled = sum(self.tallies.values(), RoundTally()).measurement("all")
        cost = 0.0 if self.draft is None else draft_cost(self.draft, verifier)
        passes = 1 if self.draft is not None and self.draft.drafter(1).reads_weights_once else None
        return ContenderResult(
            name=self.name,
            draft=self.draft_name,
            proposal=self.proposal.model_dump(mode="json"),
            is_baseline=self.draft is None,
            is_lossy=is_lossy(verification, self.proposal),
            draft_cost=cost,
            modelled_speedups=[] if cost is None else modelled_speedups(pooled.by_chain_length, cost, passes),
            sets=[tally.measurement(name) for name, tally in self.tallies.items()],
            all_sets=pooled,
        )


@dataclass(frozen=True)
class Settings:
    """How responses are decoded."""

    sampling: Sampling
    verification: Verification
    max_new_tokens: int
    batch_size: int
    seed: int


class Measuring:
    """Decodes conversations without speculation and with each contender.

    Args:
        verifier: The verifier.
        template: Its chat template, with the tokenizer.
        contenders: The contenders to measure; their tallies are filled.
        settings: How responses are decoded.

    Raises:
        UsageError: A contender does not fit the verifier.
    """

    def __init__(
        self,
        verifier: PreTrainedModel,
        template: ChatTemplate,
        contenders: Sequence[Contender],
        settings: Settings,
    ) -> None:
        self.verifier = verifier
        self.template = template
        self.contenders = contenders
        self.settings = settings
        self.alone = Decoder(verifier, sampling=settings.sampling, timed=True)
        self.decoders = [
            Decoder(verifier, one.draft, one.proposal, settings.sampling, settings.verification, timed=True)
            for one in contenders
        ]
        self._is_warm = False

    def run(self, name: str, conversations: Sequence[Conversation], report: Callable[[int], object]) -> None:
        """Measure a prompt set.

        Args:
            name: Its name.
            conversations: Its prompts.
            report: Called with the number of new responses.

        Raises:
            UsageError: A prompt is empty, or leaves no room in the verifier's context.
        """
        for contender in self.contenders:
            contender.tallies[name] = RoundTally()
        size = self.settings.batch_size
        for first in range(0, len(conversations), size):
            self._converse(name, first, conversations[first : first + size], report)

    def _converse(self, name: str, first: int, batch: Sequence[Conversation], report: Callable[[int], object]) -> None:
        """Answer the conversations of a batch turn by turn; all continue with the replies without speculation."""
        replies: list[list[str]] = [[] for _ in batch]
        for turn in range(max(len(one.turns) for one in batch)):
            active = [number for number, one in enumerate(batch) if turn < len(one.turns)]
            prompts = [torch.tensor(batch[number].prompt(turn, replies[number], self.template)) for number in active]
            keys = [(name, first + number) for number in active]
            for number, response in zip(active, self._answer(keys, prompts), strict=True):
                replies[number].append(reply_text(response, self.template.tokenizer))
            report(len(active))

    def _answer(self, keys: list[tuple[str, int]], prompts: list[Tensor]) -> list[list[int]]:
        """Answer prompts without speculation and with every contender; return the responses without speculation."""
        self._warm_up(prompts)
        alone = _gather(self.alone, prompts, self.settings)
        responses = [[token for emission in emissions for token in emission.tokens] for emissions in alone]
        comparable = responses if self.settings.sampling.is_greedy else None
        recorded = [
            torch.cat([prompt, torch.tensor(response)]) for prompt, response in zip(prompts, responses, strict=True)
        ]
        for contender, decoder in zip(self.contenders, self.decoders, strict=True):
            emissions = _gather(decoder, prompts, self.settings)
            tally = RoundTally(
                responses=[
                    Response.of(key, one, None if comparable is None else comparable[row])
                    for row, (key, one) in enumerate(zip(keys, emissions, strict=True))
                ],
                times=decoder.times,
                alone_tokens=sum(len(tokens) - 1 for tokens in responses),
                alone_seconds=self.alone.times.total,
                chains=[
                    self._replay_chains(contender, text.to(self.verifier.device), len(prompt))
                    for text, prompt in zip(recorded, prompts, strict=True)
                ],
                agreement=sum(map(partial(self._compare, contender), prompts, emissions), Agreement()),
            )
            contender.tallies[keys[0][0]] += tally
        return responses

    def _warm_up(self, prompts: list[Tensor]) -> None:
        """Run every decoder once before timing."""
        if self._is_warm:
            return
        self._is_warm = True
        few = Settings(self.settings.sampling, self.settings.verification, 8, 1, self.settings.seed)
        for decoder in (self.alone, *self.decoders):
            _gather(decoder, prompts[:1], few)

    @torch.no_grad()
    def _replay_chains(self, contender: Contender, text: Tensor, begin: int) -> Rounds:
        """Replay chains of 1 .. ``CHAIN`` tokens on the response without speculation."""
        lengths = torch.tensor([max(len(text) - 1 - begin, 0)], device=text.device)
        draft = contender.draft
        if draft is None:
            return self._replay_method(contender, text, begin)
        features = self._features(draft.aux_layers, text)
        greedy, drawn = chain_acceptance(
            draft, self.alone.parts, text, features, begin, self._chain(draft), self.settings.sampling
        )
        chosen = drawn if contender.proposal.proposal_type == "sampling" else greedy
        return replay(chosen.T[None], lengths)

    def _compare(self, contender: Contender, prompt: Tensor, emissions: Sequence[Emission]) -> Agreement:
        """Compare the rounds of a response with a replay of its own text, if the text determines them."""
        draft, proposal = contender.draft, contender.proposal
        is_determined = self.settings.sampling.is_greedy and not is_lossy(self.settings.verification, proposal)
        if draft is None or not isinstance(proposal, CHAINS) or not is_determined:
            return Agreement()
        response = [token for one in emissions for token in one.tokens]
        text = torch.cat([prompt, torch.tensor(response)]).to(self.verifier.device)
        accepted = [one.accepted for one in emissions if one.drafted is not None]
        features = self._features(draft.aux_layers, text)
        return compare_rounds(draft, text, features, len(prompt), accepted, proposal.speculative_tokens)

    def _replay_method(self, contender: Contender, text: Tensor, begin: int) -> Rounds:
        """Replay a method without a draft, separately for each length."""
        tokens = torch.tensor(float(len(text) - 1 - begin))
        no_features = Features(torch.empty(1, 0, 0), torch.empty(1, 0, 0))
        counts = []
        for length in range(1, CHAIN + 1):
            proposal = contender.proposal.model_copy(update={"speculative_tokens": length})
            proposer = contender.proposer(proposal, self.settings.sampling, RandomSource())
            counts.append(len(replay_text(proposer, None, text, no_features, begin)))
        return Rounds(tokens, torch.tensor(counts, dtype=torch.float64), torch.empty(0))

    def _features(self, aux_layers: list[int], text: Tensor) -> Features:
        return capture(self.verifier, text[None], torch.arange(len(text), device=text.device)[None], aux_layers)

    def _chain(self, draft: SpeculatorModel) -> int:
        return draft.drafter(1).max_depth or CHAIN


def _gather(decoder: Decoder, prompts: list[Tensor], settings: Settings) -> list[list[Emission]]:
    """Decode a batch of prompts and return the emissions of each."""
    gathered: list[list[Emission]] = [[] for _ in prompts]
    decoder.times = Times()
    for emission in decoder.decode(prompts, settings.max_new_tokens, settings.seed):
        gathered[emission.sequence].append(emission)
    return gathered
