"""Generation with a draft, as transformers' ``generate`` looks from outside."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from specforge.config import TokenProposalConfig
from specforge.decoding.checks import default_stop_tokens
from specforge.decoding.loop import Decoder
from specforge.decoding.verification import Verification
from specforge.models.speculator import SpeculatorModel
from specforge.proposals.choice import choose_proposal
from specforge.sampling import Sampling

if TYPE_CHECKING:
    from transformers.generation.streamers import BaseStreamer


def generate(
    draft: SpeculatorModel,
    input_ids: Tensor,
    attention_mask: Tensor | None = None,
    *,
    max_new_tokens: int = 256,
    sampling: Sampling | None = None,
    proposal: str | TokenProposalConfig | None = None,
    verification: Verification | None = None,
    eos_token_id: int | Sequence[int] | None = None,
    pad_token_id: int | None = None,
    seed: int | None = None,
    streamer: BaseStreamer | None = None,
) -> Tensor:
    """Generate with a draft and its attached verifier; see ``SpeculatorModel.generate``."""
    verifier = draft.verifier
    if verifier is None:
        raise ValueError("generate needs the whole verifier; call attach_verifier(verifier, mode='full') before")
    if streamer is not None and len(input_ids) != 1:
        raise ValueError(f"a streamer takes one sequence, and there are {len(input_ids)}")
    chosen = proposal if isinstance(proposal, TokenProposalConfig) else choose_proposal(proposal, draft.config)
    stop = [eos_token_id] if isinstance(eos_token_id, int) else list(eos_token_id or default_stop_tokens(verifier))
    decoder = Decoder(verifier, draft, chosen, sampling, verification, stop)
    mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
    prompts = [row[seen.bool()] for row, seen in zip(input_ids, mask, strict=True)]
    if streamer is not None:
        streamer.put(input_ids.cpu())
    new: list[list[int]] = [[] for _ in prompts]
    for emission in decoder.decode(prompts, max_new_tokens, seed):
        new[emission.sequence] += emission.tokens
        if streamer is not None:
            streamer.put(torch.tensor(emission.tokens))
    if streamer is not None:
        streamer.end()
    padding = pad_token_id if pad_token_id is not None else _padding(draft, stop)
    width = max(len(tokens) for tokens in new)
    padded = torch.tensor([tokens + [padding] * (width - len(tokens)) for tokens in new], device=input_ids.device)
    return torch.cat([input_ids, padded], dim=1)


def _padding(draft: SpeculatorModel, stop: Sequence[int]) -> int:
    assert draft.verifier is not None
    padding = getattr(draft.verifier.generation_config, "pad_token_id", None)
    return padding if padding is not None else next(iter(stop), 0)
