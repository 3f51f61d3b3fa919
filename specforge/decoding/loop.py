"""The loop of speculative decoding: propose, verify in one pass, commit what was accepted.

The verifier has processed the first n tokens of a sequence x_0 .. x_n: x_n, the *root*, is decided but not processed
yet. A round proposes a tree behind the root, runs the verifier over root and tree, commits root and accepted path, and
ends with the token that the verifier says next, the new root. The draft takes in the committed tokens' features, each
beside the token after it.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import PreTrainedModel

from specforge.config import TokenProposalConfig
from specforge.decoding.checks import check_fit, check_prompts, check_served, context_length, default_stop_tokens
from specforge.decoding.verification import Verdict, Verification, verify
from specforge.decoding.verifier import VerifierPasses
from specforge.errors import UsageError
from specforge.hookspecs import ProposalMethod
from specforge.models.drafter import Drafter
from specforge.models.speculator import SpeculatorModel
from specforge.proposals.proposal import Proposal, Proposer
from specforge.registry import installed
from specforge.sampling import Chance, RowChance, Sampling
from specforge.verifier.features import Features, check_logits
from specforge.verifier.parts import VerifierParts


@dataclass(frozen=True)
class Emission:
    """What one round adds to one sequence.

    Attributes:
        sequence: Index of the sequence.
        tokens: The tokens, cut after a stop token or where the sequence is full.
        drafted: How many tokens were proposed; None for the first token, which comes with the prompt's pass.
        path: How many of ``tokens`` were proposed; the one behind them is the verifier's own.
    """

    sequence: int
    tokens: list[int]
    drafted: int | None
    path: int

    @property
    def accepted(self) -> int:
        """Accepted tokens, so that a round always yields 1 + accepted.

        Where a stop token was proposed, it counts as the token of the verifier's pass.
        """
        return len(self.tokens) - 1


@dataclass
class Times:
    """Seconds of one decoding.

    Attributes:
        draft: Proposing, and taking in features. On an accelerator this and the next tell what the device did only
            if the decoder is ``timed``.
        verifier: The verifier's passes and logits, after the prompt's.
        prompt: The prompt's pass.
        total: Everything after the prompt's pass.
        rounds: Number of rounds.
    """

    draft: float = 0.0
    verifier: float = 0.0
    prompt: float = 0.0
    total: float = 0.0
    rounds: int = 0


class Decoder:
    """Decodes with a verifier and, where a proposal method is given, with speculation.

    Args:
        verifier: Any transformers causal language model.
        draft: Whose proposals are verified; None for methods that need none.
        proposal: Settings of the proposal method; None decodes with the verifier alone.
        sampling: How tokens are chosen.
        verification: How proposed tokens are verified.
        stop_tokens: Ids that end a sequence; those of the verifier's ``generation_config`` when None.
        timed: Whether to wait for an accelerator between the parts of a round, so that ``times`` tells them apart.

    Raises:
        UsageError: Draft, proposal method and verifier do not go together.
    """

    def __init__(
        self,
        verifier: PreTrainedModel,
        draft: SpeculatorModel | None = None,
        proposal: TokenProposalConfig | None = None,
        sampling: Sampling | None = None,
        verification: Verification | None = None,
        stop_tokens: Sequence[int] | None = None,
        timed: bool = False,
    ) -> None:
        self.verifier = verifier
        self.draft = draft
        self.proposal = proposal
        self.sampling = sampling or Sampling()
        self.verification = verification or Verification()
        self.stop_tokens = set(default_stop_tokens(verifier) if stop_tokens is None else stop_tokens)
        self.times = Times()
        self.timed = timed
        self.parts = VerifierParts.of(verifier)
        self._context = context_length(verifier)
        check_logits(verifier)
        if proposal is not None:
            self._check(proposal)

    def _check(self, proposal: TokenProposalConfig) -> None:
        method = installed().find(ProposalMethod, proposal.proposal_type)
        self._proposer: type[Proposer] = installed().load(method, "proposer")
        proposer = self._proposer(proposal, self.sampling, Chance())
        proposer.check(self.verifier.config.get_text_config().vocab_size)
        if not proposer.needs_draft:
            return
        if self.draft is None:
            raise UsageError(f"the proposal method {method.name!r} needs a draft")
        check_fit(self.draft, self.verifier.config)
        check_served(self.draft, method.name)
        most = self.draft.drafter(1).max_depth
        if most is not None and proposer.depth > most:
            raise UsageError(
                f"{method.name} proposes {proposer.depth} tokens ahead, but this draft can do {most} at most"
            )

    @torch.no_grad()
    def decode(
        self, prompts: Sequence[Tensor], max_new_tokens: int, seed: int | Sequence[int] | None = None
    ) -> Iterator[Emission]:
        """Decode prompts side by side, round by round.

        Args:
            prompts: Tokens of each prompt, int64 [T] each; their lengths may differ.
            max_new_tokens: Most tokens to add to each.
            seed: Seed of everything random; None takes the device's own state. One for each prompt makes its text
                independent of those beside it, up to rounding; only where nothing is proposed.

        Yields:
            What each round adds to each sequence that is still going.

        Raises:
            UsageError: A prompt is empty, or leaves no room in the verifier's context.
            ValueError: There is a seed for each prompt, and a proposal method.
        """
        check_prompts(prompts, self._context)
        if not prompts or max_new_tokens < 1:
            return
        room = [min(max_new_tokens, self._context - len(prompt)) for prompt in prompts]
        self.times = Times()
        chance = self._chance(seed, max(room))
        yield from _Sequences(self, [one.to(self.verifier.device) for one in prompts], room, chance).rounds()

    def _chance(self, seed: int | Sequence[int] | None, most: int) -> Chance:
        device = self.verifier.device
        if not isinstance(seed, Sequence):
            return Chance(None if seed is None else torch.Generator(device).manual_seed(seed))
        if self.proposal is not None:
            raise ValueError("a seed for each prompt: only without a proposal method")
        return RowChance(seed, most, device)


class _Sequences:
    """The sequences that are going, and one round after the other over them."""

    def __init__(self, decoder: Decoder, prompts: list[Tensor], room: list[int], chance: Chance) -> None:
        self.decoder = decoder
        self.chance = chance
        self.sequences = prompts
        self.numbers = list(range(len(prompts)))
        self.room = room
        self.root = torch.empty(0)
        draft = decoder.draft
        self.passes = VerifierPasses(decoder.verifier, [] if draft is None else draft.aux_layers, len(prompts))
        self.proposer: Proposer | None = None
        self.drafter: Drafter | None = None
        if decoder.proposal is not None:
            self.proposer = decoder._proposer(decoder.proposal, decoder.sampling, chance)
            if self.proposer.needs_draft:
                assert draft is not None
                self.drafter = draft.drafter(len(prompts))

    def rounds(self) -> Iterator[Emission]:
        times = self.decoder.times
        began = self._now()
        emissions = self._begin()
        # What the draft took of the prompts counts with them, not with the rounds.
        times.prompt, times.draft = self._now() - began, 0.0
        yield from emissions
        while self.sequences:
            began = self._now()
            emissions = self._round()
            times.total += self._now() - began
            times.rounds += 1
            yield from emissions

    def _begin(self) -> list[Emission]:
        """Process the prompts; the first token comes with them."""
        counts = torch.tensor([len(one) for one in self.sequences], device=self.decoder.verifier.device)
        tokens = pad_sequence(self.sequences, batch_first=True)
        features = self.passes.begin(tokens)
        self.passes.cache.keep_first(counts)
        if self.drafter is not None:
            self.drafter.begin(tokens[:, 0])
        rows = torch.arange(len(counts), device=counts.device)
        self.root = self.decoder.sampling.choose(
            self.decoder.parts.logits(features.last[rows, counts - 1]), self.chance
        )
        emissions, going = self._hand_out(self.root[:, None].tolist(), None)
        following = tokens.roll(-1, dims=1).index_put((rows, counts - 1), self.root)
        self._take_in(following, features, counts, going)
        return emissions

    def _round(self) -> list[Emission]:
        began = self._now()
        proposal = self._propose()
        proposed = self._now()
        tokens = torch.cat([self.root[:, None], proposal.tokens], dim=1)
        parents = torch.cat([torch.full_like(self.root, -1)[:, None], proposal.parents + 1], dim=1)
        features = self.passes.run(tokens, parents)
        logits = self.decoder.parts.logits(features.last)
        verified = self._now()
        self.decoder.times.draft += proposed - began
        self.decoder.times.verifier += verified - proposed
        verdict = verify(proposal, logits, self.decoder.sampling, self.decoder.verification, self.chance)
        return self._commit(proposal, verdict, features)

    def _propose(self) -> Proposal:
        if self.proposer is None:
            return _nothing(self.root)
        proposal = self.proposer.propose(self.sequences, self.drafter)
        # Tokens behind the last one that there is room for would be verified in vain.
        return proposal.within(torch.tensor(self.room, device=self.root.device) - 1)

    def _commit(self, proposal: Proposal, verdict: Verdict, features: Features) -> list[Emission]:
        """Commit the root and the accepted path; the verifier's next token becomes the root."""
        rows = torch.arange(len(self.root), device=self.root.device)[:, None]
        path = torch.cat([torch.zeros_like(self.root)[:, None], verdict.nodes + 1], dim=1)
        self.passes.cache.keep(path, verdict.counts + 1)
        emitted = torch.cat([proposal.tokens[rows, verdict.nodes], self.root[:, None]], dim=1)
        emitted = emitted.scatter(1, verdict.counts[:, None], verdict.next_tokens[:, None])
        self.root = verdict.next_tokens
        # In one copy to the host.
        table = torch.cat([emitted, verdict.counts[:, None], proposal.counts[:, None]], dim=1).tolist()
        said = [tokens[: accepted + 1] for *tokens, accepted, _ in table]
        emissions, going = self._hand_out(said, [drafted for *_, drafted in table])
        self._take_in(emitted, Features(features.aux[rows, path], features.last[rows, path]), verdict.counts + 1, going)
        return emissions

    def _hand_out(self, said: list[list[int]], drafted: list[int] | None) -> tuple[list[Emission], list[int]]:
        """Add the round's tokens to the sequences; return them, and the rows of the sequences that go on.

        Args:
            said: What each sequence gets: accepted tokens, then the verifier's own.
            drafted: How many tokens were proposed for each; None for the prompts' pass.
        """
        emissions, going = [], []
        for row, tokens in enumerate(said):
            taken, ended = self._cut(tokens, self.room[row])
            proposed = None if drafted is None else drafted[row]
            emissions.append(Emission(self.numbers[row], taken, proposed, path=min(len(tokens) - 1, len(taken))))
            self.room[row] -= len(taken)
            self.sequences[row] = torch.cat([self.sequences[row], self.sequences[row].new_tensor(taken)])
            if not ended:
                going.append(row)
        return emissions, going

    def _take_in(self, following: Tensor, features: Features, counts: Tensor, going: list[int]) -> None:
        """Leave out the sequences that have ended; the draft takes in what was decided for the others.

        Args:
            following: The token after each newly processed one, int64 [B, Q].
            features: The verifier's states at the processed tokens, [B, Q, ...].
            counts: How many of the Q are real, int64 [B].
            going: Rows of the sequences that go on.
        """
        if len(going) < len(self.sequences):
            rows = torch.tensor(going, dtype=torch.int64, device=following.device)
            self._select(rows)
            following, counts = following[rows], counts[rows]
            features = Features(features.aux[rows], features.last[rows])
        if self.drafter is not None and going:
            began = self._now()
            self.drafter.commit(following, features, counts)
            self.decoder.times.draft += self._now() - began

    def _now(self) -> float:
        """Return the time; if times are wanted, once the device has done what it was given."""
        if self.decoder.timed and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()

    def _cut(self, tokens: list[int], room: int) -> tuple[list[int], bool]:
        """Cut tokens after a stop token and at the end of the room; tell whether the sequence has ended."""
        stop = next((place for place, token in enumerate(tokens) if token in self.decoder.stop_tokens), None)
        taken = tokens if stop is None else tokens[: stop + 1]
        return taken[:room], stop is not None or len(taken) >= room

    def _select(self, rows: Tensor) -> None:
        kept = rows.tolist()
        self.sequences = [self.sequences[row] for row in kept]
        self.numbers = [self.numbers[row] for row in kept]
        self.room = [self.room[row] for row in kept]
        self.root = self.root[rows]
        self.passes.cache.select(rows)
        self.chance.select(rows)
        if self.drafter is not None:
            self.drafter.select(rows)


def _nothing(root: Tensor) -> Proposal:
    empty = root.new_empty(len(root), 0)
    return Proposal(empty, empty, torch.zeros_like(root))
