"""Proposal methods on trial: the tree that each proposes, and the text that it decodes."""

from __future__ import annotations

import torch
from torch import Tensor

from specforge.commands.plugin_trial import Trial
from specforge.config import TokenProposalConfig
from specforge.hookspecs import ProposalMethod
from specforge.proposals.choice import choose_proposal
from specforge.proposals.proposal import Proposal, Proposer
from specforge.registry import installed
from specforge.sampling import RandomSource, Sampling
from specforge.verifier.features import Features

PROMPT, NEW_TOKENS = 5, 16


@torch.no_grad()
def proposing(trial: Trial, method: str) -> str | None:
    """Return a fault in the trees that a method proposes for two prompts."""
    prompts = _prompts(trial)
    features = [trial.features(prompt[:-1]) for prompt in prompts]
    drafter = trial.draft.drafter(len(prompts))
    drafter.begin(prompts[:, 0])
    states = Features(torch.cat([one.aux for one in features]), torch.cat([one.last for one in features]))
    drafter.commit(prompts[:, 1:], states, torch.full((len(prompts),), PROMPT - 1))
    kind: type[Proposer] = installed().load(installed().find(ProposalMethod, method), "proposer")
    proposer = kind(_settings(trial, method), Sampling(), RandomSource())
    return malformed(proposer.propose(list(prompts), drafter), proposer.depth)


def malformed(tree: Proposal, depth: int) -> str | None:
    """Return what is wrong with proposed trees, or None.

    Args:
        tree: The trees.
        depth: Number of tokens that their paths may have.
    """
    nodes = torch.arange(tree.parents.shape[1])
    real = nodes < tree.counts[:, None]
    if bool(((tree.parents >= nodes) | (tree.parents < -1))[real].any()):
        return "the parent of a node is neither -1, the root, nor the index of an earlier node"
    if bool((tree.depths.diff(dim=1) < 0)[real[:, 1:]].any()):
        return "nodes are not ordered by depth"
    if bool((tree.depths > depth)[real].any()):
        return f"a path is longer than the method's depth of {depth}"
    for row, count in enumerate(tree.counts.tolist()):
        siblings = list(zip(tree.parents[row, :count].tolist(), tree.tokens[row, :count].tolist(), strict=True))
        if len(set(siblings)) < count:
            return "two children of a node are the same token; only the first of them can be accepted"
    return None


def decoding(trial: Trial, method: str) -> str | None:
    """Return a fault if text at temperature 0 differs from the verifier's own."""
    prompts = _prompts(trial)
    own = trial.verifier.generate(prompts, do_sample=False, max_new_tokens=NEW_TOKENS, pad_token_id=0)
    settings = _settings(trial, method)
    text = trial.draft.generate(prompts, max_new_tokens=NEW_TOKENS, proposal=settings, pad_token_id=0)
    assert isinstance(text, Tensor)
    if torch.equal(text, own):
        return None
    return f"the text is {text[0, PROMPT:].tolist()}, but the verifier's own is {own[0, PROMPT:].tolist()}"


def _prompts(trial: Trial) -> Tensor:
    return torch.stack([trial.tokens[:PROMPT], trial.tokens[9 : 9 + PROMPT]])


def _settings(trial: Trial, method: str) -> TokenProposalConfig:
    """Return a proposal method's settings with chains or trees no deeper than the draft's."""
    proposal, depth = choose_proposal(method, trial.draft.config), trial.draft.drafter(1).max_depth
    # A tree has ``depth``; its ``speculative_tokens`` count nodes.
    name = next((one for one in ("depth", "speculative_tokens") if one in type(proposal).model_fields), None)
    if depth is None or name is None:
        return proposal
    return proposal.model_copy(update={name: min(depth, getattr(proposal, name))})
