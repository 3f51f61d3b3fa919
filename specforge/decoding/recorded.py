"""Acceptance on a recorded text: what a draft would have proposed at each token, without running the verifier."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from specforge.models.drafter import Drafter
from specforge.models.speculator import SpeculatorModel
from specforge.proposals.proposal import Proposer
from specforge.sampling import Sampling
from specforge.verifier.features import Features
from specforge.verifier.parts import VerifierParts

# Maximum number of logits in memory at once: 64 MiB in float32.
LOGITS_PER_CHUNK = 2**24


def label_log_probs(logits: Tensor, labels: Tensor, sampling: Sampling) -> Tensor:
    """Return the log-probability that each label is sampled with, [n].

    Args:
        logits: [n, W].
        labels: Index of each label, int64 [n]; -1 for a token outside the vocabulary, which gets minus infinity.
        sampling: Settings above temperature 0.
    """
    found = sampling.log_probs(logits).gather(1, labels.clamp(min=0)[:, None]).squeeze(1)
    return torch.where(labels >= 0, found, -torch.inf)


def acceptance_of_drawn(log_q: Tensor, log_p: Tensor) -> Tensor:
    """Return min(1, q(y) / p(y)) for tokens y that the verifier sampled (Leviathan et al., arXiv 2211.17192)."""
    # 0 / 0 (the text cannot have been sampled with these settings) counts as a token that is never drawn.
    return torch.where(log_q.isneginf(), 0, (log_q - log_p).clamp(max=0).exp())


def draft_indices(tokens: Tensor, draft_ids: Tensor | None) -> Tensor:
    """Map the verifier's ids [...] to indices in the draft vocabulary; -1 for tokens that are not in it."""
    if draft_ids is None:
        return tokens
    index = torch.searchsorted(draft_ids, tokens).clamp(max=draft_ids.numel() - 1)
    return torch.where(draft_ids[index] == tokens, index, -1)


@torch.no_grad()
def chain_acceptance(
    draft: SpeculatorModel,
    parts: VerifierParts,
    tokens: Tensor,
    features: Features,
    begin: int,
    steps: int,
    sampling: Sampling,
) -> tuple[Tensor, Tensor]:
    """Compute the acceptance probabilities of a draft's chains on a text that the verifier wrote.

    Args:
        draft: The draft.
        parts: The verifier's norm and head.
        tokens: Prompt and response, int64 [T].
        features: The verifier's states over them, [1, T, ...].
        begin: Index s of the first response token.
        steps: Number S of steps.
        sampling: How the verifier chose its tokens.

    Returns:
        Those of greedy and of sampled chains, [S, N] each for the N anchors of the response; equal at temperature 0.
        Steps beyond the end of the text are 0.
    """
    positions = torch.arange(len(tokens), device=tokens.device)[None]
    hidden = draft.unroll(tokens[None], features, positions, torch.zeros_like(positions), steps)[:, 0]
    anchors = len(tokens) - 1 - begin
    greedy = torch.zeros(steps, anchors, device=tokens.device)
    drawn = torch.zeros_like(greedy)
    for step in range(steps):
        for row in chunks(anchors - step, parts.lm_head.weight.shape[0]):
            # Anchor j is row t = s - 1 + j, whose step i drafts x_{t+2+i}.
            rows = begin - 1 + row
            labels = tokens[rows + 2 + step]
            draft_labels = draft_indices(labels, draft.draft_ids)
            q = draft.logits(hidden[step, rows], step)
            greedy[step, row] = (q.argmax(-1) == draft_labels).to(greedy.dtype)
            if not sampling.is_greedy:
                p = parts.logits(features.last[0, rows + 1 + step])
                accepted = acceptance_of_drawn(
                    label_log_probs(q, draft_labels, sampling), label_log_probs(p, labels, sampling)
                )
                drawn[step, row] = accepted.to(drawn.dtype)
    return greedy, greedy if sampling.is_greedy else drawn


def replay_text(
    proposer: Proposer, drafter: Drafter | None, tokens: Tensor, features: Features, begin: int
) -> list[tuple[int, int]]:
    """Replay the decoding of a verifier's text with a deterministic proposal method, trees included.

    A round accepts the longest proposed path that the text continues with. The verifier is not run.

    Args:
        proposer: The method; it must not sample.
        drafter: A draft for one sequence; None for methods that need none.
        tokens: Prompt and response, int64 [T].
        features: The verifier's states over them, [1, T, ...].
        begin: Index s of the first response token.

    Returns:
        For each round, the number of proposed and accepted tokens; a round yields one more than it accepts.
    """
    rounds = []
    root = begin
    committed = 0
    if drafter is not None:
        drafter.begin(tokens[:1])
    while root < len(tokens) - 1:
        if drafter is not None:
            new = slice(committed, root)
            some = Features(features.aux[:, new], features.last[:, new])
            counts = torch.tensor([root - committed], device=tokens.device)
            drafter.commit(tokens[committed + 1 : root + 1][None], some, counts)
            committed = root
        room = torch.tensor([len(tokens) - 2 - root], device=tokens.device)
        proposal = proposer.propose([tokens[: root + 1]], drafter).within(room)
        assert proposal.log_q is None
        depths = proposal.depths[0]
        fits = proposal.tokens[0] == tokens[root + depths]
        reached = (fits | ~proposal.ancestors[0]).all(-1)
        accepted = int((depths * reached).max()) if len(fits) else 0
        rounds.append((int(proposal.counts[0]), accepted))
        root += accepted + 1
    return rounds


def chunks(rows: int, vocabulary: int) -> Iterator[Tensor]:
    """Split rows of logits to bound memory; yield the indices of each chunk."""
    return iter(torch.arange(max(rows, 0)).split(max(1, LOGITS_PER_CHUNK // vocabulary)))
