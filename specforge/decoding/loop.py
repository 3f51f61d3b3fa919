"""The loop of speculative decoding: propose, verify in one forward pass, commit the accepted tokens.

The verifier has processed the first n tokens of a sequence x_0 .. x_n: x_n, the *root*, is decided but not processed
yet. A round proposes a tree after the root, runs the verifier over root and tree, commits root and accepted path, and
ends with the verifier's next token, the new root. The draft then reads the committed tokens' features, each paired
with the token after it.
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
from specforge.decoding.settings import Verification
from specforge.decoding.verification import Verdict, verify
from specforge.decoding.verifier import CachedVerifier
from specforge.errors import UsageError
from specforge.hookspecs import ProposalMethod
from specforge.models.drafter import Drafter
from specforge.models.speculator import SpeculatorModel
from specforge.proposals.proposal import Proposal, Proposer
from specforge.registry import installed
from specforge.sampling import RandomSource, RowRandomSource, Sampling
from specforge.verifier.features import Features, check_logits
from specforge.verifier.parts import VerifierParts


@dataclass(frozen=True)
class Emission:
    """What one round adds to one sequence.

    Attributes:
        sequence: Index of the sequence.
        tokens: The tokens, cut after a stop token or when the sequence is full.
        drafted: Number of proposed tokens; None for the first token, which comes from the prefill.
        path: Number of ``tokens`` that were proposed; the one after them is the verifier's own.
    """

    sequence: int
    tokens: list[int]
    drafted: int | None
    path: int

    @property
    def accepted(self) -> int:
        """Number of accepted tokens; a round always yields 1 + accepted.

        A proposed stop token counts as the verifier's own token.
        """
        return len(self.tokens) - 1


@dataclass
class Times:
    """Seconds of one decoding.

    Attributes:
        draft: Proposing, and reading features. On an accelerator, this and the next are the device's times only if the
            decoder is ``timed``.
        verifier: The verifier's forward passes and logits after the prefill.
        prompt: The prefill.
        total: Everything after the prefill.
        rounds: Number of rounds.
    """

    draft: float = 0.0
    verifier: float = 0.0
    prompt: float = 0.0
    total: float = 0.0
    rounds: int = 0


class Decoder:
    """Decodes with a verifier and, if a proposal method is given, with speculation.

    Args:
        verifier: Any transformers causal language model.
        draft: The draft; None for methods that need none.
        proposal: Settings of the proposal method; None decodes without speculation.
        sampling: How tokens are chosen.
        verification: How proposed tokens are verified.
        stop_tokens: Ids that end a sequence; None takes those of the verifier's ``generation_config``.
        timed: Whether to wait for an accelerator between the parts of a round, so that ``times`` tells them apart.

    Raises:
        UsageError: Draft, proposal method and verifier do not fit together.
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
        proposer = self._proposer(proposal, self.sampling, RandomSource())
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
                f"{method.name} proposes {proposer.depth} tokens ahead, but this draft supports at most {most}"
            )

    @torch.no_grad()
    def decode(
        self, prompts: Sequence[Tensor], max_new_tokens: int, seed: int | Sequence[int] | None = None
    ) -> Iterator[Emission]:
        """Decode a batch of prompts, round by round.

        Args:
            prompts: Tokens of each prompt, int64 [T] each; their lengths may differ.
            max_new_tokens: Maximum number of tokens to add to each.
            seed: Seed of all randomness; None uses the device's default generator. One seed for each prompt makes its
                text independent of the rest of the batch, up to rounding; only without a proposal method.

        Yields:
            What each round adds to each unfinished sequence.

        Raises:
            UsageError: A prompt is empty, or leaves no room in the verifier's context.
            ValueError: There is a seed for each prompt and a proposal method.
        """
        check_prompts(prompts, self._context)
        if not prompts or max_new_tokens < 1:
            return
        room = [min(max_new_tokens, self._context - len(prompt)) for prompt in prompts]
        self.times = Times()
        rng = self._chance(seed, max(room))
        yield from _Sequences(self, [one.to(self.verifier.device) for one in prompts], room, rng).rounds()

    def _chance(self, seed: int | Sequence[int] | None, most: int) -> RandomSource:
        device = self.verifier.device
        if not isinstance(seed, Sequence):
            return RandomSource(None if seed is None else torch.Generator(device).manual_seed(seed))
        if self.proposal is not None:
            raise ValueError("a seed for each prompt works only without a proposal method")
        return RowRandomSource(seed, most, device)


