"""Which proposed tokens the verifier accepts, and which token it adds itself.

If the draft did not sample, the verifier's own choice at every node decides: the path continues as long as that choice
is among the node's children, so the output is the verifier's by construction. Sampled tokens are accepted by rejection
sampling, which keeps the verifier's distribution exactly.

Letters in shapes: B sequences, N proposed nodes, V verifier and D draft vocabulary, A accepted nodes, K chain length.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from specforge.decoding.settings import Verification
from specforge.errors import UsageError
from specforge.proposals.proposal import Proposal
from specforge.sampling import RandomSource, Sampling


@dataclass(frozen=True)
class Verdict:
    """Outcome of verifying one proposal.

    Attributes:
        nodes: Accepted nodes from the root down, int64 [B, A]; real ones first.
        counts: Number of accepted nodes in each row, int64 [B].
        next_tokens: The verifier's token after the last accepted one, int64 [B].
    """

    nodes: Tensor
    counts: Tensor
    next_tokens: Tensor


def verify(
    proposal: Proposal, logits: Tensor, sampling: Sampling, verification: Verification, rng: RandomSource
) -> Verdict:
    """Verify a proposal.

    Args:
        proposal: Trees of N candidate tokens.
        logits: The verifier's logits at the root and after each node, [B, 1 + N, V].
        sampling: How the verifier chooses its tokens.
        verification: The method.
        rng: Source of randomness.

    Raises:
        UsageError: Block verification of a sampled tree.
    """
    if verification.method == "typical" and not sampling.is_greedy:
        fits = _is_typical(proposal, sampling.log_probs(logits), verification)
        return _longest_path(proposal, fits, sampling.choose(logits, rng))
    if proposal.log_q is None or not proposal.counts.any():
        choices = sampling.choose(logits, rng)
        matches = proposal.tokens == choices.gather(1, proposal.parents + 1)
        return _longest_path(proposal, matches | _is_tolerated(proposal, logits), choices)
    drawn = _RejectionSampler(proposal, sampling.log_probs(logits).exp(), rng)
    return drawn.verify_block() if verification.method == "block" else drawn.verify_tokens()


def is_lossy(verification: Verification, proposal: object) -> bool:
    """Return whether the output may differ from the verifier's own.

    Args:
        verification: The method.
        proposal: The settings of the proposal method.
    """
    tolerant = getattr(proposal, "verifier_accept_k", 1) > 1 or getattr(proposal, "accept_tolerance", 0) > 0
    return verification.method == "typical" or tolerant


def _longest_path(proposal: Proposal, fits: Tensor, choices: Tensor) -> Verdict:
    """Accept the deepest node that fits and whose ancestors all fit."""
    batch, size = proposal.tokens.shape
    nodes = torch.arange(size, device=fits.device)
    fits = fits & (nodes < proposal.counts[:, None])
    ancestors = proposal.ancestors
    reached = (fits[:, None] | ~ancestors).all(-1)
    depths = torch.where(reached, ancestors.sum(-1), 0)
    # Prepend the root, for rows that accept nothing.
    counts, last = torch.cat([depths.new_zeros(batch, 1), depths], dim=1).max(dim=1)
    paths = torch.cat([torch.zeros_like(fits)[:, None], ancestors], dim=1)
    on_path = paths[torch.arange(batch, device=fits.device), last]
    path = torch.where(on_path, nodes, size).sort(dim=1).values[:, : int(counts.max())]
    return Verdict(path.clamp(max=max(size - 1, 0)), counts, choices.gather(1, last[:, None]).squeeze(1))


def _is_tolerated(proposal: Proposal, logits: Tensor) -> Tensor:
    """Return which tokens a tolerant proposal method accepts beyond the verifier's own choice, bool [B, N]; lossy."""
    tolerated = torch.zeros_like(proposal.tokens, dtype=torch.bool)
    if proposal.accept_k == 1 and proposal.accept_tolerance == 0:
        return tolerated
    rows = torch.arange(len(logits), device=logits.device)[:, None]
    at_parent = logits[rows, proposal.parents + 1]
    own = at_parent.gather(2, proposal.tokens[..., None])
    if proposal.accept_k > 1:
        tolerated |= (at_parent > own).sum(-1) < proposal.accept_k
    if proposal.accept_tolerance > 0:
        tolerated |= (at_parent.max(-1, keepdim=True).values - own <= proposal.accept_tolerance).squeeze(-1)
    return tolerated


def _is_typical(proposal: Proposal, log_p: Tensor, verification: Verification) -> Tensor:
    """Return which tokens are typical, bool [B, N].

    p(x) > min(threshold, alpha exp(-H(p))) (arXiv 2401.10774, section 2.3.1).
    """
    entropy = -(log_p.exp() * log_p.clamp(min=torch.finfo(log_p.dtype).min)).sum(-1)
    threshold = (verification.posterior_alpha * (-entropy).exp()).clamp(max=verification.posterior_threshold)
    parents = proposal.parents + 1
    rows = torch.arange(len(log_p), device=log_p.device)[:, None]
    return log_p[rows, parents, proposal.tokens].exp() > threshold.gather(1, parents)