class _Sequences:
    """The unfinished sequences of a batch, and the rounds over them."""

    def __init__(self, decoder: Decoder, prompts: list[Tensor], room: list[int], rng: RandomSource) -> None:
        self.decoder = decoder
        self.rng = rng
        self.sequences = prompts
        self.numbers = list(range(len(prompts)))
        self.room = room
        self.root = torch.empty(0)
        draft = decoder.draft
        self.cached_verifier = CachedVerifier(decoder.verifier, [] if draft is None else draft.aux_layers, len(prompts))
        self.proposer: Proposer | None = None
        self.drafter: Drafter | None = None
        if decoder.proposal is not None:
            self.proposer = decoder._proposer(decoder.proposal, decoder.sampling, rng)
            if self.proposer.needs_draft:
                assert draft is not None
                self.drafter = draft.drafter(len(prompts))

    def rounds(self) -> Iterator[Emission]:
        times = self.decoder.times
        began = self._now()
        emissions = self._begin()
        # The draft's time over the prompts counts as prefill, not as rounds.
        times.prompt, times.draft = self._now() - began, 0.0
        yield from emissions
        while self.sequences:
            began = self._now()
            emissions = self._round()
            times.total += self._now() - began
            times.rounds += 1
            yield from emissions

    def _begin(self) -> list[Emission]:
        """Process the prompts and choose the first tokens."""
        counts = torch.tensor([len(one) for one in self.sequences], device=self.decoder.verifier.device)
        tokens = pad_sequence(self.sequences, batch_first=True)
        features = self.cached_verifier.begin(tokens)
        self.cached_verifier.cache.keep_first(counts)
        if self.drafter is not None:
            self.drafter.begin(tokens[:, 0])
        rows = torch.arange(len(counts), device=counts.device)
        self.root = self.decoder.sampling.choose(self.decoder.parts.logits(features.last[rows, counts - 1]), self.rng)
        emissions, active_rows = self._emit(self.root[:, None].tolist(), None)
        following = tokens.roll(-1, dims=1).index_put((rows, counts - 1), self.root)
        self._commit_to_draft(following, features, counts, active_rows)
        return emissions

    def _round(self) -> list[Emission]:
        began = self._now()
        proposal = self._propose()
        proposed = self._now()
        tokens = torch.cat([self.root[:, None], proposal.tokens], dim=1)
        parents = torch.cat([torch.full_like(self.root, -1)[:, None], proposal.parents + 1], dim=1)
        features = self.cached_verifier.run(tokens, parents)
        logits = self.decoder.parts.logits(features.last)
        verified = self._now()
        self.decoder.times.draft += proposed - began
        self.decoder.times.verifier += verified - proposed
        verdict = verify(proposal, logits, self.decoder.sampling, self.decoder.verification, self.rng)
        return self._commit(proposal, verdict, features)

    def _propose(self) -> Proposal:
        if self.proposer is None:
            return _empty_proposal(self.root)
        proposal = self.proposer.propose(self.sequences, self.drafter)
        # Tokens beyond the room left would be verified in vain.
        return proposal.within(torch.tensor(self.room, device=self.root.device) - 1)

    def _commit(self, proposal: Proposal, verdict: Verdict, features: Features) -> list[Emission]:
        """Commit the root and the accepted path; the verifier's next token becomes the root."""
        rows = torch.arange(len(self.root), device=self.root.device)[:, None]
        path = torch.cat([torch.zeros_like(self.root)[:, None], verdict.nodes + 1], dim=1)
        self.cached_verifier.cache.keep(path, verdict.counts + 1)
        emitted = torch.cat([proposal.tokens[rows, verdict.nodes], self.root[:, None]], dim=1)
        emitted = emitted.scatter(1, verdict.counts[:, None], verdict.next_tokens[:, None])
        self.root = verdict.next_tokens
        # In one copy to the host.
        table = torch.cat([emitted, verdict.counts[:, None], proposal.counts[:, None]], dim=1).tolist()
        tokens_per_row = [tokens[: accepted + 1] for *tokens, accepted, _ in table]
        emissions, active_rows = self._emit(tokens_per_row, [drafted for *_, drafted in table])
        self._commit_to_draft(
            emitted, Features(features.aux[rows, path], features.last[rows, path]), verdict.counts + 1, active_rows
        )
        return emissions

    def _emit(self, tokens_per_row: list[list[int]], drafted: list[int] | None) -> tuple[list[Emission], list[int]]:
        """Add the round's tokens to the sequences; return them, and the rows of the unfinished sequences.

        Args:
            tokens_per_row: New tokens of each sequence: the accepted ones, then the verifier's own.
            drafted: Number of tokens proposed for each; None for the prefill.
        """
        emissions, active_rows = [], []
        for row, tokens in enumerate(tokens_per_row):
            taken, ended = self._cut(tokens, self.room[row])
            proposed = None if drafted is None else drafted[row]
            emissions.append(Emission(self.numbers[row], taken, proposed, path=min(len(tokens) - 1, len(taken))))
            self.room[row] -= len(taken)
            self.sequences[row] = torch.cat([self.sequences[row], self.sequences[row].new_tensor(taken)])
            if not ended:
                active_rows.append(row)
        return emissions, active_rows

    def _commit_to_draft(self, following: Tensor, features: Features, counts: Tensor, active_rows: list[int]) -> None:
        """Drop the finished sequences; commit the new tokens of the others to the draft.

        Args:
            following: The token after each newly processed one, int64 [B, Q].
            features: The verifier's states at the processed tokens, [B, Q, ...].
            counts: Number of real ones among the Q, int64 [B].
            active_rows: Rows of the unfinished sequences.
        """
        if len(active_rows) < len(self.sequences):
            rows = torch.tensor(active_rows, dtype=torch.int64, device=following.device)
            self._select(rows)
            following, counts = following[rows], counts[rows]
            features = Features(features.aux[rows], features.last[rows])
        if self.drafter is not None and active_rows:
            began = self._now()
            self.drafter.commit(following, features, counts)
            self.decoder.times.draft += self._now() - began

    def _now(self) -> float:
        """Return the time; if times are wanted, once the device has finished its queued work."""
        if self.decoder.timed and torch.accelerator.is_available():
            torch.accelerator.synchronize()
        return time.perf_counter()

    def _cut(self, tokens: list[int], room: int) -> tuple[list[int], bool]:
        """Cut tokens after a stop token and at the room left; return them and whether the sequence has ended."""
        stop = next((index for index, token in enumerate(tokens) if token in self.decoder.stop_tokens), None)
        taken = tokens if stop is None else tokens[: stop + 1]
        return taken[:room], stop is not None or len(taken) >= room

    def _select(self, rows: Tensor) -> None:
        kept = rows.tolist()
        self.sequences = [self.sequences[row] for row in kept]
        self.numbers = [self.numbers[row] for row in kept]
        self.room = [self.room[row] for row in kept]
        self.root = self.root[rows]
        self.cached_verifier.cache.select(rows)
        self.rng.keep_rows(rows)
        if self.drafter is not None:
            self.drafter.select(rows)


def _empty_proposal(root: Tensor) -> Proposal:
    empty = root.new_empty(len(root), 0)
    return Proposal(empty, empty, torch.zeros_like(root))