class _RejectionSampler:
    """Verifies tokens that the draft has sampled.

    Args:
        proposal: A proposal with ``log_q``.
        p: The verifier's probabilities, [B, 1 + N, V].
        rng: Source of randomness.
    """

    def __init__(self, proposal: Proposal, p: Tensor, rng: RandomSource) -> None:
        assert proposal.log_q is not None
        self.proposal = proposal
        self.p = p
        self.log_q = proposal.log_q
        self.rng = rng
        self.rows = torch.arange(len(p), device=p.device)

    def verify_tokens(self) -> Verdict:
        """Recursive rejection sampling (arXiv 2305.09781, algorithm 2); for a chain, this is token verification.

        Children are tried in the order in which they were drawn. A rejected child leaves the residual r as the positive
        part of r - q; the next child was drawn from q without it.
        """
        children = self._children()
        node = torch.zeros_like(self.rows)  # 0 is the root
        active = torch.ones_like(self.rows, dtype=torch.bool)
        residual = self.p[:, 0]
        path = []
        while active.any():
            residual = torch.where(active[:, None], self.p[self.rows, node], residual)
            q = self._draft_distribution(node)
            accepted = torch.zeros_like(active)
            for child in children[self.rows, node].unbind(1):
                tried = active & ~accepted & (child > 0)
                token = self.proposal.tokens[self.rows, (child - 1).clamp(min=0)]
                target, drafted = residual[self.rows, token], q[self.rows, token]
                # A token of probability 0 only pads the tree.
                tried = tried & (drafted > 0)
                accept = tried & self.rng.bernoulli(target / drafted)
                rejected = tried & ~accept
                residual = torch.where(rejected[:, None], _positive_part(residual - q, residual), residual)
                q = torch.where(rejected[:, None], _normalised(q.index_put((self.rows, token), q.new_zeros(()))), q)
                node = torch.where(accept, child, node)
                accepted |= accept
            path.append(torch.where(accepted, node, 0))
            active = accepted
        # The last level accepted nothing; for rows that reached the end of a path, ``residual`` is p there.
        levels = torch.stack(path, dim=1)
        counts = (levels > 0).sum(1)
        return Verdict((levels - 1).clamp(min=0)[:, : int(counts.max())], counts, self.rng.categorical(residual))

    def verify_block(self) -> Verdict:
        """Block verification (arXiv 2403.10444, algorithm 2): the accepted length of a chain is drawn jointly."""
        length = self.proposal.tokens.shape[1]
        if not torch.equal(self.proposal.parents[0], torch.arange(length, device=self.p.device) - 1):
            raise UsageError("block verification takes a chain, but a tree was sampled; use token verification")
        survival = torch.ones_like(self.p[:, 0, 0])
        counts, residual = torch.zeros_like(self.rows), self.p[:, 0]
        for position in range(length + 1):
            real, ends = self.proposal.counts >= position, self.proposal.counts == position
            p = self.p[:, position]
            if position < length:
                q = self._draft_distribution(torch.full_like(self.rows, position))
                left = (survival[:, None] * p - q).clamp(min=0)
            else:
                q, left = torch.zeros_like(p), p
            remaining = left.sum(1)
            # If survival is 1 and nothing remains (0 / 0), the chain continues for certain.
            stops = (remaining / (remaining + 1 - survival)).nan_to_num(0.0)
            stops = torch.where(ends, survival, stops)
            # A chain of length 0 is always accepted.
            taken = real & self.rng.bernoulli(stops) if position else torch.ones_like(ends)
            here = torch.where(ends[:, None], p, _positive_part(left, p))
            residual = torch.where(taken[:, None], here, residual)
            counts = torch.where(taken, position, counts)
            if position < length:
                token = self.proposal.tokens[:, position]
                ratio = p[self.rows, token] / q[self.rows, token]
                survival = (survival * ratio).clamp(max=1)
        nodes = torch.arange(int(counts.max()), device=counts.device).expand(len(counts), -1)
        return Verdict(nodes, counts, self.rng.categorical(residual))

    def _children(self) -> Tensor:
        """Children of each node in drawing order, [B, 1 + N, W]; the root is node 0, so child 0 means none."""
        parents = self.proposal.parents
        batch, size = parents.shape
        nodes = torch.arange(size, device=parents.device)
        siblings = parents[..., None] == parents[:, None, :]
        rank = (siblings & (nodes < nodes[:, None])).sum(-1)
        real = nodes < self.proposal.counts[:, None]
        children = parents.new_zeros(batch, 1 + size, int(rank.max()) + 1 if size else 1)
        return children.index_put(
            (self.rows[:, None].expand_as(parents)[real], parents[real] + 1, rank[real]),
            (nodes + 1).expand_as(parents)[real],
        )

    def _draft_distribution(self, node: Tensor) -> Tensor:
        """The distribution over the verifier's tokens from which a node's children were drawn, [B, V]."""
        # Leaves have no children and no distribution; the values read for them are not used.
        q = self.log_q[self.rows, node.clamp(max=self.log_q.shape[1] - 1)].exp().to(self.p.dtype)
        if self.proposal.draft_ids is None:
            return q
        return torch.zeros_like(self.p[:, 0]).index_copy(1, self.proposal.draft_ids, q)


def _normalised(weights: Tensor) -> Tensor:
    return weights / weights.sum(1, keepdim=True).clamp(min=torch.finfo(weights.dtype).tiny)


def _positive_part(difference: Tensor, otherwise: Tensor) -> Tensor:
    """Normalise the positive part; if rounding has left nothing, return the other distribution."""
    left = difference.clamp(min=0)
    return torch.where(left.sum(1, keepdim=True) > 0, _normalised(left), otherwise)
